//! Inference: a text that grows. Prefill runs the prompts at once, decoding one token of each sequence; keys and values of
//! earlier tokens are in the chip's cache (see [`Chip::cached`]), so a token costs its own products and attention over what
//! came before.
//!
//! | axis | prefill | decoding | cache |
//! |---|---|---|---|
//! | dp, fsdp | own sequences | own sequences | of own sequences |
//! | ep | own sequences, exchanged for own experts; if there are too few, all sequences, and own experts alone | the same | as dp |
//! | tp | own heads | own heads | of own heads |
//! | cp | own tokens, attention as in training | all of it but attention, which is over own tokens | of own tokens |
//! | pp | own blocks, tokens pass through the stages | the same | of own blocks |
//!
//! Over cp a prompt's tokens stay in the cache where prefill computed them, and new ones go to the chips in turn, so that all
//! keep on reading alike much.
//!
//! Sums run in the orders of the whole forward, so logits are those of the whole text, bit for bit wherever the kernels keep
//! one order for any number of queries, and but for cp, which merges parts of each softmax, and for latents, which new tokens
//! attend to as they are (see `absorbed`; [`Transformer::with_absorbed_latents`] decides).

use super::Transformer;
use super::documents::by_tokens;
use crate::dtype::DType;
use crate::ops;
use crate::placement::Placement::{Replicate, Shard};
use crate::placement::{Placements, TokenOrder, cut, split};
use crate::spmd::{Chip, Contents, FromIndex, InOrder, Sharded};
use std::ops::Range;
use std::sync::Arc;

/// The mesh axis of stages.
const STAGES: &str = "pp";

/// What came before the tokens of a forward.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Past {
    /// Position of the first token of each sequence, \[b\]: so many tokens of it are in the cache.
    pub starts: Arc<[usize]>,
    /// Tokens of each sequence that the first forward had, \[b\]: its prompt, without what fills it up to the longest.
    pub prompts: Arc<[usize]>,
    /// Tokens that the cache has room for, of each sequence.
    pub capacity: usize,
}

impl Past {
    /// True for the first forward, which reads the prompts.
    pub(super) fn is_empty(&self) -> bool {
        self.starts.iter().all(|&s| s == 0)
    }

    /// True if the tokens of this forward are split over cp: prompts of several tokens.
    fn splits(&self) -> bool {
        self.is_empty() && self.prompt() > 1
    }

    /// Tokens of the longest prompt.
    pub(super) fn prompt(&self) -> usize {
        self.prompts.iter().copied().max().unwrap_or(0)
    }

    /// Slots that each of `chips` chips keeps when they share the tokens.
    fn share(&self, chips: usize) -> usize {
        let later = self.capacity.saturating_sub(self.prompt());
        self.prompt().div_ceil(chips) + later.div_ceil(chips)
    }

    /// How many tokens behind the prompts this forward's is, the first being 0.
    fn step(&self) -> usize {
        let mut steps = self.starts.iter().zip(&*self.prompts).map(|(s, p)| s - p);
        let first = steps.next().unwrap_or(0);
        assert!(
            steps.all(|s| s == first),
            "sequences over cp grow by a token each at a time, from prompts of {:?} to {:?} they did not",
            self.prompts,
            self.starts
        );
        first
    }

    /// Whether token j of this forward sees slot s of this chip's part of sequence b's cache, as a function of b, s and j; `order`
    /// is that of a prompt's tokens over cp.
    pub(super) fn sight(
        &self,
        chip: &Chip,
        order: TokenOrder,
    ) -> impl Fn(usize, usize, usize) -> bool + use<> {
        let (past, chips) = (self.clone(), chip.size_of("cp"));
        let (here, used) = match chips {
            1 => (0, 0),
            _ => {
                let here = chip.coordinate("cp");
                (here, self.used(chips, here))
            }
        };
        let prompt = split(self.prompt(), chips, here);
        let positions = match chips {
            1 => Vec::new(),
            _ => order.positions(prompt),
        };
        move |b, s, j| match chips {
            1 => s <= past.starts[b] + j,
            // Behind the prompt's slots all that are taken are seen; among these not what fills up a shorter prompt.
            _ => s < used && positions.get(s).is_none_or(|p| *p < past.prompts[b]),
        }
    }

