//! A step's batch as contents of a chip's inputs: each chip fills only the rows that it holds.

use super::data::Batches;
use crate::dtype::DType;
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
        if local.ty.shape[1] != local.global[1] {
            return Err(format!(
                "rows are not split: the share is {} of {:?}",
                local.ty, local.global
            ));
        }
        let to = to.slice_mut().typed::<u32>();
        let mut other = vec![0u32; to.len()];
        let (tokens, labels) = if self.labels {
            (&mut other[..], to)
        } else {
            (to, &mut other[..])
        };
        let (begin, count) = (local.start[0], local.ty.shape[0]);
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
        Ok(())
    }
}
