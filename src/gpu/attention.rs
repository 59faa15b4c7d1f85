//! Attention on a chip.
//!
//! Processors that run a subgroup as one vector take kernels by blocks, in which an invocation holds four rows; other adapters
//! take an invocation for each row and, where rows are few (decoding), for each part of its keys, whose results are joined in order.
//! Neither adds in an order that chance decides.

use super::launch::table;
use super::launch::{Launch, Operand};
use super::library as k;
use crate::dtype::DType;

/// What attends to what; see the CPU's.
#[derive(Clone)]
pub(crate) struct Heads {
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) head_dim: usize,
    pub(crate) scale: f32,
    pub(crate) soft_cap: Option<f32>,
    pub(crate) causal: bool,
    pub(crate) window: Option<usize>,
    pub(crate) offset: usize,
    /// In place of `offset`, of each sequence; forward alone.
    pub(crate) offsets: Option<Operand>,
    /// Documents of queries and keys.
    pub(crate) documents: Option<[Operand; 2]>,
}

/// No window, in the shader's numbering.
const NO_WINDOW: u32 = u32::MAX;

impl Heads {
    fn of(&self, launch: Launch) -> Launch {
        // Positions are 32-bit in WGSL; a window beyond every position hides nothing that its ends do not.
        let window = self.window.map(|w| w.min(1 << 30));
        let [of_queries, of_keys] = match &self.documents {
            Some([q, k]) => [Some(q.clone()), Some(k.clone())],
            None => [None, None],
        };
        launch
            .optional("of_queries", of_queries)
            .optional("of_keys", of_keys)
            .number("heads", self.heads)
            .number("kv_heads", self.kv_heads)
            .number("queries", self.queries)
            .number("keys", self.keys)
            .number("head_dim", self.head_dim)
            .number("offset", self.offset.min(1 << 30))
            .number("causal", self.causal as u32)
            .number("window", window.map_or(NO_WINDOW, |w| w as u32))
            .number("scale", self.scale)
            .number("cap", self.soft_cap.unwrap_or(0.0))
            .constant("D", self.head_dim as u32)
    }
}

/// Vectors of 4 LANES elements of o that a subgroup sums at a time; longer heads go in pieces, each with its own scores. Twice
/// as many took llvmpipe's compiler minutes to find registers for.
const VECTORS: usize = 2;
/// The same of dk and dv, which are summed together.
const VECTORS_OF_BOTH: usize = 1;

impl Heads {
    /// A launch by blocks of `rows` rows of each key head, with pieces of at most `vectors` vectors.
    fn run_by_blocks(
        &self,
        launch: Launch,
        names: &[&str],
        lanes: u32,
        rows: usize,
        vectors: usize,
    ) {
        let vector = 4 * lanes as usize;
        let vectors = self.head_dim.div_ceil(vector).min(vectors);
        let by_fours = self.head_dim.is_multiple_of(4);
        let mut launch = self.of(launch);
        for name in names {
            launch = launch.by_fours(name, by_fours);
        }
        launch
            .constant("LANES", lanes)
            .constant("VECTORS", vectors as u32)
            .run_tiles(
                lanes,
                [
                    rows.div_ceil(vector),
                    self.batch * self.kv_heads,
                    self.head_dim.div_ceil(vectors * vector),
                ],
            );
    }

    /// Query rows that share a key head.
    fn rows_of_head(&self) -> usize {
        self.heads / self.kv_heads * self.queries
    }
}

/// o = softmax(mask(logit(q k^T))) v and its log-sum-exp.
pub(crate) fn attention(g: &Heads, [q, keys, v]: [Operand; 3], o: Operand, lse: Operand) {
    let Some(lanes) = o.chip.lanes() else {
        return by_rows(g, [q, keys, v], o, lse);
    };
    let launch = Launch::new(&k::ATTENTION_LANES)
        .operand("q", q)
        .operand("k", keys)
        .operand("v", v)
        .operand("o", o)
        .operand("lse", lse)
        .optional("offsets", g.offsets.clone());
    let names = ["q", "k", "v", "o"];
    g.run_by_blocks(launch, &names, lanes, g.rows_of_head(), VECTORS);
}

/// Rows that keep a card busy; fewer share their keys out. A rule of sizes alone, so that a run repeats bit for bit.
const BUSY: usize = 8192;
/// Keys of a part, at least: joining parts is little beside reading them.
const PART: usize = 64;

/// Parts of the keys, and keys of each, for so many rows.
fn parts_of_keys(rows: usize, keys: usize) -> [usize; 2] {
    let parts = (BUSY / rows.max(1)).min(keys / PART).max(1);
    let span = keys.div_ceil(parts).max(1);
    [keys.div_ceil(span).max(1), span]
}