    /// Slots of a chip that are taken when this forward's token is kept.
    fn used(&self, chips: usize, chip: usize) -> usize {
        split(self.prompt(), chips, chip).len() + (self.step() + chips - chip) / chips
    }
}

/// Blocks that one stage of a pipeline runs one behind the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The stage, by its index along pp.
    pub stage: usize,
    /// The blocks.
    pub layers: Range<usize>,
}

impl Transformer {
    /// Placement of token numbers [b, n] that come behind `past`: sequences split over dp, fsdp and ep, as far as there is
    /// one for every chip; prompts also over cp, by tokens.
    pub fn prompt_placement(chip: &Chip, past: &Past) -> Placements {
        let mut left = past.starts.len();
        let mut named = Vec::new();
        for axis in ["dp", "fsdp", "ep"] {
            let along = chip.mesh().axis(axis);
            let pieces = along.map(|a| (0..a.size()).map(|i| cut(left, a, i).len()));
            match pieces.and_then(Iterator::min) {
                Some(0) | None => {}
                Some(least) => {
                    left = least;
                    named.push((axis, Shard(0)));
                }
            }
        }
        if past.splits() {
            named.push(("cp", Shard(1)));
        }
        chip.placed(&named)
    }

    /// Token numbers [b, n], given in the order of the text, as [`Transformer::next_logits`] takes them.
    #[track_caller]
    pub fn prompts<C: Contents + ?Sized>(
        &self,
        chip: &Chip,
        shape: [usize; 2],
        past: &Past,
        contents: &C,
    ) -> Sharded {
        let placed = Self::prompt_placement(chip, past);
        match past.splits() {
            true => {
                let order = self.token_order(chip.mesh(), shape[1]);
                chip.input("prompts", shape, placed, &InOrder(contents, order))
            }
            false => chip.input("prompts", shape, placed, contents),
        }
    }

    /// Logits [b, 1, v padded] behind token `last[b]` of each sequence, in f32 on the chips of every stage, from token numbers
    /// [b, n] that continue what `past` says is in the cache: see [`Transformer::prompts`]. Tokens of a sequence behind its
    /// last one are padding: they may be anything, and the sequence's next tokens do not see them. `parts` are all blocks in
    /// order; one part on one stage if pp does not split them.
    ///
    /// # Panics
    /// While recording, or beyond the cache's capacity. Over cp, if a forward behind the first has more than a token of each
    /// sequence.
    #[track_caller]
    pub fn next_logits(
        &self,
        chip: &Chip,
        tokens: &Sharded,
        parts: &[Part],
        past: &Past,
        last: &[usize],
    ) -> Sharded {
        assert!(
            chip.size_of("cp") == 1 || past.is_empty() || tokens.shape()[1] == 1,
            "behind their prompts sequences over cp go on by a token at a time, not by {:?}",
            tokens
        );
        let model = Transformer {
            past: Some(past.clone()),
            draw: None,
            recompute: false,
            sequence_parallel: false,
            documents: None,
            ..self.clone()
        };
        let logits = model.through(chip, tokens, parts, last);
        if chip.size_of(STAGES) == 1 {
            return logits.expect("the only stage has the last part");
        }
        let end = parts.last().map_or(0, |part| part.stage);
        let logits = logits.unwrap_or_else(|| model.untold(chip, tokens));
        chip.broadcast(&logits, STAGES, end)
    }

