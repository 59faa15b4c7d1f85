//! A step's price: passes of every chunk, the pipeline, and what follows it.

use super::{Counts, Forecast, Prices, Setting, Span};
use crate::cluster::Machine;
use crate::collective::Kind;
use crate::error::{Error, ErrorKind, Result};
use crate::forecast::interval::{self, Slower};
use crate::forecast::memory;
use crate::forecast::program::Shape;
use crate::forecast::schedule::makespan;
use crate::forecast::work::Work;
use crate::pipeline::Times;

/// Pieces beyond which a timeline is not replayed whole: nobody looks at more, and a step of more repeats itself.
const MOST_PIECES: usize = 400_000;

impl Setting {
    /// Forward and backward of one layer of the first stage, in seconds: what the table of a paper shows.
    ///
    /// # Errors
    /// As [`Setting::price`].
    pub fn layer_seconds(&self, machine: &Machine) -> Result<(f64, f64)> {
        let prices = self.prices(machine)?;
        let shape = self.shape(machine);
        let block = self.model.block(self.model.layers - 1);
        let forward = prices.parts(&shape.forward_parts(block))?.seconds;
        let again = prices.parts(&shape.again(self.recompute, block))?.seconds;
        let backward = prices.parts(&shape.backward_parts(block))?.seconds;
        Ok((forward, backward + again))
    }

    /// Prices a step on `machine`.
    ///
    /// # Errors
    /// What does not divide, a number that the machine does not have, or more chips than it joins.
    pub fn price(&self, machine: &Machine) -> Result<Forecast> {
        self.priced(machine, Slower::NOTHING, true)
    }

    /// [`Setting::price`] without what the stages did, which grows with the number of micro-batches.
    ///
    /// # Errors
    /// As [`Setting::price`].
    pub fn price_only(&self, machine: &Machine) -> Result<Forecast> {
        self.priced(machine, Slower::NOTHING, false)
    }

    /// Seconds between which the step lies with a probability of about 80 %: see [`Class`](crate::forecast::Class) for what errs
    /// by how much, independently of the others.
    ///
    /// # Errors
    /// As [`Setting::price`].
    pub fn interval(&self, machine: &Machine) -> Result<(f64, f64)> {
        let step = self.priced(machine, Slower::NOTHING, true)?.step_seconds;
        interval::around(machine, step, |slower| {
            Ok(self.priced(machine, slower, false)?.step_seconds)
        })
    }

    /// Seconds that no schedule of this split goes below: the busiest stage, all its micro-batches one after the other.
    pub(in super::super) fn bound(&self, machine: &Machine) -> Result<f64> {
        let prices = self.prices(machine)?;
        prices.network.fits(self.mesh.chips())?;
        let (shape, layers) = (self.shape(machine), self.layers()?);
        let forward = self.passes(&prices, &shape, &layers, false)?;
        let backward = self.passes(&prices, &shape, &layers, true)?;
        let stage = |(f, b): (&Vec<Span>, &Vec<Span>)| -> f64 {
            f.iter().chain(b).map(|span| span.seconds).sum()
        };
        let busiest = forward.iter().zip(&backward).map(stage).fold(0.0, f64::max);
        Ok(busiest * self.micros() as f64 * (1.0 + self.straggling(machine)?))
    }

