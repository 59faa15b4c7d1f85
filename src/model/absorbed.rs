//! Latent attention of new tokens over a cache without keys and values: what makes them of the latents is moved to the other
//! side of each product (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1.2).
//!
//! With the names of `latent`, t new tokens, S in the cache, and q_i the still part and p_i the turned part of head i's queries:
//!
//! ```text
//! u_i = q_i Wuk_i^T                                           [b, t, kv_rank]
//! a_i = softmax((u_i latent^T + p_i rope^T) / sqrt(n + r))    [b, t, S]
//! o_i = (a_i latent) Wuv_i                                    [b, t, v]
//! ```
//!
//! A token costs `2 h S (2 kv_rank + r + t)` operations, t of them to hide what it does not see, and `2 h kv_rank (n + v)` for the
//! ways in and out, where keys and values cost `2 S h kv_rank (n + v)` each time, and `4 S h (n + r)` a token. Several tokens go
//! this way where it is the shorter one. Heads of kv_rank + r elements are wider than the kernels of attention take, so the
//! products are apart, scores in f32. Sums run in other orders than with keys: the results differ in the last digits.
//!
//! Over cp each chip attends over its own part of the cache, and the parts of the softmax, b h t (kv_rank + 1) numbers a chip, are
//! merged in the order of the chips as those of keys are ([`Chip::attention_over_shares`]).
//!
//! Wuk and Wuv by heads are made once for a text, h kv_rank (n + v) elements of each block beside its parameters; where ZeRO-3
//! splits parameters, each time.

use super::documents::by_tokens;
use super::latent::{KeyLatent, part};
use super::{Latent, Past, Transformer};
use crate::dtype::DType;
use crate::ops;
use crate::placement::Placement::Shard;
use crate::spmd::{Chip, FromIndex, Init, Sharded};

/// What a key that is hidden adds to its score: its exponential is 0 beside any other, and every type holds it.
const HIDDEN: f32 = -6e4;

impl Transformer {
    /// Whether new tokens attend over the latents of a cache as they are, instead of making keys and values of them each time; true
    /// unless said.
    pub fn with_absorbed_latents(mut self, absorbed: bool) -> Self {
        self.absorbed = absorbed;
        self
    }

    /// True if queries [b, t, h, d] attend over the latents of the cache: one token of each sequence, or several where that takes
    /// fewer operations and chips have as many sequences each.
    pub(super) fn absorbs(&self, q: &Sharded, l: &Latent) -> bool {
        let Some(past) = self.past.as_ref().filter(|past| !past.is_empty()) else {
            return false;
        };
        let (t, s, ways) = (
            q.shape()[1],
            past.capacity,
            l.kv_rank * (l.nope_dim + l.v_dim),
        );
        let over_latents = t * (s * (2 * l.kv_rank + l.rope_dim + t) + ways);
        let over_keys = s * ways + t * s * 2 * l.head_dim();
        self.absorbed && (t == 1 || q.splits_evenly() && over_latents < over_keys)
    }

    /// Attention [b, t, h, v] of queries [b, t, h, n + r] over what was kept of all tokens so far.
    pub(super) fn attend_latents(
        &self,
        chip: &Chip,
        name: &str,
        l: &Latent,
        q: &Sharded,
        kept: &KeyLatent,
        past: &Past,
    ) -> Sharded {
        let (b, t, h) = (q.shape()[0], q.shape()[1], self.config.heads);
        let own = KeyLatent {
            latent: kept.latent.own_share("cp"),
            rope: kept.rope.own_share("cp"),
        };
        let [keys, values] = self.ways_up(chip, name, l);
        // By heads for what heads have of their own, by sequences for what these have.
        let still = part(chip, q, 3, 0..l.nope_dim);
        let still = ordered(chip, &still, [2, 0, 1, 3]).reshape([h, b * t, l.nope_dim]);
        let into = product(chip, &still, &keys, true, self.dtype);
        drop((still, keys));
        let into = ordered(chip, &into.reshape([h, b, t, l.kv_rank]), [1, 0, 2, 3]);
        let into = into.reshape([b, h * t, l.kv_rank]);
        let turned = part(chip, q, 3, l.nope_dim..l.head_dim());
        let turned = ordered(chip, &turned, [0, 2, 1, 3]).reshape([b, h * t, l.rope_dim]);
        let scores = product(chip, &into, &own.latent, true, DType::F32);
        let turned = self.turned_scores(chip, &turned, t, &own, past);
        let scale = 1.0 / (l.head_dim() as f32).sqrt();
        let scores = scores.add(&turned).scale(scale);
        drop(turned);
        let shared = chip.size_of("cp") > 1;
        let weight = shared.then(|| log_sums(chip, &scores).reshape([b, h, t]));
        let weights = chip.apply_one(ops::Softmax, &[&scores]);
        drop(scores);
        let output = if shared { DType::F32 } else { self.dtype };
        let mixed = product(chip, &weights, &own.latent, false, output);
        let mixed = mixed.reshape([b, h, t, l.kv_rank]);
        let mixed = match weight {
            None => ordered(chip, &mixed, [1, 0, 2, 3]),
            Some(weight) => {
                let mixed = ordered(chip, &mixed, [0, 2, 1, 3]);
                let all = chip.merge_shares(&mixed, &weight, "cp");
                ordered(chip, &all.cast(self.dtype), [2, 0, 1, 3])
            }
        };
        let mixed = mixed.reshape([h, b * t, l.kv_rank]);
        let o = product(chip, &mixed, &values, false, self.dtype);
        ordered(chip, &o.reshape([h, b, t, l.v_dim]), [1, 2, 0, 3])
    }

