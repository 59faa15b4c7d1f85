//! Inference: prompts read into a cache of keys and values, and tokens written one step after another.
//!
//! `dp` and `ep` split the sequences, `tp` heads and matrices, `pp` layers, `cp` a prompt's tokens. A decoding step gives every
//! sequence one token; with `speculated` further tokens verified in the same step, of which `accepted` hold on average, it gives
//! `1 + accepted`. Sequences of a chip may be computed in micro-batches, one after the other; over `pp` they fill the pipeline.
//! Weights lie in the type of matmuls, the cache in 2-byte elements.

use super::interval::{self, Slower};
use super::kernel::element_bytes;
use super::memory::Memory;
use super::program::Shape;
use super::step::{Prices, Setting, Span};
use super::work::Work;
use crate::cluster::Machine;
use crate::error::{Error, ErrorKind, Result};
use std::collections::BTreeMap;

/// What inference computes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Phase {
    /// All tokens of the prompts at once.
    Prefill,
    /// A step that gives every sequence its next token.
    Decode {
        /// Further tokens that a step verifies.
        speculated: usize,
        /// How many of them hold.
        accepted: f64,
    },
}

/// What a step of inference costs.
#[derive(Clone, Debug)]
pub struct Served {
    /// Seconds from the step's begin to its end.
    pub step_seconds: f64,
    /// Tokens that the step reads (prefill) or gives (decode), over all sequences.
    pub tokens: f64,
    /// Seconds between two tokens of a sequence; nothing for a prefill.
    pub token_seconds: Option<f64>,
    /// Seconds of the busiest stage's kernels, by kernel.
    pub compute_seconds: BTreeMap<&'static str, f64>,
    /// Seconds in which it waits for the network, by axis.
    pub exposed: BTreeMap<String, f64>,
    /// Seconds in which it waits for other stages.
    pub bubble_seconds: f64,
    /// Operations of the model.
    pub model_flops: f64,
    /// Operations a second of all chips' matrix units.
    pub peak: f64,
    /// Bytes on the fullest chip.
    pub memory: Memory,
}

impl Setting {
    /// Prices a step of inference; global batch and context are the sequences and the tokens that each has (decode) or brings (prefill).
    ///
    /// # Errors
    /// As [`Setting::price`].
    pub fn serve(&self, phase: Phase, machine: &Machine) -> Result<Served> {
        self.served(phase, machine, Slower::NOTHING)
    }

    /// As [`Setting::interval`].
    ///
    /// # Errors
    /// As [`Setting::price`].
    pub fn serve_interval(&self, phase: Phase, machine: &Machine) -> Result<(f64, f64)> {
        let step = self.served(phase, machine, Slower::NOTHING)?.step_seconds;
        interval::around(machine, step, |slower| {
            Ok(self.served(phase, machine, slower)?.step_seconds)
        })
    }

    fn check_inference(&self) -> Result<()> {
        let experts = self.model.mixture.map_or(1, |m| m.experts);
        // Chips beyond the number of experts hold copies of them.
        let copies = Setting {
            mesh: self.mesh.clone(),
            model: super::Architecture {
                mixture: self.model.mixture.map(|m| super::Mixture {
                    experts: experts.next_multiple_of(self.along("ep").max(1)),
                    ..m
                }),
                ..self.model.clone()
            },
            ..self.clone()
        };
        copies.check()
    }