    /// The logits, on the stage that has the last part: what this chip's parts make of the tokens.
    fn through(
        &self,
        chip: &Chip,
        tokens: &Sharded,
        parts: &[Part],
        last: &[usize],
    ) -> Option<Sharded> {
        let here = chip.coordinate(STAGES);
        let offset = |stage: usize| stage as isize - here as isize;
        let mut held: Option<Sharded> = None;
        for (i, part) in parts.iter().enumerate().filter(|(_, p)| p.stage == here) {
            let before = i.checked_sub(1).map(|i| parts[i].stage);
            let x = match (held.take(), before) {
                (Some(x), _) => x,
                (None, None) => self.embed(chip, tokens),
                (None, Some(stage)) => {
                    let shape = [tokens.shape(), &[self.config.hidden]].concat();
                    let ty = (&shape[..], self.dtype, tokens.placements());
                    chip.receive_tagged(ty, STAGES, offset(stage), i as u64)
                }
            };
            let x = self.blocks(chip, part.layers.clone(), x);
            match parts.get(i + 1) {
                None => return Some(self.last_logits(chip, x, last)),
                Some(next) if next.stage == here => held = Some(x),
                Some(next) => {
                    let (to, tag) = (offset(next.stage), i as u64 + 1);
                    chip.start_send(&x, STAGES, to, tag).wait();
                }
            }
        }
        None
    }

    /// Logits [b, 1, v padded] in f32 of one token of each sequence, from the residual stream behind the last block.
    fn last_logits(&self, chip: &Chip, x: Sharded, last: &[usize]) -> Sharded {
        let places = self.places(chip, &x);
        let place = |t: &usize| places.as_ref().map_or(*t, |places| places[*t] as usize);
        let tokens: Vec<usize> = last.iter().map(place).collect();
        let x = match self.splits_tokens(chip, &x) {
            true => {
                let cp = chip.mesh().axis_index("cp");
                x.redistribute(x.placements().with(cp, Replicate))
            }
            false => x,
        };
        let pick = ops::PickToken {
            tokens: tokens.into(),
        };
        let x = chip.apply_one(pick, &[&x]);
        self.head(chip, &x).cast(DType::F32)
    }

    /// Where a stage without the head takes the logits that it is told.
    fn untold(&self, chip: &Chip, tokens: &Sharded) -> Sharded {
        let mut placed = tokens.placements().clone();
        for (axis, p) in [("cp", Replicate), ("tp", Shard(2))] {
            if chip.size_of(axis) > 1 {
                placed = placed.with(chip.mesh().axis_index(axis), p);
            }
        }
        let shape = [tokens.shape()[0], 1, self.padded_vocab(chip)];
        chip.input("untold", shape, placed, &FromIndex(|_| 0f32))
    }

    /// Where the tokens of x [b, t, ..] stand, for rotary positions.
    pub(super) fn rotary_positions(&self, chip: &Chip, x: &Sharded) -> ops::RotaryPositions {
        if let Some(documents) = &self.documents {
            let kept = documents.kept(self.order_of(chip, x));
            return ops::RotaryPositions::Each(kept.into());
        }
        match &self.past {
            Some(past) if !self.splits_tokens(chip, x) => {
                ops::RotaryPositions::From(past.starts.clone())
            }
            _ => ops::RotaryPositions::Alike {
                offset: 0,
                order: self.order_of(chip, x),
            },
        }
    }

