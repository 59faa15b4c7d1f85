//! The training loop: the same on one chip and on any mesh, for real or as a ghost.
//!
//! A step draws its rows by number, runs them in micro-batches whose gradients add up, reduces each parameter's gradient
//! once, clips, updates. The loop around the step is the only place that reads a number from a chip. Evaluation, saving and
//! sampling are in `evaluate`, `persist` and `generate`.

use super::balance::{Counted, ExpertLoads};
use super::data::Batches;
use super::optimizer::{AdamW, Optimizer};
use super::persist::Persist;
use super::schedule::LearningRate;
use super::stages::Stages;
use crate::error::{Error, ErrorKind, Result};
use crate::mesh::Mesh;
use crate::model::Transformer;
use crate::pipeline::Schedule;
use crate::spmd::{BUCKET_BYTES, Chip, Ghost, Run, Sharded, Threads, Zero};
use crate::trace::Trace;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

/// How to train.
#[derive(Clone, Debug)]
pub struct Options {
    /// Steps in all, those before a resumed checkpoint included.
    pub steps: u64,
    /// Sequences that a chip computes at a time; if none, all of its share, or one where mesh axis pp has several stages. Along an
    /// axis of uneven shares a chip of share s computes s times as many at a time.
    pub micro_batch: Option<usize>,
    /// How micro-batches pass through the stages of mesh axis pp.
    pub schedule: Schedule,
    /// Chunks of layers that a stage has; the schedule's own number if none.
    pub virtual_stages: Option<usize>,
    /// What is split of parameters and what belongs to them: over mesh axis fsdp if there is one, else over dp. If none, all
    /// of it over fsdp and nothing over dp.
    pub zero: Option<Zero>,
    /// Bytes of gradients that one all-reduce (with ZeRO-1 a reduce-scatter) sums in the backward; 0 for each by itself. See
    /// [`Chip::reduce_in_buckets`].
    pub bucket_bytes: u64,
    /// Learning rate of each step.
    pub learning_rate: LearningRate,
    /// The optimizer's constants.
    pub optimizer: AdamW,
    /// Evaluate after every so many steps, and after the last; never if none.
    pub eval_every: Option<u64>,
    /// Where checkpoints go: at every evaluation, at the end, and when the run is asked to stop.
    pub checkpoint: Option<PathBuf>,
    /// Go on from the checkpoint instead of from the beginning.
    pub resume: bool,
    /// Tokens to sample after the last step; 0 for none.
    pub sample: usize,
    /// Temperature of the sample.
    pub temperature: f64,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            steps: 100,
            micro_batch: None,
            schedule: Schedule::default(),
            virtual_stages: None,
            zero: None,
            bucket_bytes: BUCKET_BYTES,
            learning_rate: LearningRate::Constant { lr: 1e-3 },
            optimizer: AdamW::default(),
            eval_every: None,
            checkpoint: None,
            resume: false,
            sample: 0,
            temperature: 1.0,
        }
    }
}

/// What a run tells while it goes on. Steps count from 1.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// The run goes on from a checkpoint of this step.
    Resumed {
        /// Steps done.
        step: u64,
    },
    /// A step was done.
    Step {
        /// Its number.
        step: u64,
        /// Mean loss of its batch, before the update.
        loss: f64,
        /// Global gradient norm before clipping. If it is not finite, the update was left out.
        gradient_norm: f64,
        /// Learning rate.
        lr: f64,
        /// Milliseconds.
        ms: f64,
        /// Highest bytes of tensors on this chip so far.
        peak_bytes: u64,
        /// What a mixture's experts were asked to take; none without one.
        experts: Option<ExpertLoads>,
    },
    /// The validation loss after a step: the mean over all windows of the validation split.
    Validation {
        /// The step.
        step: u64,
        /// The loss.
        loss: f64,
    },
    /// A checkpoint was written.
    Saved {
        /// Steps done.
        step: u64,
        /// Its directory.
        path: PathBuf,
    },
    /// The run was asked to stop and does, after this step.
    Stopping {
        /// Steps done.
        step: u64,
    },
}