    fn served(&self, phase: Phase, machine: &Machine, slower: Slower) -> Result<Served> {
        self.check_inference()?;
        let mut prices = self.prices(machine)?;
        if let Some(replay) = machine.stack.find("stack.replay") {
            prices.rates.launch = replay;
        }
        let prices = prices.slowed(slower);
        prices.network.fits(self.mesh.chips())?;
        let inner = Shape {
            dropout: false,
            fused: true,
            ..self.shape(machine)
        };
        let (fresh, per_sequence) = match phase {
            Phase::Prefill => (self.context, self.context as f64),
            Phase::Decode {
                speculated,
                accepted,
            } => {
                if self.along("cp") > 1 {
                    let why = "decoding splits no tokens over cp; use dp, tp, ep or pp";
                    return Err(Error::new(ErrorKind::Mesh, why));
                }
                if !(0.0..=speculated as f64).contains(&accepted) {
                    let why = format!("{accepted} tokens accepted of {speculated} speculated");
                    return Err(Error::new(ErrorKind::Input, why));
                }
                (1 + speculated, 1.0 + accepted)
            }
        };
        let shape = Shape {
            context: fresh,
            ..inner
        };
        let stages = self.stages(phase, &prices, &shape)?;
        let message = self.between(&prices, &shape)?;
        let (pp, micros) = (self.along("pp"), self.micros());
        let busiest = stages
            .into_iter()
            .reduce(|a, b| if b.seconds > a.seconds { b } else { a });
        let mut all = Span::default();
        all.add(&busiest.expect("a pipeline has a stage"), micros as f64);
        let rounds = match phase {
            // The last prompt leaves the last stage.
            Phase::Prefill => micros + pp - 1,
            // A sequence's next token starts where its last one came out.
            Phase::Decode { .. } => micros.max(pp),
        };
        if pp > 1 {
            all.wait("pp", message * micros as f64);
        }
        let each = all.seconds / micros as f64;
        let step = each * rounds as f64 * (1.0 + self.straggling(machine)?);
        let step_seconds = step + machine.stack.find("stack.step").unwrap_or(0.0);
        let tokens = self.global_batch as f64 * per_sequence;
        let computed = (self.global_batch * fresh) as f64;
        // Decoded tokens see the whole cache, a prompt's half of each other.
        let causal = matches!(phase, Phase::Prefill);
        Ok(Served {
            step_seconds,
            tokens,
            token_seconds: (!causal).then_some(step_seconds / per_sequence),
            bubble_seconds: (step - all.seconds).max(0.0),
            model_flops: computed * self.model.forward_flops(self.context, causal),
            peak: prices.rates.peak * self.mesh.chips() as f64,
            memory: self.cache_memory(machine)?,
            compute_seconds: all.kernels,
            exposed: all.exposed,
        })
    }

    /// One micro-batch on each stage.
    fn stages(&self, phase: Phase, prices: &Prices<'_>, shape: &Shape<'_>) -> Result<Vec<Span>> {
        let layers = self.layers()?;
        let past = match phase {
            Phase::Prefill => 0,
            Phase::Decode { .. } => self.context,
        };
        let rows = match phase {
            Phase::Prefill => self.micro_batch,
            Phase::Decode { .. } => shape.tokens(),
        };
        let last = self.last_stage();
        let stage = |(s, chunks): (usize, &Vec<super::step::Counts>)| {
            let mut span = Span::default();
            for (block, count) in chunks.iter().flat_map(|c| c.each()) {
                // A prompt is not predicted from.
                let skipped = block == super::Block::Predict && past == 0;
                if count == 0 || skipped {
                    continue;
                }
                let tasks = match phase {
                    Phase::Prefill => shape.forward(block),
                    Phase::Decode { .. } => shape.cached(block, past),
                };
                span.add(&prices.span(&tasks)?, count as f64);
            }
            if s == 0 {
                span.add(&prices.span(&shape.embedding())?, 1.0);
            }
            if s == last {
                let heads = match phase {
                    Phase::Decode { speculated, .. } if speculated > 0 => 1 + self.model.predicted,
                    _ => 1,
                };
                span.add(&prices.span(&shape.logits(rows))?, heads as f64);
            }
            Ok(span)
        };
        layers.iter().enumerate().map(stage).collect()
    }

    fn between(&self, prices: &Prices<'_>, shape: &Shape<'_>) -> Result<f64> {
        let bytes = 2.0 * (shape.tokens() * self.model.hidden) as f64 / self.along("tp") as f64;
        let axis = "pp".into();
        let message = Work::Message { axis, bytes };
        prices.network.seconds(&self.mesh, &message)
    }

    /// Weights and the cache of all sequences on the fullest chip, and room for one micro-batch.
    fn cache_memory(&self, machine: &Machine) -> Result<Memory> {
        let layers = self.layers()?;
        let (dense, experts) = self.most_parameters(&layers);
        let m = &self.model;
        let most =
            |chunks: &Vec<super::step::Counts>| chunks.iter().map(|c| c.sum()).sum::<usize>();
        let held = layers.iter().map(most).max().unwrap_or(0) as f64;
        let tp = self.along("tp");
        let share = match m.latent {
            Some(_) => 1.0,
            None => 1.0 / tp.min(m.kv_heads) as f64,
        };
        let tokens = self.global_batch as f64 / self.data() as f64 * self.context as f64
            / self.along("cp") as f64;
        let lost = machine.stack.value("stack.allocator")?;
        let mut memory = Memory {
            parameters: element_bytes(&self.dtype) * (dense + experts),
            cache: 2.0 * tokens * m.cache_width() as f64 * share * held,
            logits: 4.0 * (self.micro_batch * m.vocab.div_ceil(tp)) as f64,
            ..Memory::default()
        };
        memory.allocator = lost * memory.cache;
        Ok(memory)
    }
}
