//! Sampling text: the whole context runs again for every token. A cache of keys and values belongs to inference.

use super::data::Sampler;
use super::stages::Stages;
use super::trainer::Training;
use crate::spmd::Chip;

impl Training {
    /// Tokens that the model continues the validation split's first token with. Every chip draws the same ones.
    pub(super) fn sample(&self, chip: &Chip, stages: &Stages) -> Vec<u32> {
        let config = self.model.config();
        let draw = Sampler::new(chip.seed(), self.options.temperature, None)
            .unwrap_or_else(|e| chip.fail(e));
        let start = self
            .batches
            .split()
            .validation
            .start
            .min(self.batches.tokens().len() - 1);
        let mut text = vec![0u32; 1];
        self.batches.tokens().copy(start, &mut text);
        for position in 0..self.options.sample {
            let from = text.len().saturating_sub(config.context);
            let window = &text[from..];
            let tokens = chip.input("prompt", [1, window.len()], chip.replicated(), window);
            let logits = stages.logits(self, chip, &tokens);
            let Some(logits) = logits.read() else { break };
            let last = logits.index_axis(ndarray::Axis(1), window.len() - 1);
            let last: Vec<f32> = last.iter().copied().take(config.vocab).collect();
            text.push(
                draw.draw(position as u64, &last)
                    .unwrap_or_else(|e| chip.fail(e)),
            );
        }
        text
    }
}
