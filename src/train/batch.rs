//! A step's batch as contents of a chip's inputs: each chip fills only the rows that it holds.

use super::data::Batches;
use crate::dtype::DType;
use crate::model::Documents;
use crate::ops::Local;
use crate::spmd::Contents;
use crate::tensor::Tensor;

/// Which rows.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rows {
    /// Rows from `first` on of the batch of `step`, counted from 0.
    Training { step: u64, first: usize },
    /// Windows from `first` on of the validation split.
    Validation { first: usize },
}

/// Tokens, or the labels one further on, of some rows: [b, t] in u32.
pub(super) struct Half<'a> {
    pub batches: &'a Batches,
    pub rows: Rows,
    pub labels: bool,
}

impl Contents for Half<'_> {
    fn dtype(&self) -> DType {
        DType::U32
    }

    fn copy_share(&self, local: &Local, to: &mut Tensor) -> Result<(), String> {
        let (begin, count) = (local.start[0], local.ty.shape[0]);
        let (whole, held) = (local.global[1], local.ty.shape[1]);
        // Rows are drawn whole; a chip that holds some of a row's tokens keeps those.
        let mut tokens = vec![0u32; count * whole];
        let mut labels = vec![0u32; count * whole];
        self.draw(begin, count, &mut tokens, &mut labels);
        let rows = if self.labels { labels } else { tokens };
        let to = to.slice_mut().typed::<u32>();
        for (to, row) in to
            .chunks_exact_mut(held.max(1))
            .zip(rows.chunks_exact(whole))
        {
            to.copy_from_slice(&row[local.start[1]..][..held]);
        }
        Ok(())
    }
}

impl Half<'_> {
    /// The documents of the first `count` of these rows, if rows hold several.
    pub(super) fn documents(&self, count: usize) -> Option<Documents> {
        self.batches.separator()?;
        let all = count * self.batches.context();
        let (mut tokens, mut labels) = (vec![0; all], vec![0; all]);
        self.draw(0, count, &mut tokens, &mut labels);
        self.batches.documents(&tokens)
    }

    fn draw(&self, begin: usize, count: usize, tokens: &mut [u32], labels: &mut [u32]) {
        match self.rows {
            Rows::Training { step, first } => {
                self.batches
                    .fill(step, first + begin..first + begin + count, tokens, labels);
            }
            Rows::Validation { first } => {
                self.batches
                    .fill_validation(first + begin..first + begin + count, tokens, labels);
            }
        }
    }
}