/// [`attention`] with an invocation for each row or, where they are few, for each row and part of the keys.
fn by_rows(g: &Heads, [q, keys, v]: [Operand; 3], o: Operand, lse: Operand) {
    let rows = g.batch * g.heads * g.queries;
    let [parts, span] = parts_of_keys(rows, g.keys);
    let run = |o: Operand, lse: Operand| {
        let launch = Launch::new(&k::ATTENTION)
            .operand("q", q.clone())
            .operand("k", keys.clone())
            .operand("v", v.clone())
            .operand("o", o)
            .operand("lse", lse)
            .optional("offsets", g.offsets.clone())
            .number("rows", rows)
            .number("span", span);
        g.of(launch).run(rows * parts);
    };
    if parts == 1 {
        return run(o, lse);
    }
    let part = o.scratch(parts * rows * g.head_dim);
    let part_lse = o.scratch(parts * rows);
    run(part.clone(), part_lse.clone());
    let join = |width: usize| {
        Launch::new(&k::ATTENTION_JOIN)
            .operand("part_lse", part_lse.clone())
            .operand("lse", lse.clone())
            .number("heads", g.heads)
            .number("queries", g.queries)
            .number("width", width)
            .number("rows", rows)
            .number("parts", parts)
    };
    join(g.head_dim)
        .operand("part", part)
        .operand("o", o)
        .run(rows * g.head_dim);
    join(1).run(rows);
}

/// The wanted gradients of [`attention`], from its o and lse.
pub(crate) fn attention_backward(
    g: &Heads,
    [q, k, v]: [Operand; 3],
    [o, dout, lse]: [Operand; 3],
    [dq, dk, dv]: [Option<Operand>; 3],
) {
    let rows = g.batch * g.heads * g.queries;
    let lanes = q.chip.lanes();
    let delta = q.scratch(rows);
    Launch::new(&k::ATTENTION_DELTA)
        .operand("delta", delta.clone())
        .operand("o", o)
        .operand("dout", dout.clone())
        .number("heads", g.heads)
        .number("queries", g.queries)
        .number("head_dim", g.head_dim)
        .run(rows);
    let read = |kernel: &super::Kernel| {
        Launch::new(kernel)
            .operand("q", q.clone())
            .operand("k", k.clone())
            .operand("v", v.clone())
            .operand("dout", dout.clone())
            .operand("lse", lse.clone())
            .operand("delta", delta.clone())
    };
    if let Some(dq) = dq {
        match lanes {
            Some(lanes) => {
                let launch = read(&k::ATTENTION_DQ_LANES).operand("dq", dq);
                let names = ["q", "k", "v", "dout", "dq"];
                g.run_by_blocks(launch, &names, lanes, g.rows_of_head(), VECTORS);
            }
            None => g.of(read(&k::ATTENTION_DQ).operand("dq", dq)).run(rows),
        }
    }
    if dk.is_none() && dv.is_none() {
        return;
    }
    match lanes {
        Some(lanes) => {
            let launch = read(&k::ATTENTION_DKV_LANES);
            let launch = launch.optional("dk", dk).optional("dv", dv);
            let names = ["q", "k", "v", "dout", "dk", "dv"];
            g.run_by_blocks(launch, &names, lanes, g.keys, VECTORS_OF_BOTH);
        }
        None => {
            let launch = read(&k::ATTENTION_DKV);
            let launch = launch.optional("dk", dk).optional("dv", dv);
            g.of(launch).run(g.batch * g.kv_heads * g.keys);
        }
    }
}

/// Results over some keys that are merged into those over others; see the CPU's.
#[derive(Clone, Copy)]
pub(crate) struct MergedPart {
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    /// Elements of a result's row.
    pub(crate) width: usize,
    /// Queries of the whole.
    pub(crate) queries: usize,
    /// The part's first query.
    pub(crate) first: usize,
    /// The part's queries.
    pub(crate) part: usize,
}

/// Merges o [b, part, h, d] and lse [b, h, part] of a part into o [b, t, h, d] and lse [b, h, t], all f32.
pub(crate) fn attention_merge(
    m: MergedPart,
    [o, lse]: [Operand; 2],
    [part, part_lse]: [Operand; 2],
) {
    let rows = m.batch * m.heads * m.part;
    let launch = |width: usize| {
        Launch::new(&k::ATTENTION_MERGE)
            .operand("lse", lse.clone())
            .operand("part_lse", part_lse.clone())
            .number("heads", m.heads)
            .number("width", width)
            .number("queries", m.queries)
            .number("first", m.first)
            .number("some", m.part)
    };
    // First o, whose shares come from the log-sum-exp as it was.
    launch(m.width)
        .operand("part", part)
        .operand("o", o)
        .run(rows * m.width);
    launch(1).run(rows);
}

/// New tokens x of sequences into y, whose sequences have `inner` elements: those of sequence b from element `starts[b]` of it
/// on. The rest of y is left as it is.
pub(crate) fn write_tokens(x: Operand, starts: &[usize], inner: usize, y: Operand) {
    let narrow = |&s: &usize| {
        u32::try_from(s).unwrap_or_else(|_| {
            panic!("a cache of {inner} elements a sequence is more than a shader's 32 bits count")
        })
    };
    let starts: Vec<u32> = starts.iter().map(narrow).collect();
    let n = x.elements;
    let width = n.checked_div(starts.len()).unwrap_or(0);
    let starts = table(&y.chip, DType::U32, &starts);
    Launch::new(&k::WRITE_TOKENS)
        .operand("x", x)
        .operand("starts", starts)
        .operand("y", y)
        .number("width", width.max(1))
        .number("inner", inner)
        .run(n);
}
