//! The model in this crate.

use super::CHAR_6X384;
use supernode::model::{Config, Transformer};
use supernode::spmd::Chip;
use supernode::train::{AdamW, Optimizer};

/// The model in training on one batch.
pub(crate) struct Trainer<'a> {
    chip: &'a Chip,
    model: Transformer,
    optimizer: Optimizer,
    tokens: Vec<u32>,
    labels: Vec<u32>,
    steps: u64,
}

impl<'a> Trainer<'a> {
    pub(crate) fn new(chip: &'a Chip, tokens: Vec<u32>, labels: Vec<u32>) -> Trainer<'a> {
        let [layers, width, heads, vocab, context, _] = CHAR_6X384;
        let config = Config::gpt2(layers, width, heads, vocab, context);
        let options = AdamW {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            clip: None,
        };
        Trainer {
            chip,
            model: Transformer::new(config, chip.mesh()).expect("a model"),
            optimizer: Optimizer::new(options, 0),
            tokens,
            labels,
            steps: 0,
        }
    }

    /// One step: the mean loss before the update, read when all of it is done.
    pub(crate) fn step(&mut self) -> f64 {
        self.steps += 1;
        let (chip, model) = (self.chip, &self.model);
        let [.., context, rows] = CHAR_6X384;
        let loss = chip.step(self.steps, || {
            let loss = chip.record(|| {
                let placement = Transformer::batch_placement(chip);
                let shape = [rows, context];
                let tokens = chip.input("tokens", shape, placement.clone(), &self.tokens);
                let labels = chip.input("labels", shape, placement, &self.labels);
                let losses = model.losses(chip, &tokens, &labels);
                losses.sum().scale(1.0 / self.labels.len() as f32)
            });
            loss.backward();
            let loss = loss.detach();
            self.optimizer.step(chip, 3e-4);
            loss
        });
        let read = loss.read().expect("a real chip has contents");
        f64::from(*read.first().expect("a scalar has one element"))
    }
}
