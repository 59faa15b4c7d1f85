//! A training step: stages priced from their work, replayed through the pipeline, then gradients and optimizer.

use super::kernel::Rates;
use super::memory::{self, Memory};
use super::network::Network;
use super::program::{Recompute, Shape, Task};
use super::work::{Rows, Work};
use crate::cluster::Machine;
use crate::collective::Kind;
use crate::error::{Error, ErrorKind, Result};
use crate::mesh::Mesh;
use crate::model::{Config, FeedForward};
use crate::pipeline::{Plan, Ran, Schedule, Times, layers_of_parts};
use std::collections::BTreeMap;

/// What is trained, and how it is split.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The model.
    pub config: Config,
    /// Axes `dp`, `pp`, `tp`, outermost first; chips next to each other along the last one are neighbours.
    pub mesh: Mesh,
    /// Sequences in a step.
    pub global_batch: usize,
    /// Sequences that a chip computes at a time.
    pub micro_batch: usize,
    /// Tokens of a sequence.
    pub context: usize,
    /// The order of forwards and backwards.
    pub schedule: Schedule,
    /// Chunks of layers on a stage.
    pub virtual_stages: usize,
    /// What is computed again.
    pub recompute: Recompute,
    /// What is split over dp: 1 the optimizer's state, 2 gradients too, 3 parameters too (Rajbhandari et al. 2020).
    pub zero: u8,
    /// Whether norms and dropout are split over `tp`.
    pub sequence_parallel: bool,
    /// Type of matmuls: `bf16`, `fp8`, ...
    pub dtype: String,
}

/// What a step costs.
#[derive(Clone, Debug)]
pub struct Forecast {
    /// Seconds of a step.
    pub step_seconds: f64,
    /// Seconds of the busiest stage's kernels, by kernel.
    pub compute_seconds: BTreeMap<&'static str, f64>,
    /// Seconds in which the busiest stage waits for the network, by axis.
    pub exposed: BTreeMap<String, f64>,
    /// Seconds in which the busiest stage waits for other stages.
    pub bubble_seconds: f64,
    /// Operations of the model for a step, without what is computed again: `6` for each parameter of a matmul and token, and
    /// `12 L s c` for the scores of a token, causal or not (Megatron's rule).
    pub model_flops: f64,
    /// Share of the matmul peak.
    pub mfu: f64,
    /// Tokens of a step.
    pub tokens: f64,
    /// Bytes on the fullest chip.
    pub memory: Memory,
    /// What the stages did, for a timeline.
    pub timeline: Vec<Vec<Ran>>,
}

impl Forecast {
    /// The same without what every stage did, which grows with the number of micro-batches.
    pub fn without_timeline(mut self) -> Forecast {
        self.timeline = Vec::new();
        self
    }

    /// Seconds between which the step lies with a probability of 80 %, if the chip's kernels err as they did against the curves that
    /// they were fitted to (`kernel.residual`, or 20 % where nothing was measured).
    pub fn interval(&self, machine: &Machine) -> (f64, f64) {
        let half = machine.chip.find("kernel.residual").unwrap_or(0.2);
        (
            self.step_seconds * (1.0 - half),
            self.step_seconds * (1.0 + half),
        )
    }
}

/// Seconds of a list of tasks: in all, by kernel, and waiting for each axis.
#[derive(Clone, Debug, Default)]
struct Span {
    seconds: f64,
    kernels: BTreeMap<&'static str, f64>,
    exposed: BTreeMap<String, f64>,
}

impl Span {
    fn add(&mut self, other: &Span, times: f64) {
        self.seconds += times * other.seconds;
        for (k, s) in &other.kernels {
            *self.kernels.entry(k).or_default() += times * s;
        }
        for (k, s) in &other.exposed {
            *self.exposed.entry(k.clone()).or_default() += times * s;
        }
    }

    fn wait(&mut self, axis: &str, seconds: f64) {
        self.seconds += seconds;
        if seconds > 0.0 {
            *self.exposed.entry(axis.into()).or_default() += seconds;
        }
    }
}

/// What of a micro-batch is priced.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Forward,
    Backward,
    /// The part of the backward that gives the gradients of weights.
    Weights,
}

