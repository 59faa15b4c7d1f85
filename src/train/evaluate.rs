//! The validation loss: the mean over all labels of all windows of the validation split.

use super::batch::Rows;
use super::trainer::{Training, number_of};
use crate::spmd::{Chip, Sharded};

impl Training {
    /// The validation loss; none if the validation split is empty. Windows go in batches as large as training's; windows
    /// beyond the last have no labels and add nothing.
    pub(super) fn evaluate(&self, chip: &Chip) -> Option<f64> {
        let (windows, rows) = (self.batches.validation_windows(), self.batches.rows());
        chip.stop_recording();
        let mut sum = 0.0;
        // The running sum stays in f64 here: a long split in f32 would lose digits.
        for first in (0..windows).step_by(rows) {
            let (tokens, labels) = self.inputs(chip, Rows::Validation { first }, rows);
            let loss: Sharded = chip.scope("evaluate", || {
                self.model.losses(chip, &tokens, &labels).sum().gather()
            });
            sum += number_of(&loss);
        }
        (windows > 0).then(|| sum / self.batches.validation_labels() as f64)
    }
}