/// What a chip returns.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Steps done, in all.
    pub steps: u64,
    /// Loss of the last step; none if no step ran.
    pub loss: Option<f64>,
    /// The last validation loss.
    pub val_loss: Option<f64>,
    /// The sampled tokens.
    pub sample: Vec<u32>,
}

/// A model, a text, and how to train the one on the other.
#[derive(Clone, Debug)]
pub struct Training {
    /// The model.
    pub model: Transformer,
    /// The text.
    pub batches: Batches,
    /// How to train.
    pub options: Options,
}

impl Training {
    /// What is split of parameters, and over which axis.
    pub(super) fn zero(&self, mesh: &Mesh) -> (Zero, &'static str) {
        match (mesh.size_of("fsdp") > 1, self.options.zero) {
            (true, zero) => (zero.unwrap_or(Zero::Parameters), "fsdp"),
            (false, zero) => (zero.unwrap_or_default(), "dp"),
        }
    }

    pub(super) fn split_parameters(&self, chip: &Chip) {
        let (zero, axis) = self.zero(chip.mesh());
        chip.split_parameters(zero, axis);
        chip.reduce_in_buckets(self.options.bucket_bytes);
    }

    /// Trains on a mesh of chips of this machine. `observe` is told what happens, by one chip; setting `stop` ends the run
    /// after the step that is under way, with a checkpoint if there is a directory for it.
    ///
    /// # Errors
    /// What [`Training::check`] finds; a checkpoint that cannot be read or written; a loss that is not finite
    /// ([`ErrorKind::NotFinite`], the last checkpoint is kept); any chip's failure.
    pub fn run(
        &self,
        world: &Threads,
        observe: &(dyn Fn(&Report) + Sync),
        stop: &AtomicBool,
    ) -> Result<Run<Finished>> {
        self.check(world.mesh())?;
        let persist = Persist::open(self, world)?;
        world.run(|chip| self.program(chip, &persist, observe, stop))
    }

    /// Traces one training step on a ghost of any mesh.
    ///
    /// # Errors
    /// What [`Training::check`] finds.
    pub fn trace(&self, ghost: &Ghost) -> Result<Trace> {
        self.trace_and(ghost, |_| ())
    }

    /// As [`Training::trace`], with `look` at each traced chip after its step.
    pub(super) fn trace_and(&self, ghost: &Ghost, look: impl Fn(&Chip)) -> Result<Trace> {
        self.check(ghost.mesh())?;
        ghost.trace(|chip| {
            self.split_parameters(chip);
            let mut optimizer = Optimizer::new(self.options.optimizer, 0);
            optimizer.prepare(chip);
            let stages = self.stages(chip);
            chip.step(1, || self.step(chip, &stages, &mut optimizer, 1));
            look(chip);
        })
    }