/// Everything that prices need of a machine and a mesh.
struct Prices<'a> {
    rates: Rates,
    network: Network,
    mesh: &'a Mesh,
    overlap: Option<&'a str>,
    /// Share of the chip that a transfer takes from the kernel beside it.
    interference: f64,
}

impl Prices<'_> {
    /// Tasks one after another; a transfer beside hides behind the one kernel that follows it.
    fn span(&self, tasks: &[Task]) -> Result<Span> {
        let mut span = Span::default();
        let mut beside: Vec<(String, f64)> = vec![];
        for task in tasks {
            let moves = self.network.seconds(self.mesh, &task.work)?;
            match &task.work {
                Work::Collective { axis, .. } | Work::Message { axis, .. } => {
                    let hides = match self.overlap {
                        Some("all") => true,
                        Some("backward") => task.beside,
                        _ => false,
                    };
                    match hides {
                        true => beside.push((axis.clone(), moves)),
                        false => span.wait(axis, moves),
                    }
                }
                work => {
                    let alone = self.rates.seconds(work);
                    let moving: f64 = beside.iter().map(|(_, moves)| moves).sum();
                    let slowed = self.interference / (1.0 - self.interference);
                    let mut busy = alone + slowed * moving.min(alone);
                    span.seconds += busy;
                    *span.kernels.entry(work.name()).or_default() += busy;
                    for (axis, moves) in beside.drain(..) {
                        span.wait(&axis, (moves - busy).max(0.0));
                        busy = (busy - moves).max(0.0);
                    }
                }
            }
        }
        for (axis, moves) in beside {
            span.wait(&axis, moves);
        }
        let behind = self.rates.launch * tasks.len() as f64 - span.seconds;
        if behind > 0.0 {
            span.seconds += behind;
            *span.kernels.entry("launch").or_default() += behind;
        }
        Ok(span)
    }
}

impl Setting {
    fn tp(&self) -> usize {
        self.mesh.size_of("tp")
    }

    fn pp(&self) -> usize {
        self.mesh.size_of("pp")
    }

    fn dp(&self) -> usize {
        self.mesh.size_of("dp")
    }

    /// Micro-batches of a step.
    pub fn micros(&self) -> usize {
        self.global_batch / (self.dp() * self.micro_batch)
    }

    /// The pipeline's lists.
    ///
    /// # Errors
    /// If the schedule does not go with so many chunks.
    pub fn plan(&self) -> Result<Plan> {
        Plan::new(self.schedule, self.pp(), self.virtual_stages, self.micros())
    }

    /// Layers of each stage's chunks. If they do not divide evenly, embedding and head count as a layer each, as Llama 3 does.
    ///
    /// # Errors
    /// If there are more chunks than layers, embedding and head.
    pub fn layers(&self) -> Result<Vec<Vec<usize>>> {
        let plan = self.plan()?;
        let (layers, parts) = (self.config.layers, plan.parts());
        let lengths: Vec<usize> = match layers.is_multiple_of(parts) {
            true => vec![layers / parts; parts],
            false => {
                let ranges = layers_of_parts(layers, parts)?;
                ranges.iter().map(|range| range.len()).collect()
            }
        };
        let chunk = |stage, chunk| lengths[plan.part(stage, chunk)];
        let stage = |s| (0..plan.chunks()).map(|c| chunk(s, c)).collect();
        Ok((0..plan.stages()).map(stage).collect())
    }

    /// Bytes on the fullest chip.
    ///
    /// # Errors
    /// As [`Setting::check`].
    pub fn memory(&self, machine: &Machine) -> Result<Memory> {
        self.check()?;
        memory::of(self, machine, &self.layers()?)
    }

