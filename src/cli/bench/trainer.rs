//! A model in training on one batch of random tokens, as what is timed. `benches/burn` times it too.

use supernode::DType;
use supernode::model::{Config, Transformer};
use supernode::random::Stream;
use supernode::spmd::Chip;
use supernode::train::{AdamW, Optimizer};

/// Tokens and labels of so many sequences of so many tokens, below `vocab`.
pub(crate) fn random_tokens(shape: [usize; 2], vocab: usize) -> [Vec<u32>; 2] {
    ["tokens", "labels"].map(|name| {
        let stream = Stream::new(0, name);
        let count = (shape[0] * shape[1]) as u64;
        let token = |i| stream.below(i, vocab as u64) as u32;
        (0..count).map(token).collect()
    })
}

/// The model, its optimizer, and the batch that it learns from again and again.
pub(crate) struct Trainer<'a> {
    chip: &'a Chip,
    model: Transformer,
    optimizer: Optimizer,
    shape: [usize; 2],
    tokens: Vec<u32>,
    labels: Vec<u32>,
    steps: u64,
}

impl<'a> Trainer<'a> {
    /// A model with first weights, and [`random_tokens`] of this shape: sequences, tokens of each.
    pub(crate) fn new(chip: &'a Chip, config: Config, dtype: DType, shape: [usize; 2]) -> Self {
        let [tokens, labels] = random_tokens(shape, config.vocab);
        let model = Transformer::new(config, chip.mesh()).unwrap_or_else(|e| chip.fail(e));
        let options = AdamW {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            clip: None,
        };
        Trainer {
            chip,
            model: model.with_dtype(dtype),
            optimizer: Optimizer::new(options, 0),
            shape,
            tokens,
            labels,
            steps: 0,
        }
    }

    /// One step: the mean loss before the update, read when all of it is done.
    pub(crate) fn step(&mut self) -> f64 {
        self.steps += 1;
        let (chip, model) = (self.chip, &self.model);
        let loss = chip.step(self.steps, || {
            let loss = chip.record(|| {
                let placement = Transformer::batch_placement(chip);
                let tokens = chip.input("tokens", self.shape, placement.clone(), &self.tokens);
                let labels = chip.input("labels", self.shape, placement, &self.labels);
                let losses = chip.scope("forward", || model.losses(chip, &tokens, &labels));
                losses.sum().scale(1.0 / self.labels.len() as f32)
            });
            loss.backward();
            let loss = loss.detach();
            self.optimizer.step(chip, 3e-4);
            loss
        });
        let loss = loss.read().expect("a real chip has contents");
        f64::from(*loss.first().expect("a scalar has one element"))
    }
}
