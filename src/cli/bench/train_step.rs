//! A training step: forward, backward and AdamW on one chip, without clipping or dropout, on random tokens.

use super::measure::{Demand, Measured, measure};
use super::trainer::Trainer;
use serde::Deserialize;
use std::fmt;
use std::num::NonZeroUsize;
use std::time::Duration;
use supernode::DType;
use supernode::model::Config;
use supernode::spmd::Chip;

/// A model with a name: GPT-2's architecture, with biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum Model {
    /// 12 layers, 768 wide, 12 heads, 50,257 tokens in the vocabulary, 1024 in a sequence.
    #[serde(rename = "gpt2-124m")]
    Gpt2124m,
    /// 6 layers, 384 wide, 6 heads, 256 tokens in the vocabulary and in a sequence.
    #[serde(rename = "char-6x384")]
    Char6x384,
}

impl Model {
    fn name(self) -> &'static str {
        match self {
            Model::Gpt2124m => "gpt2-124m",
            Model::Char6x384 => "char-6x384",
        }
    }

    fn config(self) -> Config {
        match self {
            Model::Gpt2124m => Config::gpt2(12, 768, 12, 50_257, 1024),
            Model::Char6x384 => Config::gpt2(6, 384, 6, 256, 256),
        }
    }
}

/// A model, and how many sequences of how many tokens it learns from in a step.
#[derive(Debug, Deserialize)]
pub(super) struct Step {
    model: Model,
    batch: NonZeroUsize,
    tokens: NonZeroUsize,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} B{} T{}", self.model.name(), self.batch, self.tokens)
    }
}

impl Step {
    /// A sentence if the case cannot be run.
    pub(super) fn check(&self, dtype: DType) -> Result<(), String> {
        let (name, context) = (self.model.name(), self.model.config().context);
        if self.tokens.get() > context {
            let tokens = self.tokens;
            return Err(format!(
                "{tokens} tokens are more than the {context} of {name}'s context"
            ));
        }
        if dtype == DType::F16 {
            return Err(format!(
                "a training step computes in f32 or bf16, not in {dtype}"
            ));
        }
        match self
            .batch
            .get()
            .checked_mul(context * self.model.config().vocab)
        {
            Some(elements) if elements <= isize::MAX as usize / 8 => Ok(()),
            _ => Err(format!("{self} is too large for this machine's addresses")),
        }
    }

    /// `6 N + 6 L C T` a token: N parameters without the positions', whose rows are only looked up, and attention's products
    /// over half of all pairs.
    fn flops(&self, config: &Config) -> f64 {
        let parameters = config.parameters() as f64 - (config.context * config.hidden) as f64;
        let tokens = (self.batch.get() * self.tokens.get()) as f64;
        let pairs = (config.layers * config.hidden * self.tokens.get()) as f64;
        tokens * (6.0 * parameters + 6.0 * pairs)
    }

    pub(super) fn run(&self, chip: &Chip, dtype: DType) -> Measured {
        let config = self.model.config();
        let demand = Demand {
            flops: self.flops(&config),
            // Parameters and the optimizer's two means, each read and written once.
            reads: 12 * config.parameters(),
            writes: 12 * config.parameters(),
            dtype,
            // Steps are long; a second would hold one or none.
            budget: Duration::from_secs(3),
        };
        let vocab = config.vocab;
        let shape = [self.batch.get(), self.tokens.get()];
        let mut trainer = Trainer::new(chip, config, dtype, shape);
        let first = trainer.step();
        // Nothing was learnt: all tokens are about equally likely.
        let even = (vocab as f64).ln();
        assert!(
            (first - even).abs() <= 1.0,
            "the loss of the first step of {self} is {first}; new weights give about {even:.2}"
        );
        let mut last = first;
        let measured = measure(chip, &demand, || last = trainer.step());
        assert!(
            last < first,
            "the same batch again and again: the loss of {self} went from {first} to {last}"
        );
        measured
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flops_are_those_of_the_literature() {
        let step = |model, batch, tokens| Step {
            model,
            batch: NonZeroUsize::new(batch).unwrap(),
            tokens: NonZeroUsize::new(tokens).unwrap(),
        };
        let config = Model::Gpt2124m.config();
        assert_eq!(config.parameters(), 124_439_808);
        // 124,439,808 less 1024 positions of 768.
        let want = 1024.0 * 6.0 * (123_653_376.0 + 12.0 * 768.0 * 1024.0);
        assert_eq!(step(Model::Gpt2124m, 1, 1024).flops(&config), want);
        let config = Model::Char6x384.config();
        let small = step(Model::Char6x384, 16, 128).flops(&config);
        assert!(small < step(Model::Char6x384, 8, 256).flops(&config));
    }
}
