//! Schedules as the forecast names them, and how long their lists take.
//!
//! The lists and their replay are those of [`crate::pipeline`], which the training loop runs. DualPipe (DeepSeek-V3, arXiv:2412.19437),
//! micro-batches from both ends, is priced as the V that its two directions fold into, with one micro-batch more held; that exchanges
//! of tokens hide behind the other direction is the step's affair. Before these lists there was a greedy run that chose pieces by real
//! times: its ZB-V had a bubble of 10 forwards of a chunk where the lists have none.

use crate::error::Result;
use crate::pipeline::{Plan, Schedule, Times};

/// How micro-batches pass through a pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pipeline {
    /// A schedule of the training loop.
    Listed(Schedule),
    /// Micro-batches from both ends.
    DualPipe,
}

impl Pipeline {
    /// One forward, one backward.
    pub const ONE_F_ONE_B: Pipeline = Pipeline::Listed(Schedule::OneForwardOneBackward);

    /// Every schedule.
    pub const ALL: [Pipeline; 5] = [
        Pipeline::Listed(Schedule::GPipe),
        Pipeline::Listed(Schedule::OneForwardOneBackward),
        Pipeline::Listed(Schedule::ZbH1),
        Pipeline::Listed(Schedule::ZbV),
        Pipeline::DualPipe,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Pipeline::Listed(schedule) => schedule.name(),
            Pipeline::DualPipe => "dualpipe",
        }
    }

    /// Chunks that a stage has if nothing else is said.
    pub fn chunks(self) -> usize {
        self.schedule().chunks()
    }

    fn schedule(self) -> Schedule {
        match self {
            Pipeline::Listed(schedule) => schedule,
            Pipeline::DualPipe => Schedule::ZbV,
        }
    }

    /// The plan for so many stages, chunks and micro-batches.
    ///
    /// # Errors
    /// If the schedule does not go with so many chunks a stage.
    pub fn plan(self, stages: usize, chunks: usize, micros: usize) -> Result<Plan> {
        Plan::new(self.schedule(), stages, chunks, micros)
    }

    /// Most micro-batch chunks whose values each stage holds at once. A long step holds no more than a short one.
    ///
    /// # Errors
    /// As [`Pipeline::plan`].
    pub fn held(self, stages: usize, chunks: usize, micros: usize) -> Result<Vec<usize>> {
        if self == Pipeline::Listed(Schedule::GPipe) {
            return Ok(vec![micros; stages]);
        }
        let short = micros.min(stages * (chunks + 2));
        let mut held = self.plan(stages, chunks, short)?.held();
        if self == Pipeline::DualPipe {
            held.iter_mut().for_each(|h| *h += chunks);
        }
        Ok(held)
    }
}

/// Micro-batches, in rounds of as many as there are stages, of the shorter of two steps that a longer one is taken from.
const REPEATS: usize = 6;

/// Pieces up to which a step is replayed whole.
const WHOLE: usize = 30_000;

/// Seconds from the first piece to the last. A step of very many micro-batches repeats itself: two shorter ones are run, and what a
/// round of as many micro-batches as stages adds is taken for the rest.
///
/// # Errors
/// As [`Pipeline::plan`].
pub fn makespan(pipeline: Pipeline, micros: usize, times: &Times) -> Result<f64> {
    let (stages, chunks) = (times.forward.len(), times.forward[0].len());
    let end = |micros| -> Result<f64> {
        let ran = pipeline.plan(stages, chunks, micros)?.replay(times);
        Ok(ran.iter().flatten().map(|r| r.end).fold(0.0, f64::max))
    };
    let short = REPEATS * stages;
    let pieces = 3 * micros * stages * chunks;
    if pieces <= WHOLE || micros <= short + 3 * stages {
        return end(micros);
    }
    let over = micros % stages;
    let (one, two) = (end(short + over)?, end(short + 2 * stages + over)?);
    Ok(one + (two - one) / 2.0 * ((micros - short - over) / stages) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a long step repeats is taken from two short ones.
    #[test]
    fn long_steps_are_the_replay() {
        for pipeline in Pipeline::ALL {
            for chunks in [1, 2, 3] {
                if pipeline.plan(4, chunks, 8).is_err() {
                    continue;
                }
                let even = |seconds: f64| vec![vec![seconds / chunks as f64; chunks]; 4];
                let mut times = Times {
                    forward: even(1.0),
                    backward: even(2.0),
                    weights: even(1.0),
                    message: 0.05,
                    blocking: false,
                };
                times.forward[2][0] *= 1.3;
                times.backward[3][chunks - 1] *= 0.8;
                for micros in [3000, 3001, 3003] {
                    let plan = pipeline.plan(4, chunks, micros).unwrap();
                    let ran = plan.replay(&times);
                    let whole = ran.iter().flatten().map(|r| r.end).fold(0.0, f64::max);
                    let short = makespan(pipeline, micros, &times).unwrap();
                    let error = (short / whole - 1.0).abs();
                    assert!(
                        error <= 5e-3,
                        "{pipeline:?} {chunks} {micros}: {short} and {whole}"
                    );
                }
            }
        }
    }
}