    /// Checks the numbers against each other.
    ///
    /// # Errors
    /// What does not divide, with both numbers.
    pub fn check(&self) -> Result<()> {
        self.config.check(&self.mesh)?;
        let wrong = |why: String| Err(Error::new(ErrorKind::Mesh, why));
        if let Some(axis) = self
            .mesh
            .axes()
            .iter()
            .find(|a| !["dp", "pp", "tp"].contains(&a.name()))
        {
            return wrong(format!(
                "axis '{}' is not priced; dp, pp and tp are",
                axis.name()
            ));
        }
        if self.micro_batch == 0 || self.context == 0 || self.virtual_stages == 0 {
            return wrong("micro-batch, context and virtual stages are at least 1".into());
        }
        let each = self.dp() * self.micro_batch;
        if self.global_batch == 0 || !self.global_batch.is_multiple_of(each) {
            return wrong(format!(
                "a global batch of {} is not divisible by dp={} times micro-batches of {}",
                self.global_batch,
                self.dp(),
                self.micro_batch
            ));
        }
        if self.schedule == Schedule::OneForwardOneBackward
            && self.virtual_stages > 1
            && !self.micros().is_multiple_of(self.pp())
        {
            return wrong(format!(
                "interleaving passes micro-batches in groups of pp={}, of which {} is no multiple",
                self.pp(),
                self.micros()
            ));
        }
        if self.sequence_parallel && !self.context.is_multiple_of(self.tp()) {
            return wrong(format!(
                "{} tokens are not divisible by tp={}",
                self.context,
                self.tp()
            ));
        }
        if self.zero > 3 {
            return wrong(format!(
                "there is no ZeRO stage {}; there are 0 to 3",
                self.zero
            ));
        }
        self.layers().map(|_| ())
    }

