//! Attention by blocks that stay in cache, with an online softmax (Dao et al. 2022, "FlashAttention").
//!
//! Scores are kept transposed, [keys, query rows]: a vector holds one key's scores for neighbouring query rows. Maxima and
//! sums over keys then run down the tile without ever crossing lanes, keys and values are used as they lie, and only the
//! queries are transposed, once a tile. The query heads that share a key head fill a tile together, token by token.
//!
//! Order of sums: a logit is a chain over d; a sum of exponentials is a chain over the 64 keys of a block, and blocks are
//! added in ascending order; outputs and gradients are chains over keys or over query rows (token by token, then head by
//! head). A query's keys are cut into chunks of 1024 where its key head has no more than 64 query rows (`split`), and the
//! chunks' results are added in ascending order. Blocks that nobody sees change nothing, bit for bit, so they are skipped; of a block that is partly hidden, bands of 16
//! query rows by 16 keys. Nothing depends on threads.

mod backward;
mod forward;
mod heads;
mod mask;
mod merge;
#[cfg(target_arch = "x86_64")]
mod narrow;
mod online;
mod seen;
mod split;
#[cfg(test)]
mod tests;
mod tile;

pub use merge::{Merge, attention_merge};

use crate::dtype::{Slice, SliceMut};
use crate::memory::with_scratch_f32;
use crate::simd::isa;
use rayon::prelude::*;

/// Heads of tokens, borrowed: element (b, h, t, d) is at b s0 + h s1 + t s2 + d.
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a> {
    /// All elements.
    pub data: Slice<'a>,
    /// Distances of batches, heads and tokens, in elements.
    pub strides: [usize; 3],
}

/// Heads of tokens, borrowed for writing; no two rows may overlap.
#[derive(Debug)]
pub struct HeadsMut<'a> {
    /// All elements.
    pub data: SliceMut<'a>,
    /// Distances of batches, heads and tokens, in elements.
    pub strides: [usize; 3],
}

/// What the forward reads.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    g: &'a Geometry<'a>,
    q: Heads<'a>,
    k: Heads<'a>,
    v: Heads<'a>,
}

#[cfg(target_arch = "x86_64")]
type Unit = Option<crate::simd::TileUnit>;
/// No other processor's unit is used yet.
#[cfg(not(target_arch = "x86_64"))]
type Unit = Option<std::convert::Infallible>;

impl Inputs<'_> {
    /// The unit that multiplies tiles, if it serves this case. Asked where a kernel is entered, as the instruction set.
    fn unit(&self) -> Unit {
        #[cfg(target_arch = "x86_64")]
        return narrow::unit(self);
        #[cfg(not(target_arch = "x86_64"))]
        None
    }
}

/// What attends to what. Query t stands at position offset + t, key s at position s.
#[derive(Clone, Copy, Debug)]
pub struct Geometry<'a> {
    /// Sequences.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// Key heads; divides `heads`. Query head h uses key head h / (heads / kv_heads).
    pub kv_heads: usize,
    /// Queries of a sequence.
    pub queries: usize,
    /// Keys of a sequence.
    pub keys: usize,
    /// Elements of a head, 1 to 256.
    pub head_dim: usize,
    /// Logit = scale q.k.
    pub scale: f32,
    /// c: a logit l becomes c tanh(l / c), before masking.
    pub soft_cap: Option<f32>,
    /// Keys after the query are hidden.
    pub causal: bool,
    /// Keys at a distance of this or more are hidden; if `causal`, only earlier keys are left to hide.
    pub window: Option<usize>,
    /// Position of query 0.
    pub offset: usize,
    /// Document of each query `[batch, queries]` and key `[batch, keys]`: other documents' keys are hidden.
    pub documents: Option<(&'a [u32], &'a [u32])>,
}

impl Geometry<'_> {
    /// Panics unless the numbers fit together.
    fn check(&self) {
        assert!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads),
            "{} key heads do not divide {} heads",
            self.kv_heads,
            self.heads
        );
        assert!(
            (1..=256).contains(&self.head_dim),
            "a head of {} elements; 1 to 256 are possible",
            self.head_dim
        );
        if let Some((queries, keys)) = self.documents {
            assert_eq!(
                queries.len(),
                self.batch * self.queries,
                "documents of queries"
            );
            assert_eq!(keys.len(), self.batch * self.keys, "documents of keys");
        }
    }

    /// Whether the work is worth more than one thread.
    fn is_big(&self) -> bool {
        let products = self.batch * self.heads * self.queries * self.keys * self.head_dim;
        products > 1 << 18 && rayon::current_num_threads() > 1
    }

    /// Tile `index` of the query rows of key head `unit`, counted over all sequences.
    fn tile(&self, unit: usize, index: usize) -> mask::Tile {
        let first = index * mask::SIDE;
        mask::Tile {
            batch: unit / self.kv_heads,
            kv_head: unit % self.kv_heads,
            first,
            rows: mask::SIDE.min(self.rows() - first),
        }
    }
}

