//! Latent attention of a new token over its cache without keys and values: what makes them of the latents is moved to the other
//! side of each product (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1.2).
//!
//! With the names of `latent`, S tokens in the cache, and q_i the still part and p_i the turned part of head i's query:
//!
//! ```text
//! u_i = q_i Wuk_i^T                                           [b, kv_rank]
//! a_i = softmax((u_i latent^T + p_i rope^T) / sqrt(n + r))    [b, S]
//! o_i = (a_i latent) Wuv_i                                    [b, v]
//! ```
//!
//! A token costs `2 h S (2 kv_rank + r)` operations, and `2 h kv_rank (n + v)` for the ways in and out, where keys and values cost
//! `2 S h kv_rank (n + v)` each time. Heads of kv_rank + r elements are wider than the kernels of attention take, so the products
//! are apart, scores in f32. Sums run in other orders than with keys: the results differ in the last digits.

use super::documents::by_tokens;
use super::latent::{KeyLatent, part};
use super::{Latent, Past, Transformer};
use crate::dtype::DType;
use crate::ops;
use crate::placement::Placement::Shard;
use crate::spmd::{Chip, FromIndex, Init, Sharded};
use std::sync::Arc;

/// What a key that is hidden adds to its score: its exponential is 0 beside any other, and every type holds it.
const HIDDEN: f32 = -6e4;

impl Transformer {
    /// Whether new tokens attend over the latents of a cache as they are, instead of making keys and values of them each time; true
    /// unless said. Not over cp, whose chips have parts of the cache.
    pub fn with_absorbed_latents(mut self, absorbed: bool) -> Self {
        self.absorbed = absorbed;
        self
    }

    /// True if queries [b, t, h, d] attend over the latents of the cache.
    pub(super) fn absorbs(&self, chip: &Chip, q: &Sharded) -> bool {
        let grows = self.past.as_ref().is_some_and(|past| !past.is_empty());
        self.absorbed && grows && q.shape()[1] == 1 && chip.size_of("cp") == 1
    }

    /// Attention [b, 1, h, v] of queries [b, 1, h, n + r] of one token each over what was kept of all tokens so far.
    pub(super) fn attend_latents(
        &self,
        chip: &Chip,
        name: &str,
        l: &Latent,
        q: &Sharded,
        kept: &KeyLatent,
        past: &Past,
    ) -> Sharded {
        let (b, h) = (q.shape()[0], self.config.heads);
        let q = q.reshape([b, h, l.head_dim()]);
        let [keys, values] = self.ways_up(chip, name, l);
        let by_heads = |x: &Sharded| swapped(chip, x);
        // [h, b, n] by [h, kv_rank, n] transposed.
        let still = by_heads(&part(chip, &q, 2, 0..l.nope_dim));
        let into = product(chip, &still, &keys, true, self.dtype);
        drop((still, keys));
        let scores = product(chip, &by_heads(&into), &kept.latent, true, DType::F32);
        let turned = self.turned_scores(
            chip,
            &part(chip, &q, 2, l.nope_dim..l.head_dim()),
            kept,
            past,
        );
        let scale = 1.0 / (l.head_dim() as f32).sqrt();
        let weights = chip.apply_one(ops::Softmax, &[&scores.add(&turned).scale(scale)]);
        drop((scores, turned));
        let mixed = product(chip, &weights, &kept.latent, false, self.dtype);
        let o = product(chip, &by_heads(&mixed), &values, false, self.dtype);
        by_heads(&o).reshape([b, 1, h, l.v_dim])
    }

    /// What makes still keys and values of latents, a matrix for each head: [h, kv_rank, n] and [h, kv_rank, v].
    fn ways_up(&self, chip: &Chip, name: &str, l: &Latent) -> [Sharded; 2] {
        let (h, width) = (self.config.heads, l.nope_dim + l.v_dim);
        let placed = chip.placed(&[("tp", Shard(1))]);
        let (name, shape) = (format!("{name}.kv_up"), [l.kv_rank, h * width]);
        let weight = self.weight(chip, &name, &shape, placed, Init::normal(0.02));
        let heads = weight.reshape([l.kv_rank, h, width]);
        [0..l.nope_dim, l.nope_dim..width].map(|range| swapped(chip, &part(chip, &heads, 2, range)))
    }

    /// Scores [b, h, S] of the turned parts of queries [b, h, r] and keys; far below all others where a sequence has no key yet.
    fn turned_scores(
        &self,
        chip: &Chip,
        turned: &Sharded,
        kept: &KeyLatent,
        past: &Past,
    ) -> Sharded {
        let (b, h, s) = (turned.shape()[0], turned.shape()[1], kept.rope.shape()[1]);
        // One more element of queries, which is 1, and of keys: what it adds is whether the key is there.
        let one = chip.input("ones", [b, h, 1], turned.placements(), &FromIndex(|_| 1f32));
        let starts = past.starts.clone();
        let hides = move |i: u64| hidden(&starts, i as usize, s);
        let hides = chip.input(
            "hidden",
            [b, s, 1],
            by_tokens(&kept.rope),
            &FromIndex(hides),
        );
        let join = ops::Concatenate { axis: 2 };
        let with =
            |x: &Sharded, more: Sharded| chip.apply_one(join.clone(), &[x, &more.cast(x.dtype())]);
        product(
            chip,
            &with(turned, one),
            &with(&kept.rope, hides),
            true,
            DType::F32,
        )
    }
}

/// What hides key `i % s` from the new token of sequence `i / s`, which stands at `starts[i / s]`.
fn hidden(starts: &Arc<[usize]>, i: usize, s: usize) -> f32 {
    match i % s <= starts[i / s] {
        true => 0.0,
        false => HIDDEN,
    }
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

/// [y, x, z] from [x, y, z].
fn swapped(chip: &Chip, x: &Sharded) -> Sharded {
    let order = vec![1, 0, 2];
    chip.apply_one(ops::Transpose { order }, &[x])
}