    /// What makes still keys and values of latents, a matrix for each head: [h, kv_rank, n] and [h, kv_rank, v].
    fn ways_up(&self, chip: &Chip, name: &str, l: &Latent) -> [Sharded; 2] {
        let (h, width) = (self.config.heads, l.nope_dim + l.v_dim);
        let by_heads = |range: std::ops::Range<usize>| {
            let placed = chip.placed(&[("tp", Shard(1))]);
            let (name, shape) = (format!("{name}.kv_up"), [l.kv_rank, h * width]);
            let weight = self.weight(chip, &name, &shape, placed, Init::normal(0.02));
            let heads = weight.reshape([l.kv_rank, h, width]);
            ordered(chip, &part(chip, &heads, 2, range), [1, 0, 2])
        };
        [("keys", 0..l.nope_dim), ("values", l.nope_dim..width)].map(|(which, range)| {
            match chip.gathers_parameters() {
                true => by_heads(range),
                false => chip.made_once(&format!("{name}.{which} by heads"), || by_heads(range)),
            }
        })
    }

    /// Scores [b, h t, S] of the turned parts of queries [b, h t, r] and keys of this chip; far below all others where a query
    /// does not see a key.
    fn turned_scores(
        &self,
        chip: &Chip,
        turned: &Sharded,
        t: usize,
        own: &KeyLatent,
        past: &Past,
    ) -> Sharded {
        let (b, rows, s) = (turned.shape()[0], turned.shape()[1], own.rope.shape()[1]);
        // t more elements: a query has a 1 at its token's place, a key there what hides it from that token.
        let at = move |i: u64| f32::from(u8::from(i as usize % t == i as usize / t % t));
        let one = chip.input("ones", [b, rows, t], turned.placements(), &FromIndex(at));
        let sees = past.sight(chip, self.token_order(chip.mesh(), past.prompt()));
        let hides = move |i: u64| {
            let (i, j) = (i as usize / t, i as usize % t);
            if sees(i / s, i % s, j) { 0.0 } else { HIDDEN }
        };
        let hides = chip.input("hidden", [b, s, t], by_tokens(&own.rope), &FromIndex(hides));
        let join = ops::Concatenate { axis: 2 };
        let with =
            |x: &Sharded, more: Sharded| chip.apply_one(join.clone(), &[x, &more.cast(x.dtype())]);
        product(
            chip,
            &with(turned, one),
            &with(&own.rope, hides),
            true,
            DType::F32,
        )
    }
}

/// ln of the sum of the exponentials of each row of f32 x [b, m, s]: [b, m].
fn log_sums(chip: &Chip, x: &Sharded) -> Sharded {
    let max = chip.apply_one(ops::RowMax::default(), &[x]);
    let shape = max.shape().to_vec();
    let labels = chip.input("first", &shape[..], max.placements(), &FromIndex(|_| 0u32));
    let sums = chip.apply(ops::RowExpSum::default(), &[x, &max, &labels]);
    // A loss whose target has the logit 0.
    let zero = chip.input("zero", &shape[..], max.placements(), &FromIndex(|_| 0f32));
    let loss = ops::CrossEntropyFromStatistics::default();
    chip.apply_one(loss, &[x, &labels, &max, &sums[0], &zero])
}

/// `a b`, or `a b^T`, for each index of the first axis of both.
fn product(chip: &Chip, a: &Sharded, b: &Sharded, transpose_b: bool, output: DType) -> Sharded {
    let op = ops::Matmul {
        transpose_b,
        output: Some(output),
        ..Default::default()
    };
    chip.apply_one(op, &[a, b])
}

fn ordered<const N: usize>(chip: &Chip, x: &Sharded, order: [usize; N]) -> Sharded {
    let order = order.to_vec();
    chip.apply_one(ops::Transpose { order }, &[x])
}
