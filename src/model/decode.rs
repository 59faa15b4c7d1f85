//! Inference: a text that grows. Prefill runs the prompts at once, decoding one token of each sequence; keys and values of
//! earlier tokens are in the chip's cache (see [`Chip::cached`]), so a token costs its own products and attention over what
//! came before.
//!
//! Sums run in the orders of the whole forward, so logits are those of the whole text, bit for bit wherever the kernels keep
//! one order for any number of queries.

use super::Transformer;
use crate::ops;
use crate::placement::Placement::Shard;
use crate::placement::Placements;
use crate::spmd::{Chip, Sharded};
use std::sync::Arc;

/// What came before the tokens of a forward.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Past {
    /// Position of the first token of each sequence, \[b\]: so many tokens of it are in the cache.
    pub starts: Arc<[usize]>,
    /// Tokens that the cache has room for.
    pub capacity: usize,
}

impl Transformer {
    /// Placement of prompts [b, t]: sequences split over dp and fsdp if these divide them, tokens whole.
    pub fn prompt_placement(chip: &Chip, sequences: usize) -> Placements {
        let parts = chip.size_of("dp") * chip.size_of("fsdp");
        match sequences.is_multiple_of(parts) {
            true => chip.placed(&[("dp", Shard(0)), ("fsdp", Shard(0))]),
            false => chip.replicated(),
        }
    }

    /// Logits [b, 1, v padded] behind token `last[b]` of each sequence, from token numbers [b, n] that continue what `past`
    /// says is in the cache. Tokens of a sequence behind its last one are padding: they may be anything, and what they
    /// leave in the cache is overwritten by the sequence's next tokens.
    ///
    /// # Panics
    /// While recording, if tokens are split over cp, or beyond the cache's capacity.
    #[track_caller]
    pub fn next_logits(
        &self,
        chip: &Chip,
        tokens: &Sharded,
        past: &Past,
        last: &[usize],
    ) -> Sharded {
        let model = Transformer {
            past: Some(past.clone()),
            draw: None,
            recompute: false,
            sequence_parallel: false,
            ..self.clone()
        };
        let x = model.embed(chip, tokens);
        let x = model.blocks(chip, 0..model.config.layers, x);
        let x = chip.apply_one(
            ops::PickToken {
                tokens: last.into(),
            },
            &[&x],
        );
        model.head(chip, &x)
    }

    /// Where the tokens of x [b, t, ..] stand, for rotary positions.
    pub(super) fn rotary_positions(&self, chip: &Chip, x: &Sharded) -> ops::RotaryPositions {
        match &self.past {
            Some(past) => ops::RotaryPositions::From(past.starts.clone()),
            None => ops::RotaryPositions::Alike {
                offset: 0,
                order: self.order_of(chip, x),
            },
        }
    }

    /// Position of each token of a batch like `tokens` [b, t]: of one row if all are alike, else of all rows.
    pub(super) fn positions(&self, chip: &Chip, tokens: &Sharded) -> Vec<u32> {
        let t = tokens.shape()[1];
        let narrow = |p: usize| p as u32;
        match &self.past {
            Some(past) => {
                let rows = past.starts.iter().flat_map(|&start| start..start + t);
                rows.map(narrow).collect()
            }
            None => {
                let row = self.order_of(chip, tokens).positions(0..t);
                row.into_iter().map(narrow).collect()
            }
        }
    }

    /// Attention of new queries over the cache, to which their keys and values are added.
    pub(super) fn attend_past(
        &self,
        chip: &Chip,
        name: &str,
        [q, k, v]: [Sharded; 3],
        past: &Past,
    ) -> Sharded {
        let k = self.kept(chip, &format!("{name}.k"), &k, past);
        let v = self.kept(chip, &format!("{name}.v"), &v, past);
        self.attend_kept(chip, [q, k, v], past)
    }

    /// What is kept under `name` of all tokens so far, [b, capacity, ..], x of the new ones included.
    pub(super) fn kept(&self, chip: &Chip, name: &str, x: &Sharded, past: &Past) -> Sharded {
        chip.cached(name, x, &past.starts, past.capacity)
    }

    /// Attention of new queries over keys and values of all tokens so far, [b, capacity, g, d].
    pub(super) fn attend_kept(&self, chip: &Chip, [q, k, v]: [Sharded; 3], past: &Past) -> Sharded {
        let op = ops::Attention {
            causal: true,
            offsets: Some(past.starts.clone()),
            ..Default::default()
        };
        chip.apply_one(op, &[&q, &k, &v])
    }
}