    pub(super) fn shape(&self, machine: &Machine) -> Shape<'_> {
        let is = |field: &str, word: &str| machine.stack.word(field) == Some(word);
        Shape {
            config: &self.config,
            batch: self.micro_batch,
            context: self.context,
            tp: self.tp(),
            sequence_parallel: self.sequence_parallel,
            fused: is("stack.attention", "fused"),
            dropout: is("stack.dropout", "yes"),
            size: if matches!(self.dtype.as_str(), "fp8" | "int8") {
                1.0
            } else {
                2.0
            },
        }
    }

    /// Parameters of a layer on a chip.
    pub(super) fn layer_parameters(&self) -> f64 {
        let none = Config {
            layers: 0,
            ..self.config.clone()
        };
        let one = Config {
            layers: 1,
            ..self.config.clone()
        };
        (one.parameters() - none.parameters()) as f64 / self.tp() as f64
    }

    /// Parameters of embedding or head on a chip.
    pub(super) fn embedding_parameters(&self) -> f64 {
        (self.config.vocab * self.config.hidden) as f64 / self.tp() as f64
    }

    /// Megatron's count of a step's operations.
    fn model_flops(&self) -> f64 {
        let c = &self.config;
        let d = c.head_dim();
        let gates = if c.feed_forward == FeedForward::SwiGlu {
            3
        } else {
            2
        };
        let layer = c.hidden * (2 * c.heads + 2 * c.kv_heads) * d + gates * c.hidden * c.ffn;
        let products = (c.layers * layer + c.vocab * c.hidden) as f64;
        let scores = 2.0 * (c.layers * self.context * c.heads * d) as f64;
        6.0 * (products + scores) * (self.global_batch * self.context) as f64
    }

    /// Forward and backward of one layer, in seconds: what the table of a paper shows.
    ///
    /// # Errors
    /// As [`Setting::price`].
    pub fn layer_seconds(&self, machine: &Machine) -> Result<(f64, f64)> {
        let prices = self.prices(machine)?;
        let shape = self.shape(machine);
        let forward = prices.span(&shape.forward())?.seconds;
        let again = prices.span(&shape.again(self.recompute))?.seconds;
        Ok((forward, prices.span(&shape.backward())?.seconds + again))
    }

    fn prices(&self, machine: &'_ Machine) -> Result<Prices<'_>> {
        let overlap = match machine.stack.word("stack.tp_overlap") {
            Some("all") => Some("all"),
            Some("backward") => Some("backward"),
            _ => None,
        };
        Ok(Prices {
            rates: Rates::of(machine, &self.dtype)?,
            network: Network::of(machine)?,
            mesh: &self.mesh,
            overlap,
            interference: machine.stack.value("stack.interference")?.clamp(0.0, 0.9),
        })
    }

    /// Prices a step on `machine`.
    ///
    /// # Errors
    /// What does not divide, a number that the machine does not have, or more chips than it joins.
    pub fn price(&self, machine: &Machine) -> Result<Forecast> {
        self.check()?;
        let prices = self.prices(machine)?;
        let shape = self.shape(machine);
        let layers = self.layers()?;
        let pass = |pass: Pass| self.passes(&prices, &shape, &layers, pass);
        let (forward, backward) = (pass(Pass::Forward)?, pass(Pass::Backward)?);
        let weights = pass(Pass::Weights)?;
        let is = |field: &str| machine.stack.word(field) == Some("yes");
        let message = self.message(&prices)?;
        let seconds = |spans: &[Vec<Span>]| -> Vec<Vec<f64>> {
            spans
                .iter()
                .map(|s| s.iter().map(|c| c.seconds).collect())
                .collect()
        };
        let times = Times {
            forward: seconds(&forward),
            backward: seconds(&backward),
            weights: seconds(&weights),
            message,
            blocking: !is("stack.pp_overlap"),
        };
        let micros = self.micros();
        let timeline = self.plan()?.replay(&times);
        let end = timeline.iter().flatten().map(|r| r.end).fold(0.0, f64::max);
        // The busiest stage carries the account.
        let mut stages = forward.iter().zip(&backward).map(|(f, b)| {
            let mut sum = Span::default();
            f.iter()
                .chain(b)
                .for_each(|span| sum.add(span, micros as f64));
            if times.blocking && self.pp() > 1 {
                sum.wait("pp", message * (2 * micros * self.virtual_stages) as f64);
            }
            sum
        });
        let first = stages.next().expect("a pipeline has a stage");
        let mut busiest = stages.fold(first, |a, b| if b.seconds > a.seconds { b } else { a });
        let bubble_seconds = (end - busiest.seconds).max(0.0);
        let before = busiest.seconds;
        self.update(machine, &prices, &times, &layers, &mut busiest)?;
        let step_seconds = end + (busiest.seconds - before);
        let model_flops = self.model_flops();
        Ok(Forecast {
            step_seconds,
            bubble_seconds,
            model_flops,
            mfu: model_flops / (step_seconds * prices.rates.peak * self.mesh.chips() as f64),
            tokens: (self.global_batch * self.context) as f64,
            memory: memory::of(self, machine, &layers)?,
            compute_seconds: busiest.kernels,
            exposed: busiest.exposed,
            timeline,
        })
    }

    /// What each stage's chunks take.
    fn passes(
        &self,
        prices: &Prices<'_>,
        shape: &Shape<'_>,
        layers: &[Vec<usize>],
        pass: Pass,
    ) -> Result<Vec<Vec<Span>>> {
        let mut layer = prices.span(&match pass {
            Pass::Forward => shape.forward(),
            Pass::Backward => shape.backward(),
            Pass::Weights => shape.weights(),
        })?;
        if pass == Pass::Backward {
            layer.add(&prices.span(&shape.again(self.recompute))?, 1.0);
        }
        let embedding = prices.span(&match pass {
            Pass::Weights => vec![],
            _ => shape.embedding(),
        })?;
        let head = prices.span(&match pass {
            Pass::Weights => shape.head_weights(),
            _ => shape.head(pass == Pass::Backward),
        })?;
        let (pp, v) = (self.pp(), self.virtual_stages);
        let last = self.plan()?.place(pp * v - 1);
        let chunk = |stage: usize, chunk: usize| {
            let mut span = Span::default();
            span.add(&layer, layers[stage][chunk] as f64);
            if (stage, chunk) == (0, 0) {
                span.add(&embedding, 1.0);
            }
            if (stage, chunk) == last {
                span.add(&head, 1.0);
            }
            span
        };
        Ok((0..pp)
            .map(|s| (0..v).map(|c| chunk(s, c)).collect())
            .collect())
    }

    /// Seconds of a micro-batch's values from stage to stage: each chip of `tp` sends its share, and they gather them
    /// (Narayanan et al. 2021, section 4.1), unless tokens are split anyway.
    fn message(&self, prices: &Prices<'_>) -> Result<f64> {
        if self.pp() == 1 {
            return Ok(0.0);
        }
        let bytes = 2.0 * (self.micro_batch * self.context * self.config.hidden) as f64;
        let axis = "pp".to_string();
        let share = bytes / self.tp() as f64;
        let sent = prices
            .network
            .seconds(&self.mesh, &Work::Message { axis, bytes: share })?;
        let (kind, axis) = (Kind::AllGather, "tp".to_string());
        let gather = Work::Collective { kind, axis, bytes };
        let gathered = match self.sequence_parallel {
            true => 0.0,
            false => prices.network.seconds(&self.mesh, &gather)?,
        };
        Ok(sent + gathered)
    }

    /// Gradients over `dp`, and the optimizer, on the stage with most parameters.
    fn update(
        &self,
        machine: &Machine,
        prices: &Prices<'_>,
        times: &Times,
        layers: &[Vec<usize>],
        span: &mut Span,
    ) -> Result<()> {
        let parameters = self.most_parameters(layers);
        let gradient = if machine.stack.word("stack.gradient") == Some("f32") {
            4.0
        } else {
            2.0
        };
        let over = |kind, bytes| -> Result<f64> {
            let work = Work::Collective {
                kind,
                axis: "dp".into(),
                bytes,
            };
            prices.network.seconds(&self.mesh, &work)
        };
        // Parameters that are split are gathered for every forward and backward, gradients that are split reduced for each.
        let micros = self.micros() as f64;
        let (gather, reduce) = match self.zero {
            0 => (0.0, over(Kind::AllReduce, gradient * parameters)?),
            _ => (
                over(Kind::AllGather, 2.0 * parameters)?,
                over(Kind::ReduceScatter, gradient * parameters)?,
            ),
        };
        let gathers = if self.zero == 3 { micros } else { 1.0 };
        let again = if self.zero == 3 { micros * gather } else { 0.0 };
        let reduces = if self.zero >= 2 { micros } else { 1.0 };
        // Beside the backward of a micro-batch, or the forward of one; the last layer's gradients and the first one's parameters
        // have nothing to hide behind.
        let hidden = |moves: f64, window: &[Vec<f64>]| {
            let layers = layers[0].iter().sum::<usize>().max(1) as f64;
            let window: f64 = window[0].iter().sum();
            (moves - window * (layers - 1.0) / layers).max(moves / layers)
        };
        let exposed = match machine.stack.word("stack.dp_overlap") {
            Some("yes") => {
                let both = reduce + again / micros;
                hidden(gather, &times.forward) * gathers + hidden(both, &times.backward) * reduces
            }
            _ => reduce * reduces + gather * gathers + again,
        };
        span.wait("dp", exposed);
        if self.config.tied && self.plan()?.last_stage() > 0 {
            // First and last stage add up the gradients of the embedding that they share.
            let bytes = gradient * self.embedding_parameters();
            let stride = self.mesh.group(0, "pp").stride();
            span.wait(
                "pp",
                prices.network.message(stride * (self.pp() - 1), bytes)?,
            );
        }
        // Clipping reads gradients; AdamW reads and writes master weights and two moments in f32, writes 2-byte weights; the
        // gradients are set to zero.
        let share = if self.zero >= 1 {
            self.dp() as f64
        } else {
            1.0
        };
        let bytes = parameters / share * (gradient + 24.0 + gradient + 2.0) + parameters * gradient;
        let step = prices.rates.seconds(&Work::Stream {
            rows: Rows::Elementwise,
            bytes,
        });
        span.seconds += step;
        *span.kernels.entry("optimizer").or_default() += step;
        Ok(())
    }

    /// Parameters of the chip that has most.
    pub(super) fn most_parameters(&self, layers: &[Vec<usize>]) -> f64 {
        let last = self.plan().map_or(0, |plan| plan.last_stage());
        let stage = |s: usize| {
            let layers = layers[s].iter().sum::<usize>() as f64;
            let ends = (s == 0) as usize + (s == last) as usize;
            let ends = if self.config.tied { ends.min(1) } else { ends };
            layers * self.layer_parameters() + ends as f64 * self.embedding_parameters()
        };
        (0..layers.len()).map(stage).fold(0.0, f64::max)
    }
}