/// Constants that are folded into the scores, so that an exponential is one power of two.
#[derive(Clone, Copy)]
struct Fold {
    /// Factor of the queries: scale log2(e), or scale / c with a soft cap.
    query: f32,
    /// c log2(e): factor of the hyperbolic tangent.
    cap: Option<f32>,
}

impl Fold {
    fn new(g: &Geometry) -> Self {
        use std::f32::consts::LOG2_E;
        Fold {
            query: g.soft_cap.map_or(g.scale * LOG2_E, |c| g.scale / c),
            cap: g.soft_cap.map(|c| c * LOG2_E),
        }
    }
}

/// o = softmax over visible keys of (scale q k^T, capped) times v; lse = ln of the sum of e^logit over visible keys.
///
/// q, o: rows of [batch, heads, queries]; k, v: of [batch, kv_heads, keys], each with head_dim elements of any float type;
/// lse: [batch, heads, queries]. A query that sees nothing gets o = 0 and lse = minus infinity. Panics on shapes that do
/// not fit, on output rows that overlap, and on head_dim above 256.
pub fn attention_forward(g: &Geometry, q: Heads, k: Heads, v: Heads, o: HeadsMut, lse: &mut [f32]) {
    g.check();
    let (d, queries) = (g.head_dim, [g.batch, g.heads, g.queries]);
    let keys = [g.batch, g.kv_heads, g.keys];
    q.check("q", queries, d);
    k.check("k", keys, d);
    v.check("v", keys, d);
    assert_eq!(
        lse.len(),
        queries.iter().product::<usize>(),
        "lse is not {queries:?}"
    );
    let lse = HeadsMut {
        data: SliceMut::F32(lse),
        strides: [g.heads * g.queries, g.queries, 1],
    };
    let o = heads::OutRows::new("o", o, queries, d);
    let lse = heads::OutRows::new("lse", lse, queries, 1);
    let inputs = Inputs { g, q, k, v };
    let unit = inputs.unit();
    if split::wanted(g) {
        split::run(inputs, unit, &o, &lse);
        return;
    }
    let isa = isa();
    let (units, tiles) = (g.batch * g.kv_heads, g.rows().div_ceil(mask::SIDE));
    let blocks = 0..g.keys.div_ceil(mask::SIDE);
    // Longer runs of tiles copy keys less often; four tasks a thread still balance.
    let run = (units * tiles / (4 * rayon::current_num_threads())).clamp(1, forward::TILES);
    let runs = tiles.div_ceil(run);
    for_each(g.is_big(), units * runs, |i| {
        let first = i % runs * run;
        with_scratch_f32(forward::scratch(d, run), |scratch| {
            let task = forward::Forward {
                inputs,
                unit: i / runs,
                tiles: first..(first + run).min(tiles),
                blocks: blocks.clone(),
                sink: forward::Sink::Rows(&o, &lse),
                scratch,
            };
            task.run(isa, unit);
        });
    });
}

/// Calls f with 0..n, on all threads of the pool if `parallel`.
fn for_each(parallel: bool, n: usize, f: impl Fn(usize) + Sync + Send) {
    if parallel {
        (0..n).into_par_iter().with_max_len(1).for_each(f);
    } else {
        (0..n).for_each(f);
    }
}

/// The gradients of [`attention_forward`], from its o and lse; dq, dk and dv are overwritten.
///
/// With P = e^(logit - lse), D = sum over d of dout o: dv = P^T dout, dlogit = P (dout v^T - D), and from there through cap
/// and scale dq = scale dlogit k, dk = scale dlogit^T q. A query that sees nothing gets and gives 0. Panics as the
/// forward does.
#[allow(clippy::too_many_arguments)]
pub fn attention_backward(
    g: &Geometry,
    q: Heads,
    k: Heads,
    v: Heads,
    o: Heads,
    dout: Heads,
    lse: &[f32],
    dq: HeadsMut,
    dk: HeadsMut,
    dv: HeadsMut,
) {
    g.check();
    let (d, queries) = (g.head_dim, [g.batch, g.heads, g.queries]);
    let keys = [g.batch, g.kv_heads, g.keys];
    for (what, x) in [("q", q), ("o", o), ("dout", dout)] {
        x.check(what, queries, d);
    }
    k.check("k", keys, d);
    v.check("v", keys, d);
    assert_eq!(
        lse.len(),
        queries.iter().product::<usize>(),
        "lse is not {queries:?}"
    );
    backward::run(
        &backward::Arguments {
            g,
            q,
            k,
            v,
            o,
            dout,
            lse,
        },
        &heads::OutRows::new("dq", dq, queries, d),
        &heads::OutRows::new("dk", dk, keys, d),
        &heads::OutRows::new("dv", dv, keys, d),
    );
}

/// Bytes of scratch that one task of the forward and of the backward takes; they follow the shape only.
pub fn attention_scratch(g: &Geometry) -> (usize, usize) {
    (
        4 * forward::scratch(g.head_dim, forward::TILES),
        4 * backward::scratch(g.head_dim, g.keys),
    )
}
