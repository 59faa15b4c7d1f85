//! The schedules: what each stage does, in order.

use super::{Piece, Plan, Schedule, Work};

impl Plan {
    /// What stage `stage` does in a step, in order.
    ///
    /// # Panics
    /// If there is no such stage.
    #[track_caller]
    pub fn list(&self, stage: usize) -> Vec<Piece> {
        assert!(
            stage < self.stages,
            "stage {stage} of a pipeline of {}",
            self.stages
        );
        match self.schedule {
            Schedule::GPipe => self.forwards_then_backwards(self.chunks * self.micros),
            Schedule::OneForwardOneBackward => {
                let (p, v) = (self.stages, self.chunks);
                let warm = match v {
                    1 => p - stage - 1,
                    _ => 2 * (p - stage - 1) + (v - 1) * p,
                };
                self.forwards_then_backwards(warm)
            }
            Schedule::ZbH1 => self.put_off_weights(stage),
            Schedule::ZbV => self.down_and_up().swap_remove(stage),
        }
    }

    /// What every stage does.
    pub fn lists(&self) -> Vec<Vec<Piece>> {
        match self.schedule {
            Schedule::ZbV => self.down_and_up(),
            _ => (0..self.stages).map(|stage| self.list(stage)).collect(),
        }
    }

    /// `warm` forwards, then a forward and a backward in turn, then the backwards that are left.
    ///
    /// With several chunks, micro-batches pass chunk after chunk in groups of as many as there are stages (Megatron-LM's
    /// order). If the last group is not full, the list is that of a full one without the micro-batches that are missing: a
    /// smaller group would make stages wait for each other for ever.
    fn forwards_then_backwards(&self, warm: usize) -> Vec<Piece> {
        let (p, v) = (self.stages, self.chunks);
        let total = match v {
            1 => self.micros,
            _ => v * self.micros.next_multiple_of(p),
        };
        let piece = |work, i: usize| {
            let (round, within) = (i / (p * v), i % (p * v));
            let chunk = within / p;
            match v {
                1 => Piece {
                    work,
                    chunk: 0,
                    micro: i,
                },
                _ => Piece {
                    work,
                    chunk: match work {
                        Work::Forward => chunk,
                        _ => v - 1 - chunk,
                    },
                    micro: round * p + within % p,
                },
            }
        };
        let warm = warm.min(total);
        let forward = |i| piece(Work::Forward, i);
        let backward = |i| piece(Work::Backward, i);
        let mut pieces: Vec<Piece> = (0..warm).map(forward).collect();
        for i in warm..total {
            pieces.extend([forward(i), backward(i - warm)]);
        }
        pieces.extend((total - warm..total).map(backward));
        pieces.retain(|piece| piece.micro < self.micros);
        pieces
    }

    /// 1F1B with the backward in halves: stage s puts off the weight gradients of s micro-batches, so that it holds as many as
    /// the first stage does, and works them off where 1F1B waits.
    fn put_off_weights(&self, stage: usize) -> Vec<Piece> {
        let piece = |work, micro| Piece {
            work,
            chunk: 0,
            micro,
        };
        let warm = (self.stages - stage - 1).min(self.micros);
        let mut pieces: Vec<Piece> = (0..warm).map(|i| piece(Work::Forward, i)).collect();
        for i in 0..self.micros {
            if warm + i < self.micros {
                pieces.push(piece(Work::Forward, warm + i));
            }
            pieces.push(piece(Work::Inputs, i));
            if i >= stage {
                pieces.push(piece(Work::Weights, i - stage));
            }
        }
        let left = self.micros.saturating_sub(stage)..self.micros;
        pieces.extend(left.map(|i| piece(Work::Weights, i)));
        pieces
    }

    /// Two chunks a stage in a V, found by letting all stages run with pieces of equal length. A stage does, of what is ready:
    /// a forward, the later part's first, while it holds fewer than 2p chunks; else, if it holds that many and has forwards
    /// left, a weight gradient; else the oldest input gradient; else a weight gradient.
    ///
    /// The order matters: with input gradients before weight gradients throughout, a full stage could not take the forwards
    /// that the last micro-batches need, and p-1 slots stayed empty.
    fn down_and_up(&self) -> Vec<Vec<Piece>> {
        let (p, m) = (self.stages, self.micros);
        let mut lists = vec![Vec::with_capacity(6 * m); p];
        let mut done = vec![Done::default(); 2 * p];
        while lists.iter().any(|l: &Vec<Piece>| l.len() < 6 * m) {
            // All stages choose by what was there when the slot began.
            let before = done.clone();
            for (stage, list) in lists.iter_mut().enumerate() {
                let parts = [stage, 2 * p - 1 - stage];
                let Some((work, chunk)) = self.choose(&before, parts) else {
                    continue;
                };
                let count = done[parts[chunk]].of(work);
                list.push(Piece {
                    work,
                    chunk,
                    micro: *count,
                });
                *count += 1;
            }
            assert!(before != done, "a stage can always go on");
        }
        lists
    }

    fn choose(&self, done: &[Done], parts: [usize; 2]) -> Option<(Work, usize)> {
        let (m, last) = (self.micros, done.len() - 1);
        let of = |chunk: usize| done[parts[chunk]];
        let held: usize = (0..2).map(|c| of(c).forward - of(c).weights).sum();
        let full = held >= 2 * self.stages;
        let forward = |&c: &usize| {
            let part = parts[c];
            of(c).forward < m && (part == 0 || done[part - 1].forward > of(c).forward)
        };
        let inputs = |&c: &usize| {
            let part = parts[c];
            of(c).inputs < of(c).forward && (part == last || done[part + 1].inputs > of(c).inputs)
        };
        let weights = |&c: &usize| of(c).weights < of(c).inputs;
        let oldest_weights = || {
            let ready = (0..2).filter(weights);
            ready.min_by_key(|&c| (of(c).weights, 1 - c))
        };
        let more = (0..2).any(|c| of(c).forward < m);
        let forward = [1, 0].into_iter().filter(|_| !full).find(forward);
        let forced = oldest_weights().filter(|_| full && more);
        let inputs = (0..2).filter(inputs).min_by_key(|&c| (of(c).inputs, c));
        forward
            .map(|c| (Work::Forward, c))
            .or(forced.map(|c| (Work::Weights, c)))
            .or(inputs.map(|c| (Work::Inputs, c)))
            .or_else(|| oldest_weights().map(|c| (Work::Weights, c)))
    }
}

/// How many micro-batches a part has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Done {
    forward: usize,
    inputs: usize,
    weights: usize,
}

impl Done {
    fn of(&mut self, work: Work) -> &mut usize {
        match work {
            Work::Forward => &mut self.forward,
            Work::Inputs | Work::Backward => &mut self.inputs,
            Work::Weights => &mut self.weights,
        }
    }
}
