//! Documents packed into rows: each attends to itself alone, and its positions begin at 0.

use super::Transformer;
use crate::placement::Placement::{Replicate, Shard};
use crate::placement::{Placements, TokenOrder};
use crate::spmd::{Chip, InOrder, Sharded};
use std::sync::Arc;

/// Documents in the rows of a batch [b, t], in the order of the text: the number of each token's document in its row, and the token's
/// position in its document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Documents {
    tokens: usize,
    numbers: Arc<[u32]>,
    positions: Arc<[u32]>,
}

impl Documents {
    /// Documents in rows of `tokens` tokens, from whether each token of the batch \[b t\] is the last of its document. A row's first
    /// token begins a document in any case.
    ///
    /// # Panics
    /// If `ends` are no whole rows.
    #[track_caller]
    pub fn ending_at(tokens: usize, ends: &[bool]) -> Self {
        assert!(
            tokens > 0 && ends.len().is_multiple_of(tokens),
            "{} tokens are no rows of {tokens}",
            ends.len()
        );
        let (mut numbers, mut positions) = (vec![], vec![]);
        for row in ends.chunks_exact(tokens) {
            let (mut number, mut position) = (0, 0);
            for &ends in row {
                numbers.push(number);
                positions.push(position);
                (number, position) = match ends {
                    true => (number + 1, 0),
                    false => (number, position + 1),
                };
            }
        }
        Documents {
            tokens,
            numbers: numbers.into(),
            positions: positions.into(),
        }
    }

    /// The number of each token's document in its row, \[b t\].
    pub fn numbers(&self) -> &[u32] {
        &self.numbers
    }

    /// Each token's position in its document, \[b t\].
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// Positions as chips keep the tokens of rows.
    pub(super) fn kept(&self, order: TokenOrder) -> Vec<u32> {
        let places = order.positions(0..self.tokens);
        let rows = self.positions.chunks_exact(self.tokens);
        rows.flat_map(|row| places.iter().map(|p| row[*p]))
            .collect()
    }
}

impl Transformer {
    /// The same model for rows that hold several documents: tokens see only their own document's, and stand where they do in it;
    /// none for rows that are one document each. Not for texts that grow.
    pub fn with_documents(mut self, documents: Option<Documents>) -> Self {
        self.documents = documents;
        self
    }

    /// The documents of queries or keys [b, t, ..], placed as these are by rows and tokens; none if rows are one each.
    pub(super) fn documents_of(&self, chip: &Chip, x: &Sharded) -> Option<Sharded> {
        let documents = self.documents.as_ref()?;
        let contents = InOrder(documents.numbers(), self.order_of(chip, x));
        Some(chip.input("documents", &x.shape()[..2], by_tokens(x), &contents))
    }
}

/// Where something for each token [b, t] lies if x [b, t, ..] does so.
pub(super) fn by_tokens(x: &Sharded) -> Placements {
    let kept = x.placements().iter().map(|p| match p {
        Shard(0 | 1) => *p,
        _ => Replicate,
    });
    kept.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_begin_at_0_in_every_document_and_row() {
        let ends = [0, 0, 1, 0, 1, 1, 0, 1, 0, 0].map(|e| e == 1);
        let documents = Documents::ending_at(5, &ends);
        assert_eq!(documents.numbers(), [0, 0, 0, 1, 1, 0, 1, 1, 2, 2]);
        assert_eq!(documents.positions(), [0, 1, 2, 0, 1, 0, 0, 1, 0, 1]);
    }

    #[test]
    fn a_zigzag_keeps_early_and_late_positions_together() {
        let documents = Documents::ending_at(8, &[false; 16]);
        let order = TokenOrder::ZigZag {
            tokens: 8,
            chips: 2,
        };
        let row = [0, 1, 6, 7, 2, 3, 4, 5];
        assert_eq!(documents.kept(order), [row, row].concat());
    }

    #[test]
    #[should_panic(expected = "7 tokens are no rows of 4")]
    fn rows_are_whole() {
        Documents::ending_at(4, &[false; 7]);
    }
}
