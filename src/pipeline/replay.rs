//! The lists by their real dependencies: a piece starts when its stage is free and what it needs has arrived.

use super::{Piece, Plan, Work};

/// Seconds of each stage's chunks, and of a message between stages.
#[derive(Clone, Debug)]
pub struct Times {
    /// By stage and chunk.
    pub forward: Vec<Vec<f64>>,
    /// Gradients of inputs and weights together, by stage and chunk.
    pub backward: Vec<Vec<f64>>,
    /// What of `backward` the gradients of weights take, by stage and chunk.
    pub weights: Vec<Vec<f64>>,
    /// From stage to stage.
    pub message: f64,
    /// Whether a message keeps sender and receiver from computing.
    pub blocking: bool,
}

impl Times {
    fn of(&self, stage: usize, piece: &Piece) -> f64 {
        let table = |t: &[Vec<f64>]| t[stage][piece.chunk];
        match piece.work {
            Work::Forward => table(&self.forward),
            Work::Backward => table(&self.backward),
            Work::Inputs => table(&self.backward) - table(&self.weights),
            Work::Weights => table(&self.weights),
        }
    }
}

/// A piece when it ran.
#[derive(Clone, Copy, Debug)]
pub struct Ran {
    /// What ran.
    pub piece: Piece,
    /// Seconds since the step began.
    pub start: f64,
    /// Seconds since the step began.
    pub end: f64,
}

impl Plan {
    /// Runs the lists. Returns what each stage did.
    ///
    /// # Panics
    /// If the lists wait for each other for ever, which no list of this module does; or if `times` is of another number of
    /// stages or chunks.
    #[track_caller]
    pub fn replay(&self, times: &Times) -> Vec<Vec<Ran>> {
        let shape: Vec<usize> = times.forward.iter().map(Vec::len).collect();
        assert_eq!(
            shape,
            vec![self.chunks; self.stages],
            "times are given by stage and chunk"
        );
        let lists = self.lists();
        let mut ended = vec![f64::NAN; 3 * self.parts() * self.micros];
        let at = |kind: usize, part: usize, micro: usize| {
            (kind * self.parts() + part) * self.micros + micro
        };
        let mut ran: Vec<Vec<Ran>> = lists.iter().map(|l| Vec::with_capacity(l.len())).collect();
        loop {
            let mut moved = false;
            for stage in 0..self.stages {
                while let Some(piece) = lists[stage].get(ran[stage].len()) {
                    let part = self.part(stage, piece.chunk);
                    let (needs, sends) = self.needs(part, piece.work);
                    let ready = match needs {
                        None => 0.0,
                        Some((kind, from)) => {
                            let arrived = ended[at(kind, from, piece.micro)];
                            if arrived.is_nan() {
                                break;
                            }
                            let here = self.place(from).0 == stage;
                            arrived + if here { 0.0 } else { times.message }
                        }
                    };
                    let free = ran[stage].last().map_or(0.0, |r: &Ran| r.end);
                    let start = free.max(ready);
                    let blocks = times.blocking && sends && self.stages > 1;
                    let end =
                        start + times.of(stage, piece) + if blocks { times.message } else { 0.0 };
                    ended[at(kind_of(piece.work), part, piece.micro)] = end;
                    ran[stage].push(Ran {
                        piece: *piece,
                        start,
                        end,
                    });
                    moved = true;
                }
            }
            if !moved {
                break;
            }
        }
        let all = lists.iter().zip(&ran).all(|(l, r)| l.len() == r.len());
        assert!(all, "the lists of {self:?} wait for each other");
        ran
    }

    /// What must have ended before a piece (kind and part), and whether its own end is a message to somebody.
    fn needs(&self, part: usize, work: Work) -> (Option<(usize, usize)>, bool) {
        let last = self.parts() - 1;
        match work {
            Work::Forward => (part.checked_sub(1).map(|before| (0, before)), true),
            Work::Weights => (Some((1, part)), false),
            _ if part == last => (Some((0, part)), true),
            _ => (Some((1, part + 1)), true),
        }
    }
}

fn kind_of(work: Work) -> usize {
    match work {
        Work::Forward => 0,
        Work::Backward | Work::Inputs => 1,
        Work::Weights => 2,
    }
}
