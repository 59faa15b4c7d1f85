//! Schedules that come out of a run: whenever a stage is free it takes the most urgent piece that is ready.
//!
//! Gradients of inputs first, for others wait for them; then a forward, of the later chunk rather than the earlier; then gradients of
//! weights, which fill what would be idle. A chunk's values are held until its weights' gradients are done, and a forward starts only
//! below the limit of memory. On a folded pipeline a first chunk leaves room for one second chunk, so the oldest micro-batch can
//! always go on and no stage waits for ever. For F = I = W this gives ZB-H1's bubble of (p - 1)(F + I - W) or less, with times as
//! they are it adapts.

use super::{Pass, Piece, Pipeline, Ran, Times};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A moment, ordered.
#[derive(Clone, Copy, PartialEq)]
struct At(f64);

impl Eq for At {}

impl PartialOrd for At {
    fn partial_cmp(&self, other: &At) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for At {
    fn cmp(&self, other: &At) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// A stage while it runs.
struct Stage {
    free: f64,
    live: usize,
    /// Micro-batches done, by chunk.
    forwards: Vec<usize>,
    inputs: Vec<usize>,
    weights: Vec<usize>,
    /// When the next pieces' needs arrived, by chunk and micro-batch.
    forward_at: Vec<Vec<f64>>,
    input_at: Vec<Vec<f64>>,
    ran: Vec<Ran>,
}

/// The order of stages that a chunk's forwards pass.
fn next(
    pipeline: Pipeline,
    stages: usize,
    chunks: usize,
    stage: usize,
    chunk: usize,
) -> Option<(usize, usize)> {
    let back = pipeline.folds() && chunk % 2 == 1;
    let last = if back { 0 } else { stages - 1 };
    if stage != last {
        return Some((if back { stage - 1 } else { stage + 1 }, chunk));
    }
    match chunk + 1 < chunks {
        true if pipeline.folds() => Some((stage, chunk + 1)),
        true => Some((0, chunk + 1)),
        false => None,
    }
}

/// The stage and chunk that a gradient goes to.
fn before(pipeline: Pipeline, stages: usize, stage: usize, chunk: usize) -> Option<(usize, usize)> {
    let back = pipeline.folds() && chunk % 2 == 1;
    let first = if back { stages - 1 } else { 0 };
    if stage != first {
        return Some((if back { stage + 1 } else { stage - 1 }, chunk));
    }
    match chunk {
        0 => None,
        _ if pipeline.folds() => Some((stage, chunk - 1)),
        _ => Some((stages - 1, chunk - 1)),
    }
}

impl Stage {
    fn new(chunks: usize, micros: usize, first: bool) -> Stage {
        let never = vec![vec![f64::INFINITY; micros]; chunks];
        let mut forward_at = never.clone();
        if first {
            forward_at[0] = vec![0.0; micros];
        }
        Stage {
            free: 0.0,
            live: 0,
            forwards: vec![0; chunks],
            inputs: vec![0; chunks],
            weights: vec![0; chunks],
            forward_at,
            input_at: never,
            ran: Vec::with_capacity(3 * chunks * micros),
        }
    }

    /// The most urgent piece that is ready.
    fn choose(&self, now: f64, limit: usize, micros: usize) -> Option<Piece> {
        let chunks = self.forwards.len();
        let ready = |done: usize, at: &[f64]| done < micros && at[done] <= now;
        let piece = |pass, chunk, micro| Some(Piece { pass, chunk, micro });
        for chunk in (0..chunks).rev() {
            if ready(self.inputs[chunk], &self.input_at[chunk]) {
                return piece(Pass::Input, chunk, self.inputs[chunk]);
            }
        }
        for chunk in (0..chunks).rev() {
            let room = limit - (chunks - 1 - chunk).min(limit - 1);
            if self.live < room && ready(self.forwards[chunk], &self.forward_at[chunk]) {
                return piece(Pass::Forward, chunk, self.forwards[chunk]);
            }
        }
        (0..chunks)
            .rev()
            .find(|c| self.weights[*c] < self.inputs[*c])
            .and_then(|c| piece(Pass::Weight, c, self.weights[c]))
    }
}

/// Runs `micros` micro-batches and returns what each stage did.
pub(super) fn run(pipeline: Pipeline, micros: usize, times: &Times) -> Vec<Vec<Ran>> {
    let (count, chunks) = (times.forward.len(), times.forward[0].len());
    let limit = pipeline.limit(count);
    let mut stages: Vec<Stage> = (0..count)
        .map(|s| Stage::new(chunks, micros, s == 0))
        .collect();
    let mut wakes = BinaryHeap::from([Reverse((At(0.0), 0usize))]);
    while let Some(Reverse((At(now), s))) = wakes.pop() {
        if stages[s].free > now {
            continue;
        }
        let Some(piece) = stages[s].choose(now, limit, micros) else {
            continue;
        };
        let end = now + times.seconds(s, &piece) + times.sending(&piece);
        let stage = &mut stages[s];
        stage.ran.push(Ran {
            piece,
            start: now,
            end,
        });
        stage.free = end;
        let (chunk, micro) = (piece.chunk, piece.micro);
        let to = match piece.pass {
            Pass::Forward => {
                stage.forwards[chunk] += 1;
                stage.live += 1;
                let to = next(pipeline, count, chunks, s, chunk);
                if to.is_none() {
                    stage.input_at[chunk][micro] = end;
                }
                to.map(|(t, c)| (t, c, Pass::Forward))
            }
            Pass::Input | Pass::Backward => {
                stage.inputs[chunk] += 1;
                before(pipeline, count, s, chunk).map(|(t, c)| (t, c, Pass::Input))
            }
            Pass::Weight => {
                stage.weights[chunk] += 1;
                stage.live -= 1;
                None
            }
        };
        wakes.push(Reverse((At(end), s)));
        if let Some((t, c, pass)) = to {
            let arrives = end + if t == s { 0.0 } else { times.message };
            let target = &mut stages[t];
            let at = match pass {
                Pass::Forward => &mut target.forward_at,
                _ => &mut target.input_at,
            };
            at[c][micro] = arrives;
            wakes.push(Reverse((At(arrives), t)));
        }
    }
    let all = stages.iter().all(|s| s.ran.len() == 3 * chunks * micros);
    assert!(all, "a stage waits for ever");
    stages.into_iter().map(|s| s.ran).collect()
}
