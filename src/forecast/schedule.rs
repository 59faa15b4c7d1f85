//! Pipelines by their real dependencies: each stage's list of forwards and backwards, replayed.

/// How micro-batches pass through a pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pipeline {
    /// All forwards, then all backwards (Huang et al. 2019).
    GPipe,
    /// One forward, one backward, with as few micro-batches in flight as there are stages (Narayanan et al. 2021); with more than
    /// one chunk a stage interleaved.
    OneForwardOneBackward,
}

/// One piece of a stage's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Backward, or forward.
    pub backward: bool,
    /// The stage's chunk of layers.
    pub chunk: usize,
    /// The micro-batch.
    pub micro: usize,
}

/// What stage `stage` of `stages`, each with `chunks` chunks, does with `micros` micro-batches, in order.
///
/// Interleaving follows Megatron-LM: micro-batches in groups of `stages` pass chunk after chunk.
pub fn list(
    pipeline: Pipeline,
    stage: usize,
    stages: usize,
    chunks: usize,
    micros: usize,
) -> Vec<Piece> {
    let total = chunks * micros;
    let piece = |backward: bool, i: usize| {
        let (round, within) = (i / (stages * chunks), i % (stages * chunks));
        let group = stages.min(micros - round * stages);
        let chunk = within / group;
        let chunk = if backward { chunks - 1 - chunk } else { chunk };
        Piece {
            backward,
            chunk,
            micro: round * stages + within % group,
        }
    };
    let piece = |backward, i| match chunks {
        1 => Piece {
            backward,
            chunk: 0,
            micro: i,
        },
        _ => piece(backward, i),
    };
    let warm = match (pipeline, chunks) {
        (Pipeline::GPipe, _) => total,
        (_, 1) => stages - stage - 1,
        _ => 2 * (stages - stage - 1) + (chunks - 1) * stages,
    };
    let warm = warm.min(total);
    let mut pieces: Vec<Piece> = (0..warm).map(|i| piece(false, i)).collect();
    for i in warm..total {
        pieces.push(piece(false, i));
        pieces.push(piece(true, i - warm));
    }
    pieces.extend((total - warm..total).map(|i| piece(true, i)));
    pieces
}

