//! Pipelines by their real dependencies: each stage's list of forwards and backwards, replayed.
//!
//! GPipe, 1F1B and interleaved 1F1B are lists that do not depend on times. The zero-bubble schedules (Qi et al. 2023,
//! arXiv:2401.10241; ZB-V: 2024, arXiv:2405.15362) part a backward into the gradient of its input, which the stage before waits for,
//! and that of its weights, which nobody waits for. ZB-H1 is a list, ZB-V comes out of a greedy run with a limit of memory, see
//! [`greedy`]; run so, ZB-H1 had a bubble of 5 where the list's is 3.
//! DualPipe (DeepSeek-V3, arXiv:2412.19437) is priced as the V that its two directions fold into, with one micro-batch more in
//! flight; that exchanges of tokens hide behind the other direction is the step's affair.

mod greedy;

/// How micro-batches pass through a pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pipeline {
    /// All forwards, then all backwards (Huang et al. 2019).
    GPipe,
    /// One forward, one backward, with as few micro-batches in flight as there are stages (Narayanan et al. 2021); with more than
    /// one chunk a stage interleaved.
    OneForwardOneBackward,
    /// Gradients of weights fill the bubble; as much memory as 1F1B.
    ZeroBubbleH1,
    /// Two chunks a stage, the second on the way back: the last stage's neighbour is itself.
    ZeroBubbleV,
    /// Micro-batches from both ends.
    DualPipe,
}

impl Pipeline {
    /// Every schedule with its name on the command line.
    pub const ALL: [(&'static str, Pipeline); 5] = [
        ("gpipe", Pipeline::GPipe),
        ("1f1b", Pipeline::OneForwardOneBackward),
        ("zb-h1", Pipeline::ZeroBubbleH1),
        ("zb-v", Pipeline::ZeroBubbleV),
        ("dualpipe", Pipeline::DualPipe),
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        let found = Pipeline::ALL.iter().find(|(_, p)| *p == self);
        found.map_or("", |(name, _)| name)
    }

    /// Whether the second of two chunks lies on the way back.
    pub fn folds(self) -> bool {
        matches!(self, Pipeline::ZeroBubbleV | Pipeline::DualPipe)
    }

    /// Whether gradients of inputs and of weights are pieces of their own.
    pub fn parts_backward(self) -> bool {
        !matches!(self, Pipeline::GPipe | Pipeline::OneForwardOneBackward)
    }

    /// Most chunks whose values a stage holds, for a schedule that folds.
    fn limit(self, stages: usize) -> usize {
        match self {
            Pipeline::DualPipe => 2 * (stages + 1),
            _ => 2 * stages,
        }
    }
}

/// What a piece computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pass {
    /// The forward.
    Forward,
    /// All gradients.
    Backward,
    /// Gradients of inputs.
    Input,
    /// Gradients of weights.
    Weight,
}

/// One piece of a stage's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// What it computes.
    pub pass: Pass,
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
    if pipeline == Pipeline::ZeroBubbleH1 {
        return handed_down(stage, stages, micros);
    }
    // Interleaving is made for groups of as many micro-batches as there are stages: of a smaller last group the rest is left out.
    let whole = micros.next_multiple_of(stages);
    if chunks > 1 && pipeline == Pipeline::OneForwardOneBackward && whole != micros {
        let mut pieces = list(pipeline, stage, stages, chunks, whole);
        pieces.retain(|p| p.micro < micros);
        return pieces;
    }
    if pipeline.folds() {
        let even = vec![vec![1.0; chunks]; stages];
        let times = Times {
            forward: even.clone(),
            input: even.clone(),
            weight: even,
            message: 0.0,
            blocking: false,
        };
        let ran = greedy::run(pipeline, micros, &times);
        return ran[stage].iter().map(|r| r.piece).collect();
    }
    let total = chunks * micros;
    let piece = |pass: Pass, i: usize| {
        let (round, within) = (i / (stages * chunks), i % (stages * chunks));
        let group = stages.min(micros - round * stages);
        let chunk = within / group;
        let chunk = if pass == Pass::Forward {
            chunk
        } else {
            chunks - 1 - chunk
        };
        Piece {
            pass,
            chunk,
            micro: round * stages + within % group,
        }
    };
    let piece = |pass, i| match chunks {
        1 => Piece {
            pass,
            chunk: 0,
            micro: i,
        },
        _ => piece(pass, i),
    };
    let warm = match (pipeline, chunks) {
        (Pipeline::GPipe, _) => total,
        (_, 1) => stages - stage - 1,
        _ => 2 * (stages - stage - 1) + (chunks - 1) * stages,
    };
    let warm = warm.min(total);
    let mut pieces: Vec<Piece> = (0..warm).map(|i| piece(Pass::Forward, i)).collect();
    for i in warm..total {
        pieces.push(piece(Pass::Forward, i));
        pieces.push(piece(Pass::Backward, i - warm));
    }
    pieces.extend((total - warm..total).map(|i| piece(Pass::Backward, i)));
    pieces
}

/// ZB-H1: 1F1B's order of forwards and inputs' gradients, and weights' gradients as many micro-batches later as the stage has others
/// before it, so that all stages hold the same.
fn handed_down(stage: usize, stages: usize, micros: usize) -> Vec<Piece> {
    let piece = |pass, micro| Piece {
        pass,
        chunk: 0,
        micro,
    };
    let warm = (stages - stage - 1).min(micros);
    let mut pieces: Vec<Piece> = (0..warm).map(|i| piece(Pass::Forward, i)).collect();
    let mut weights = 0;
    for i in 0..micros {
        if warm + i < micros {
            pieces.push(piece(Pass::Forward, warm + i));
        }
        pieces.push(piece(Pass::Input, i));
        if i >= stage {
            pieces.push(piece(Pass::Weight, weights));
            weights += 1;
        }
    }
    pieces.extend((weights..micros).map(|i| piece(Pass::Weight, i)));
    pieces
}

