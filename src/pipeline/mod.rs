//! Pipelines as data: which piece of work a stage does when, and which messages go between stages.
//!
//! A model is cut into parts, which follow each other; a stage (the chips at one index of mesh axis `pp`) has one or more of
//! them, its chunks. A schedule is a list of [`Piece`]s for every stage: forward, backward, or the backward's two halves, of one
//! chunk and one micro-batch. The training loop runs these lists, the forecast replays them, tests hold them to formulas.
//!
//! With p stages, m micro-batches, v chunks a stage, F for the forward of a stage, B = I + W for its backward (the gradients of
//! inputs and of weights):
//!
//! | schedule | bubble per step | micro-batches held by a stage, at most | source |
//! |---|---|---|---|
//! | `gpipe` | (p-1)(F+B) | m | Huang et al., arXiv:1811.06965 |
//! | `1f1b` | (p-1)(F+B) | p | Narayanan et al., arXiv:1806.03377 |
//! | `1f1b`, v > 1: interleaved | (p-1)(F+B)/v | p + (p-1)/v | Narayanan et al., arXiv:2104.04473 |
//! | `zb-h1` | (p-1)(F+I-W) | p | Qi et al., arXiv:2401.10241 |
//! | `zb-v`, two chunks in a V | 0 if F = I = W | p | Qi et al., arXiv:2401.10241 |
//!
//! for m of at least p, `zb-v` for m of at least 2p-1. The bubble of a stage is the time between its first and last piece in
//! which it waits; the table has that of the stage that waits longest, with messages that take no time. A micro-batch is held
//! from its forward until the gradients of its weights are there.
//!
//! | file | what it holds |
//! |---|---|
//! | `lists` | the schedules |
//! | `slots` | layers shared out to parts |
//! | `messages` | what is sent, received and waited for between the pieces |
//! | `replay` | the lists by their real dependencies, with times |

mod lists;
mod messages;
mod replay;
mod slots;
#[cfg(test)]
mod tests;

pub use messages::{Action, Message};
pub use replay::{Ran, Times};
pub use slots::layers_of_parts;

use crate::error::{Error, ErrorKind, Result};
use std::fmt;
use std::str::FromStr;

/// How micro-batches pass through a pipeline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Schedule {
    /// All forwards, then all backwards.
    GPipe,
    /// One forward, one backward, with as few micro-batches held as there are stages; with more than one chunk a stage
    /// interleaved.
    #[default]
    OneForwardOneBackward,
    /// 1F1B whose weight gradients are put off to fill what would be a bubble.
    ZbH1,
    /// The same over two chunks a stage: parts go down the stages and come up again, so that the first stage also has the head.
    ZbV,
}

impl Schedule {
    /// All of them.
    pub const ALL: [Schedule; 4] = [
        Schedule::GPipe,
        Schedule::OneForwardOneBackward,
        Schedule::ZbH1,
        Schedule::ZbV,
    ];

    /// Its name: `gpipe`, `1f1b`, `zb-h1` or `zb-v`.
    pub fn name(self) -> &'static str {
        match self {
            Schedule::GPipe => "gpipe",
            Schedule::OneForwardOneBackward => "1f1b",
            Schedule::ZbH1 => "zb-h1",
            Schedule::ZbV => "zb-v",
        }
    }

    /// Chunks a stage has if nothing else is said.
    pub fn chunks(self) -> usize {
        match self {
            Schedule::ZbV => 2,
            _ => 1,
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Schedule {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Schedule::ALL.into_iter().find(|s| s.name() == name);
        found.ok_or_else(|| {
            let why = format!("schedule '{name}' is not known; choose gpipe, 1f1b, zb-h1 or zb-v");
            Error::new(ErrorKind::Input, why)
        })
    }
}

/// What a piece computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Work {
    /// Values.
    Forward,
    /// Gradients of inputs and weights together.
    Backward,
    /// Gradients of inputs alone; those of weights follow as [`Work::Weights`].
    Inputs,
    /// Gradients of weights.
    Weights,
}

impl Work {
    /// True if it gives the gradient that the part before waits for.
    pub fn gives_gradient(self) -> bool {
        matches!(self, Work::Backward | Work::Inputs)
    }

    /// True if nothing of the micro-batch has to be held behind it.
    pub fn frees(self) -> bool {
        matches!(self, Work::Backward | Work::Weights)
    }
}

/// One entry of a stage's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Piece {
    /// What is computed.
    pub work: Work,
    /// Which of the stage's chunks of layers.
    pub chunk: usize,
    /// Which micro-batch.
    pub micro: usize,
}

