//! The validation loss: the mean over all labels of all windows of the validation split.

use super::stages::Stages;
use super::trainer::{Training, number_of};
use crate::spmd::Chip;

impl Training {
    /// The validation loss; none if the validation split is empty. Windows go in batches as large as training's; windows
    /// beyond the last have no labels and add nothing.
    pub(super) fn evaluate(&self, chip: &Chip, stages: &Stages) -> Option<f64> {
        let (windows, rows) = (self.batches.validation_windows(), self.batches.rows());
        let mut sum = 0.0;
        // The running sum stays in f64 here: a long split in f32 would lose digits.
        for first in (0..windows).step_by(rows) {
            sum += number_of(&stages.validate(self, chip, first));
        }
        (windows > 0).then(|| sum / self.batches.validation_labels() as f64)
    }
}