/// Seconds of each stage's chunks, and of a message between stages.
#[derive(Clone, Debug)]
pub struct Times {
    /// By stage and chunk.
    pub forward: Vec<Vec<f64>>,
    /// By stage and chunk.
    pub backward: Vec<Vec<f64>>,
    /// From stage to stage.
    pub message: f64,
    /// Whether a message keeps sender and receiver from computing.
    pub blocking: bool,
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

/// Runs the lists: a piece starts when its stage is free and what it needs has arrived. Returns what each stage did.
///
/// Panics if the lists wait for each other for ever, which no list of this module does.
pub fn replay(pipeline: Pipeline, micros: usize, times: &Times) -> Vec<Vec<Ran>> {
    let stages = times.forward.len();
    let chunks = times.forward[0].len();
    let lists: Vec<_> = (0..stages)
        .map(|s| list(pipeline, s, stages, chunks, micros))
        .collect();
    let at = |stage: usize, p: &Piece| {
        ((p.backward as usize * chunks + p.chunk) * micros + p.micro) * stages + stage
    };
    let mut ended = vec![f64::NAN; 2 * chunks * micros * stages];
    let mut ran: Vec<Vec<Ran>> = lists.iter().map(|l| Vec::with_capacity(l.len())).collect();
    loop {
        let mut moved = false;
        for stage in 0..stages {
            while let Some(piece) = lists[stage].get(ran[stage].len()) {
                let ready = match needs(stage, piece, stages, chunks) {
                    None => 0.0,
                    Some((from, need)) => {
                        let arrived = ended[at(from, &need)];
                        if arrived.is_nan() {
                            break;
                        }
                        arrived + if from == stage { 0.0 } else { times.message }
                    }
                };
                let free = ran[stage].last().map_or(0.0, |r| r.end);
                let table = if piece.backward {
                    &times.backward
                } else {
                    &times.forward
                };
                let start = free.max(ready);
                let sends = times.blocking && stages > 1;
                let end =
                    start + table[stage][piece.chunk] + if sends { times.message } else { 0.0 };
                ended[at(stage, piece)] = end;
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
    assert!(all, "the pipeline's lists wait for each other");
    ran
}

/// The piece that must have ended before, and its stage.
fn needs(stage: usize, p: &Piece, stages: usize, chunks: usize) -> Option<(usize, Piece)> {
    let with = |backward, chunk| Piece {
        backward,
        chunk,
        micro: p.micro,
    };
    match (p.backward, stage) {
        (false, 0) if p.chunk == 0 => None,
        (false, 0) => Some((stages - 1, with(false, p.chunk - 1))),
        (false, _) => Some((stage - 1, with(false, p.chunk))),
        (true, s) if s + 1 < stages => Some((stage + 1, with(true, p.chunk))),
        (true, _) if p.chunk + 1 == chunks => Some((stage, with(false, p.chunk))),
        (true, _) => Some((0, with(true, p.chunk + 1))),
    }
}

/// Most micro-batch chunks whose values stage `stage` holds at once.
pub fn in_flight(
    pipeline: Pipeline,
    stage: usize,
    stages: usize,
    chunks: usize,
    micros: usize,
) -> usize {
    let (mut live, mut most) = (0usize, 0);
    for piece in list(pipeline, stage, stages, chunks, micros) {
        if piece.backward {
            live -= 1;
        } else {
            live += 1;
            most = most.max(live);
        }
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    fn even(stages: usize, chunks: usize) -> Times {
        let forward = vec![vec![1.0 / chunks as f64; chunks]; stages];
        let backward = vec![vec![2.0 / chunks as f64; chunks]; stages];
        Times {
            forward,
            backward,
            message: 0.0,
            blocking: false,
        }
    }

    #[test]
    fn every_piece_appears_once() {
        for pipeline in [Pipeline::GPipe, Pipeline::OneForwardOneBackward] {
            for (stages, chunks, micros) in [(1, 1, 3), (4, 1, 8), (4, 2, 8), (3, 3, 9), (4, 1, 2)]
            {
                for stage in 0..stages {
                    let mut seen = std::collections::BTreeSet::new();
                    for p in list(pipeline, stage, stages, chunks, micros) {
                        assert!(p.chunk < chunks && p.micro < micros);
                        assert!(seen.insert((p.backward, p.chunk, p.micro)), "{p:?} twice");
                    }
                    assert_eq!(seen.len(), 2 * chunks * micros);
                }
            }
        }
    }

    /// (p-1)(F+B) for GPipe and 1F1B, a v-th of it interleaved.
    #[test]
    fn the_bubble_is_the_formulas() {
        for (pipeline, stages, chunks, micros) in [
            (Pipeline::GPipe, 4, 1, 8),
            (Pipeline::OneForwardOneBackward, 4, 1, 8),
            (Pipeline::OneForwardOneBackward, 8, 1, 8),
            (Pipeline::OneForwardOneBackward, 4, 2, 8),
            (Pipeline::OneForwardOneBackward, 8, 3, 64),
        ] {
            let ran = replay(pipeline, micros, &even(stages, chunks));
            let end = ran.iter().flatten().map(|r| r.end).fold(0.0, f64::max);
            let bubble = 3.0 * (stages - 1) as f64 / chunks as f64;
            let error = (end - 3.0 * micros as f64 - bubble).abs();
            assert!(
                error <= 1e-9,
                "{pipeline:?} {stages} {chunks} {micros}: {end}"
            );
        }
    }

    #[test]
    fn values_in_flight_are_the_formulas() {
        assert_eq!(in_flight(Pipeline::GPipe, 0, 4, 1, 8), 8);
        assert_eq!(in_flight(Pipeline::OneForwardOneBackward, 0, 4, 1, 8), 4);
        assert_eq!(in_flight(Pipeline::OneForwardOneBackward, 3, 4, 1, 8), 1);
        // p v + p - 1 chunks: p (1 + (p-1)/(p v)) micro-batches.
        assert_eq!(in_flight(Pipeline::OneForwardOneBackward, 0, 4, 2, 16), 11);
    }
}