/// Seconds of each stage's chunks, and of a message between stages.
#[derive(Clone, Debug)]
pub struct Times {
    /// By stage and chunk.
    pub forward: Vec<Vec<f64>>,
    /// Gradients of inputs, and all that is computed again, by stage and chunk.
    pub input: Vec<Vec<f64>>,
    /// Gradients of weights, by stage and chunk.
    pub weight: Vec<Vec<f64>>,
    /// From stage to stage.
    pub message: f64,
    /// Whether a message keeps sender and receiver from computing.
    pub blocking: bool,
}

impl Times {
    fn seconds(&self, stage: usize, piece: &Piece) -> f64 {
        let (input, weight) = (
            self.input[stage][piece.chunk],
            self.weight[stage][piece.chunk],
        );
        match piece.pass {
            Pass::Forward => self.forward[stage][piece.chunk],
            Pass::Backward => input + weight,
            Pass::Input => input,
            Pass::Weight => weight,
        }
    }

    /// What the sender of a piece's result loses.
    fn sending(&self, piece: &Piece) -> f64 {
        let sends = self.blocking && self.forward.len() > 1 && piece.pass != Pass::Weight;
        if sends { self.message } else { 0.0 }
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

/// Micro-batches, in rounds of as many as there are stages, of the shorter of two steps that a longer one is taken from.
const REPEATS: usize = 6;

/// Pieces up to which a step is replayed whole.
const WHOLE: usize = 30_000;

/// Seconds from the first piece to the last. A step of very many micro-batches repeats itself: two shorter ones are run, and what a
/// round of `stages` micro-batches adds is taken for the rest.
pub fn makespan(pipeline: Pipeline, micros: usize, times: &Times) -> f64 {
    let stages = times.forward.len();
    let end = |micros| {
        let ran = replay(pipeline, micros, times);
        ran.iter().flatten().map(|r| r.end).fold(0.0, f64::max)
    };
    let short = REPEATS * stages;
    let pieces = 3 * micros * stages * times.forward[0].len();
    if pieces <= WHOLE || micros <= short + 3 * stages {
        return end(micros);
    }
    let over = micros % stages;
    let (one, two) = (end(short + over), end(short + 2 * stages + over));
    one + (two - one) / 2.0 * ((micros - short - over) / stages) as f64
}

/// Runs the lists: a piece starts when its stage is free and what it needs has arrived. Returns what each stage did.
///
/// Panics if the lists wait for each other for ever, which no list of this module does.
pub fn replay(pipeline: Pipeline, micros: usize, times: &Times) -> Vec<Vec<Ran>> {
    if pipeline.folds() {
        return greedy::run(pipeline, micros, times);
    }
    let stages = times.forward.len();
    let chunks = times.forward[0].len();
    let lists: Vec<_> = (0..stages)
        .map(|s| list(pipeline, s, stages, chunks, micros))
        .collect();
    let at = |stage: usize, p: &Piece| {
        (((p.pass != Pass::Forward) as usize * chunks + p.chunk) * micros + p.micro) * stages
            + stage
    };
    let mut ended = vec![f64::NAN; 2 * chunks * micros * stages];
    let mut ran: Vec<Vec<Ran>> = lists.iter().map(|l| Vec::with_capacity(l.len())).collect();
    loop {
        let mut moved = false;
        for stage in 0..stages {
            while let Some(piece) = lists[stage].get(ran[stage].len()) {
                let needed = match piece.pass {
                    Pass::Weight => None,
                    _ => needs(stage, piece, stages, chunks),
                };
                let ready = match needed {
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
                let start = free.max(ready);
                let end = start + times.seconds(stage, piece) + times.sending(piece);
                if piece.pass != Pass::Weight {
                    ended[at(stage, piece)] = end;
                }
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
    let with = |pass, chunk| Piece {
        pass,
        chunk,
        micro: p.micro,
    };
    match (p.pass, stage) {
        (Pass::Forward, 0) if p.chunk == 0 => None,
        (Pass::Forward, 0) => Some((stages - 1, with(Pass::Forward, p.chunk - 1))),
        (Pass::Forward, _) => Some((stage - 1, with(Pass::Forward, p.chunk))),
        (_, s) if s + 1 < stages => Some((stage + 1, with(p.pass, p.chunk))),
        (_, _) if p.chunk + 1 == chunks => Some((stage, with(Pass::Forward, p.chunk))),
        (_, _) => Some((0, with(p.pass, p.chunk + 1))),
    }
}

/// Most micro-batch chunks whose values stage `stage` holds at once; for a schedule with a limit of memory, that limit.
pub fn in_flight(
    pipeline: Pipeline,
    stage: usize,
    stages: usize,
    chunks: usize,
    micros: usize,
) -> usize {
    // A long step holds no more than a short one.
    let micros = match pipeline {
        Pipeline::GPipe => return chunks * micros,
        _ => micros.min(stages * (chunks + 2)),
    };
    if pipeline.folds() {
        return pipeline.limit(stages).min(chunks * micros);
    }
    let (mut live, mut most) = (0usize, 0);
    for piece in list(pipeline, stage, stages, chunks, micros) {
        match piece.pass {
            Pass::Forward => live += 1,
            Pass::Input => {}
            Pass::Backward | Pass::Weight => live -= 1,
        }
        most = most.max(live);
    }
    most
}

#[cfg(test)]
mod tests;