    /// Position of each token of a batch like `tokens` [b, t]: of one row if all are alike, else of all rows.
    pub(super) fn positions(&self, chip: &Chip, tokens: &Sharded) -> Vec<u32> {
        let t = tokens.shape()[1];
        let narrow = |p: usize| p as u32;
        if let Some(documents) = &self.documents {
            return documents.kept(self.order_of(chip, tokens));
        }
        match &self.past {
            Some(past) if !self.splits_tokens(chip, tokens) => {
                let rows = past.starts.iter().flat_map(|&start| start..start + t);
                rows.map(narrow).collect()
            }
            _ => {
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
        let kept_k = self.kept(chip, &format!("{name}.k"), &k, past);
        let kept_v = self.kept(chip, &format!("{name}.v"), &v, past);
        if self.attends_now(chip) {
            return self.attend_now(chip, [q, k, v]);
        }
        drop((k, v));
        self.attend_kept(chip, [q, kept_k, kept_v], past)
    }

    /// True if a forward attends over its own keys alone: without a cache, and for prompts over cp, whose attention is that of
    /// training.
    pub(super) fn attends_now(&self, chip: &Chip) -> bool {
        let shared = chip.size_of("cp") > 1;
        self.past
            .as_ref()
            .is_none_or(|past| shared && past.is_empty())
    }

    /// What is kept under `name` of all tokens so far, x of the new ones included: [b, capacity, ..], split by tokens over cp.
    pub(super) fn kept(&self, chip: &Chip, name: &str, x: &Sharded, past: &Past) -> Sharded {
        let chips = chip.size_of("cp");
        if chips == 1 {
            return chip.cached(name, x, &past.starts, past.capacity);
        }
        let here = chip.coordinate("cp");
        // A prompt of a single token is the last chip's, as `used` counts it.
        let at = match (past.is_empty(), past.splits()) {
            (true, splits) => (splits || here + 1 == chips).then_some(0),
            (false, _) => (past.step() % chips == here).then(|| past.used(chips, here) - 1),
        };
        chip.cached_share(name, x, "cp", at, past.share(chips))
    }

    /// Attention of new queries over keys and values of all tokens so far, [b, capacity, g, d].
    pub(super) fn attend_kept(&self, chip: &Chip, [q, k, v]: [Sharded; 3], past: &Past) -> Sharded {
        let chips = chip.size_of("cp");
        if chips == 1 {
            let op = ops::Attention {
                causal: true,
                offsets: Some(past.starts.clone()),
                ..Default::default()
            };
            return chip.apply_one(op, &[&q, &k, &v]);
        }
        let used = past.used(chips, chip.coordinate("cp"));
        let documents = self.shown(chip, &q, &k, past);
        let op = ops::Attention {
            documents: documents.is_some(),
            ..Default::default()
        };
        let mut operands = vec![&q, &k, &v];
        operands.extend(documents.iter().flatten());
        chip.attention_over_shares(&op, &operands, "cp", used)
    }

    /// Documents of queries [b, t, ..] and of keys [b, s, ..] shared over cp that hide what fills up shorter prompts; none if
    /// all prompts are as long.
    fn shown(&self, chip: &Chip, q: &Sharded, k: &Sharded, past: &Past) -> Option<[Sharded; 2]> {
        let prompt = past.prompt();
        if past.prompts.iter().all(|&n| n == prompt) {
            return None;
        }
        let chips = chip.size_of("cp");
        let share = past.share(chips);
        let order = self.token_order(chip.mesh(), prompt);
        // The position of the prompt's token in each slot of all chips; none behind the prompt's.
        let slots = (0..chips).flat_map(|i| {
            let mut positions = order.positions(split(prompt, chips, i)).into_iter();
            (0..share).map(move |_| positions.next())
        });
        let slots: Vec<Option<usize>> = slots.collect();
        let row = |&n: &usize| {
            let shown = slots
                .iter()
                .map(move |p| u32::from(p.is_none_or(|p| p < n)));
            shown.collect::<Vec<u32>>()
        };
        let keys: Vec<u32> = past.prompts.iter().flat_map(row).collect();
        let queries = vec![1; q.shape()[0] * q.shape()[1]];
        Some([
            chip.input("shown to", &q.shape()[..2], by_tokens(q), &queries),
            chip.input("shown", &k.shape()[..2], by_tokens(k), &keys),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_of_a_share_are_taken_one_by_one_and_suffice() {
        for chips in 1..6 {
            for prompt in 1..12 {
                for capacity in prompt..24 {
                    let at = |step: usize| Past {
                        starts: [prompt + step, 1 + step].into(),
                        prompts: [prompt, 1].into(),
                        capacity,
                    };
                    let prefilled = |chip| split(prompt, chips, chip).len();
                    let mut taken: Vec<usize> = (0..chips).map(prefilled).collect();
                    for step in 0..capacity - prompt {
                        let past = at(step);
                        taken[past.step() % chips] += 1;
                        let used: Vec<usize> = (0..chips).map(|c| past.used(chips, c)).collect();
                        assert_eq!(used, taken, "{chips} chips, {prompt} and {step}");
                        assert!(used.iter().all(|&n| n <= past.share(chips)));
                    }
                }
            }
        }
    }
}