/// A schedule for so many stages, chunks and micro-batches.
///
/// ```
/// use supernode::pipeline::{Plan, Schedule, Work};
///
/// let plan = Plan::new(Schedule::OneForwardOneBackward, 2, 1, 3)?;
/// let first: Vec<_> = plan.list(0).iter().map(|p| (p.work, p.micro)).collect();
/// use Work::{Backward, Forward};
/// assert_eq!(first, [(Forward, 0), (Forward, 1), (Backward, 0), (Forward, 2), (Backward, 1), (Backward, 2)]);
/// # Ok::<(), supernode::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Plan {
    schedule: Schedule,
    stages: usize,
    chunks: usize,
    micros: usize,
}

/// Chunks of all stages times micro-batches, at most.
const MOST_PIECES: usize = 1 << 24;

impl Plan {
    /// A plan.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] if a number is 0, or the schedule does not go with so many chunks a stage.
    pub fn new(schedule: Schedule, stages: usize, chunks: usize, micros: usize) -> Result<Self> {
        let wrong = |why: String| Err(Error::new(ErrorKind::Input, why));
        for (what, n) in [
            ("stages", stages),
            ("chunks a stage", chunks),
            ("micro-batches", micros),
        ] {
            if n == 0 {
                return wrong(format!("a pipeline has at least 1 of its {what}, not 0"));
            }
        }
        // Schedules are lists, of so many pieces and a few more.
        let pieces = stages
            .checked_mul(chunks)
            .and_then(|n| n.checked_mul(micros));
        if pieces.is_none_or(|n| n > MOST_PIECES) {
            return wrong(format!(
                "{stages} stages of {chunks} chunks for {micros} micro-batches are more than the {MOST_PIECES} pieces of work that a \
                 schedule lists"
            ));
        }
        match schedule {
            Schedule::GPipe | Schedule::ZbH1 if chunks > 1 => wrong(format!(
                "{schedule} has one chunk of layers a stage, not {chunks}; 1f1b takes any number (interleaved)"
            )),
            Schedule::ZbV if chunks != 2 => wrong(format!(
                "zb-v has two chunks of layers a stage, not {chunks}; 1f1b takes any number (interleaved)"
            )),
            _ => Ok(Plan {
                schedule,
                stages,
                chunks,
                micros,
            }),
        }
    }

    /// The schedule.
    pub fn schedule(&self) -> Schedule {
        self.schedule
    }

    /// Stages.
    pub fn stages(&self) -> usize {
        self.stages
    }

    /// Chunks of each stage.
    pub fn chunks(&self) -> usize {
        self.chunks
    }

    /// Micro-batches of a step.
    pub fn micros(&self) -> usize {
        self.micros
    }

    /// Parts that the model is cut into: the first has the embedding, the last the head.
    pub fn parts(&self) -> usize {
        self.stages * self.chunks
    }

    /// The part that is chunk `chunk` of stage `stage`.
    ///
    /// # Panics
    /// If there is no such stage or chunk.
    #[track_caller]
    pub fn part(&self, stage: usize, chunk: usize) -> usize {
        assert!(
            stage < self.stages && chunk < self.chunks,
            "chunk {chunk} of stage {stage} in a pipeline of {} stages with {} chunks",
            self.stages,
            self.chunks
        );
        match (self.schedule, chunk) {
            (Schedule::ZbV, 1) => 2 * self.stages - 1 - stage,
            _ => chunk * self.stages + stage,
        }
    }

    /// Stage and chunk of a part.
    ///
    /// # Panics
    /// If there is no such part.
    #[track_caller]
    pub fn place(&self, part: usize) -> (usize, usize) {
        assert!(part < self.parts(), "part {part} of {}", self.parts());
        let (chunk, along) = (part / self.stages, part % self.stages);
        match (self.schedule, chunk) {
            (Schedule::ZbV, 1) => (self.stages - 1 - along, 1),
            _ => (along, chunk),
        }
    }

    /// The stage that has the last part: where the loss is.
    pub fn last_stage(&self) -> usize {
        self.place(self.parts() - 1).0
    }

    /// The most forwards that each stage holds at once whose weight gradients are not there yet, in chunks.
    pub fn held(&self) -> Vec<usize> {
        let most = |list: &Vec<Piece>| {
            let (mut held, mut most) = (0usize, 0);
            for piece in list {
                if piece.work == Work::Forward {
                    held += 1;
                    most = most.max(held);
                } else if piece.work.frees() {
                    held -= 1;
                }
            }
            most
        };
        self.lists().iter().map(most).collect()
    }
}