    fn program(
        &self,
        chip: &Chip,
        persist: &Persist,
        observe: &(dyn Fn(&Report) + Sync),
        stop: &AtomicBool,
    ) -> Finished {
        let tell = |report: Report| {
            if chip.is_first() {
                observe(&report);
            }
        };
        self.split_parameters(chip);
        let done = persist.restore(chip);
        if persist.resumes() {
            tell(Report::Resumed { step: done });
        }
        let mut optimizer = Optimizer::new(self.options.optimizer, done);
        optimizer.prepare(chip);
        let stages = self.stages(chip);
        let (mut saved, mut left_out) = (done, 0);
        let mut finished = Finished {
            steps: done,
            loss: None,
            val_loss: None,
            sample: Vec::new(),
        };
        for number in done + 1..=self.options.steps {
            if chip.agree(number, || stop.load(Relaxed)) {
                tell(Report::Stopping {
                    step: finished.steps,
                });
                break;
            }
            let (loss, norm) =
                self.timed_step(chip, &stages, &mut optimizer, number, persist, &tell);
            finished.loss = Some(loss);
            finished.steps = number;
            left_out = if norm.is_finite() { 0 } else { left_out + 1 };
            if left_out == Self::MOST_LEFT_OUT {
                chip.fail(Error::new(
                    ErrorKind::NotFinite,
                    format!(
                        "the gradient norm of step {number} is {norm}, as in the {} steps before it; {}",
                        left_out - 1,
                        persist.last()
                    ),
                ));
            }
            if number == done + 1 {
                persist.check_all_used(chip);
            }
            let last = number == self.options.steps;
            if self
                .options
                .eval_every
                .is_some_and(|n| last || number % n == 0)
            {
                finished.val_loss = self.evaluate_and_tell(chip, &stages, number, persist, &tell);
                // The last good checkpoint is not replaced by weights that give no gradient.
                if left_out == 0 {
                    persist.save(chip, number, &tell);
                    saved = number;
                }
            }
        }
        if finished.steps > saved && left_out == 0 {
            persist.save(chip, finished.steps, &tell);
        }
        if self.options.sample > 0 {
            finished.sample = self.sample(chip, &stages);
        }
        finished
    }

    /// A gradient that is not finite leaves the update out; so many in a row will not mend.
    const MOST_LEFT_OUT: u32 = 3;

    fn timed_step(
        &self,
        chip: &Chip,
        stages: &Stages,
        optimizer: &mut Optimizer,
        number: u64,
        persist: &Persist,
        tell: &impl Fn(Report),
    ) -> (f64, f64) {
        let began = Instant::now();
        let (loss, norm, loads) = chip.step(number, || self.step(chip, stages, optimizer, number));
        let loss = number_of(&loss);
        if !loss.is_finite() {
            chip.fail(Error::new(
                ErrorKind::NotFinite,
                format!("the loss of step {number} is {loss}; {}", persist.last()),
            ));
        }
        let norm = number_of(&norm);
        tell(Report::Step {
            step: number,
            loss,
            gradient_norm: norm,
            lr: self.options.learning_rate.at(number - 1),
            ms: began.elapsed().as_secs_f64() * 1e3,
            peak_bytes: chip.memory().count().peak,
            experts: loads.as_ref().and_then(ExpertLoads::read),
        });
        (loss, norm)
    }

    fn evaluate_and_tell(
        &self,
        chip: &Chip,
        stages: &Stages,
        step: u64,
        persist: &Persist,
        tell: &impl Fn(Report),
    ) -> Option<f64> {
        let loss = self.evaluate(chip, stages)?;
        // Before the checkpoint that follows takes the place of the last good one.
        if !loss.is_finite() {
            chip.fail(Error::new(
                ErrorKind::NotFinite,
                format!(
                    "the validation loss after step {step} is {loss}; {}",
                    persist.last()
                ),
            ));
        }
        tell(Report::Validation { step, loss });
        Some(loss)
    }

    /// Step `number`, from 1: mean loss and gradient norm, [1] each, and what a mixture's experts did, on every chip.
    fn step(
        &self,
        chip: &Chip,
        stages: &Stages,
        optimizer: &mut Optimizer,
        number: u64,
    ) -> (Sharded, Sharded, Option<Counted>) {
        let loss = stages.run(self, chip, number);
        let lr = self.options.learning_rate.at(number - 1);
        let norm = optimizer.step_over(chip, lr, Some(stages));
        (loss, norm, self.balance(chip, stages))
    }

    pub(super) fn stages(&self, chip: &Chip) -> Stages {
        Stages::new(self, chip.mesh()).unwrap_or_else(|e| chip.fail(e))
    }
}

/// The number in a scalar.
pub(super) fn number_of(scalar: &Sharded) -> f64 {
    scalar.read().map_or(f64::NAN, |a| {
        f64::from(*a.first().expect("a scalar has one element"))
    })
}
