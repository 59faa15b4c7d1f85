//! In which order a tensor keeps the tokens of a sequence that several chips share.

use super::split;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// In which order the tokens of a sequence are kept along a tensor's token dimension.
///
/// Under a causal mask late tokens see more keys than early ones, so chips that hold neighbouring runs of tokens have unequal
/// work: of P chips the last computes 2P - 1 parts where the mean is P. In zigzag order chip r holds block r and block
/// 2P - 1 - r of 2P blocks, and all compute alike (Megatron-LM and zhuzilin's ring attention name it so).
///
/// An order is a permutation of the whole sequence, cut by [`split`] as any other dimension is: lengths that 2P does not divide
/// need no padding. The chip of index r holds `n = split(t, P, r).len()` tokens, of which the first `ceil(n / 2)` are its early
/// block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenOrder {
    /// As they follow each other in the text.
    #[default]
    Ascending,
    /// An early and a late block for each of so many chips.
    ZigZag {
        /// Tokens of the sequence, t.
        tokens: usize,
        /// Chips that share it, P.
        chips: usize,
    },
}

/// Tokens that follow each other in the text and are kept one behind the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenRun {
    /// Position in the text of the first.
    pub position: usize,
    /// How many.
    pub len: usize,
}

impl TokenRun {
    /// Positions in the text.
    pub fn positions(&self) -> Range<usize> {
        self.position..self.position + self.len
    }
}

impl TokenOrder {
    /// The tokens that are kept at `kept`, as the fewest runs; positions ascend inside of a chip's share.
    ///
    /// # Panics
    /// If a zigzag of fewer tokens is asked for tokens beyond its last.
    pub fn runs(&self, kept: Range<usize>) -> Vec<TokenRun> {
        let (tokens, chips) = match *self {
            TokenOrder::Ascending => {
                let run = TokenRun {
                    position: kept.start,
                    len: kept.len(),
                };
                return if kept.is_empty() { vec![] } else { vec![run] };
            }
            TokenOrder::ZigZag { tokens, chips } => (tokens, chips),
        };
        assert!(
            kept.end <= tokens,
            "tokens {kept:?} of a sequence of {tokens} in zigzag order"
        );
        let mut runs: Vec<TokenRun> = Vec::new();
        let (mut early, mut late) = (0, tokens);
        for chip in 0..chips {
            let share = split(tokens, chips, chip);
            let first = share.len().div_ceil(2);
            let second = share.len() - first;
            late -= second;
            for (block, position) in [
                (share.start..share.start + first, early),
                (share.start + first..share.end, late),
            ] {
                let (from, to) = (block.start.max(kept.start), block.end.min(kept.end));
                if from >= to {
                    continue;
                }
                let position = position + (from - block.start);
                match runs.last_mut() {
                    Some(run) if run.position + run.len == position => run.len += to - from,
                    _ => runs.push(TokenRun {
                        position,
                        len: to - from,
                    }),
                }
            }
            early += first;
        }
        runs
    }

    /// Position in the text of each token that is kept at `kept`.
    ///
    /// # Panics
    /// As [`TokenOrder::runs`] does.
    pub fn positions(&self, kept: Range<usize>) -> Vec<usize> {
        let runs = self.runs(kept);
        runs.iter().flat_map(TokenRun::positions).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zigzag(tokens: usize, chips: usize) -> TokenOrder {
        TokenOrder::ZigZag { tokens, chips }
    }

    #[test]
    fn chip_r_holds_blocks_r_and_2p_minus_1_minus_r() {
        let order = zigzag(16, 4);
        let held = |chip: usize| order.positions(4 * chip..4 * chip + 4);
        assert_eq!(held(0), [0, 1, 14, 15]);
        assert_eq!(held(1), [2, 3, 12, 13]);
        assert_eq!(held(2), [4, 5, 10, 11]);
        assert_eq!(held(3), [6, 7, 8, 9]);
        assert_eq!(order.runs(12..16).len(), 1);
        assert_eq!(order.runs(3..5).len(), 2);
    }

    #[test]
    fn every_length_is_a_permutation_that_ascends_in_every_share() {
        for chips in 1..8 {
            for tokens in 0..40 {
                let order = zigzag(tokens, chips);
                let mut all = order.positions(0..tokens);
                for chip in 0..chips {
                    let share = order.positions(split(tokens, chips, chip));
                    assert!(share.is_sorted_by(|a, b| a < b), "{share:?}");
                    assert!(order.runs(split(tokens, chips, chip)).len() <= 2);
                }
                all.sort_unstable();
                assert_eq!(all, (0..tokens).collect::<Vec<_>>());
            }
        }
        assert_eq!(TokenOrder::Ascending.positions(3..6), [3, 4, 5]);
        assert!(TokenOrder::Ascending.runs(3..3).is_empty());
    }
}