    fn priced(&self, machine: &Machine, slower: Slower, timeline: bool) -> Result<Forecast> {
        self.check()?;
        let prices = self.prices(machine)?.slowed(slower);
        // Rank 0's groups lie lowest: a mesh that the machine cannot join is refused as a whole.
        prices.network.fits(self.mesh.chips())?;
        let shape = self.shape(machine);
        let layers = self.layers()?;
        let forward = self.passes(&prices, &shape, &layers, false)?;
        let backward = self.passes(&prices, &shape, &layers, true)?;
        let message = match self.along("pp") {
            1 => 0.0,
            _ => self.message(&prices)? + machine.stack.find("stack.message").unwrap_or(0.0),
        };
        let seconds = |spans: &[Vec<Span>], of: &dyn Fn(&Span) -> f64| -> Vec<Vec<f64>> {
            spans.iter().map(|s| s.iter().map(of).collect()).collect()
        };
        let times = Times {
            forward: seconds(&forward, &|s| s.seconds),
            backward: seconds(&backward, &|s| s.seconds),
            weights: seconds(&backward, &|s| s.weights),
            message,
            blocking: machine.stack.word("stack.pp_overlap") != Some("yes"),
        };
        let micros = self.micros();
        let pieces = 3 * micros * self.virtual_stages * self.along("pp");
        let (ran, end) = match timeline && pieces <= MOST_PIECES {
            true => {
                let ran = self.plan()?.replay(&times);
                let end = ran.iter().flatten().map(|r| r.end).fold(0.0, f64::max);
                (ran, end)
            }
            false => (vec![], makespan(self.pipeline, micros, &times)?),
        };
        // The busiest stage carries the account.
        let mut stages = forward.iter().zip(&backward).map(|(f, b)| {
            let mut sum = Span::default();
            f.iter()
                .chain(b)
                .for_each(|span| sum.add(span, micros as f64));
            if times.blocking && self.along("pp") > 1 {
                sum.wait("pp", message * (2 * micros * self.virtual_stages) as f64);
            }
            sum
        });
        let first = stages.next().expect("a pipeline has a stage");
        let mut busiest = stages.fold(first, |a, b| if b.seconds > a.seconds { b } else { a });
        let bubble_seconds = (end - busiest.seconds).max(0.0);
        let before = busiest.seconds;
        self.update(machine, &prices, &times, &layers, &mut busiest)?;
        let once = machine.stack.find("stack.step").unwrap_or(0.0);
        busiest.work("host", once);
        let even = end + (busiest.seconds - before);
        let straggler_seconds = even * self.straggling(machine)?;
        let step_seconds = even + straggler_seconds;
        if !step_seconds.is_finite() {
            let why = format!(
                "a step would take {step_seconds} seconds: some number of the machine is far too small or too large"
            );
            return Err(Error::new(ErrorKind::Input, why));
        }
        let tokens = self.global_batch as f64 * self.context as f64;
        let flops = |causal| 3.0 * tokens * self.model.forward_flops(self.context, causal);
        let peak = prices.rates.peak * self.mesh.chips() as f64;
        Ok(Forecast {
            step_seconds,
            bubble_seconds,
            straggler_seconds,
            model_flops: flops(false),
            causal_flops: flops(true),
            peak,
            mfu: flops(false) / (step_seconds * peak),
            tokens,
            memory: memory::of(self, machine, &layers)?,
            compute_seconds: busiest.kernels,
            exposed: busiest.exposed,
            timeline: ran,
        })
    }

    /// What each stage's chunks take.
    fn passes(
        &self,
        prices: &Prices<'_>,
        shape: &Shape<'_>,
        layers: &[Vec<Counts>],
        backward: bool,
    ) -> Result<Vec<Vec<Span>>> {
        // Equal layers are priced once.
        let kinds = Counts::default().each().map(|(block, _)| block);
        let there = |i: usize| layers.iter().flatten().any(|c| c.each()[i].1 > 0);
        let mut prices_of = [Span::default(), Span::default(), Span::default()];
        for (i, block) in kinds.into_iter().enumerate().filter(|(i, _)| there(*i)) {
            prices_of[i] = match backward {
                false => prices.parts(&shape.forward_parts(block))?,
                true => {
                    let mut span = prices.parts(&shape.backward_parts(block))?;
                    span.add(&prices.parts(&shape.again(self.recompute, block))?, 1.0);
                    span
                }
            };
        }
        let embedding = prices.span(&match backward {
            false => shape.embedding(),
            true => shape.embedding_backward(),
        })?;
        let head = prices.span(&shape.head(backward))?;
        let (v, last) = (self.virtual_stages, self.last_stage());
        let chunk = |stage: usize, chunk: usize| {
            let mut span = Span::default();
            for (i, (_, count)) in layers[stage][chunk].each().into_iter().enumerate() {
                span.add(&prices_of[i], count as f64);
            }
            if (stage, chunk) == (0, 0) {
                span.add(&embedding, 1.0);
            }
            if (stage, chunk) == (last, v - 1) {
                span.add(&head, (1 + self.model.predicted) as f64);
            }
            span
        };
        Ok((0..layers.len())
            .map(|s| (0..v).map(|c| chunk(s, c)).collect())
            .collect())
    }

    /// Seconds of a micro-batch's values from stage to stage: each chip of `tp` sends its share, and they gather them
    /// (Narayanan et al. 2021, section 4.1), unless tokens are split anyway.
    fn message(&self, prices: &Prices<'_>) -> Result<f64> {
        let tokens = (self.micro_batch * self.context).div_ceil(self.along("cp"));
        let bytes = 2.0 * (tokens * self.model.hidden) as f64;
        let axis = "pp".to_string();
        let share = bytes / self.along("tp") as f64;
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

    /// The share by which a step is longer than that of equal chips: the expected slowness of the slowest node, of which each is
    /// slow with a probability, and the expected maximum of all chips' jitter.
    pub(in super::super) fn straggling(&self, machine: &Machine) -> Result<f64> {
        let value = |field: &str| machine.stack.value(field);
        let node = machine.levels()?.first().map_or(1, |l| l.chips);
        let nodes = self.mesh.chips().div_ceil(node) as f64;
        let some = 1.0 - (1.0 - value("stack.stragglers")?.clamp(0.0, 1.0)).powf(nodes);
        let most = (2.0 * (self.mesh.chips() as f64).ln()).sqrt();
        Ok(some * value("stack.straggling")? + most * value("stack.jitter")?)
    }
}
