//! The world of threads: every chip is a rayon pool that owns a share of this machine's cores, and its program runs inside
//! that pool as a worker, because entering a pool from outside costs tens of microseconds per op.

use super::chip::Setup;
use super::exchange::{Exchange, Stopped};
use super::{Chip, Device};
use crate::collective::Algorithm;
use crate::error::{Error, ErrorKind, Result};
use crate::mesh::Mesh;
use crate::trace::{ChipTrace, Class, Trace};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// More chips than this on one machine are a mistake: each is an operating-system thread at least.
const MOST_CHIPS: usize = 1024;

/// A mesh of chips that are slices of this machine.
#[derive(Clone, Debug)]
pub struct Threads {
    mesh: Arc<Mesh>,
    device: Device,
    threads: usize,
    seed: u64,
    algorithm: Algorithm,
    budget: Option<u64>,
    deadline: Duration,
}

/// What a run leaves.
#[derive(Debug)]
pub struct Run<T> {
    outputs: Vec<T>,
    trace: Trace,
    pool_peaks: Vec<u64>,
}

impl<T> Run<T> {
    /// What the program returned, by rank.
    pub fn outputs(&self) -> &[T] {
        &self.outputs
    }

    /// What the program returned, by rank.
    pub fn into_outputs(self) -> Vec<T> {
        self.outputs
    }

    /// What every chip did.
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    /// The highest number of bytes that each chip's tensor pool had handed out, by its own count, by rank.
    pub fn pool_peaks(&self) -> &[u64] {
        &self.pool_peaks
    }
}

impl Threads {
    pub(super) fn new(mesh: &Mesh, device: Device) -> Result<Self> {
        let chips = mesh.chips();
        if chips > MOST_CHIPS {
            return Err(Error::new(
                ErrorKind::Mesh,
                format!(
                    "the mesh {mesh} has {chips} chips and threads carry at most {MOST_CHIPS}; trace it with a ghost instead"
                ),
            ));
        }
        device.check(None)?;
        Ok(Threads {
            mesh: Arc::new(mesh.clone()),
            device,
            threads: (cores()? / chips).max(1),
            seed: 0,
            algorithm: Algorithm::Tree,
            budget: None,
            deadline: Duration::from_secs(600),
        })
    }

    /// Threads of each chip; by default the machine's cores shared out, at least one. Where that is more than the cores carry, the
    /// programs take turns: each computes until it waits for another chip, 0.4 s at most while others wait for theirs.
    ///
    /// # Panics
    /// If `threads` is 0.
    pub fn with_threads(mut self, threads: usize) -> Self {
        assert!(threads > 0, "a chip needs a thread");
        self.threads = threads;
        self
    }

    /// The seed of initial weights, dropout and batches; 0 by default.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// How collectives are done; by default [`Algorithm::Tree`], whose sums follow the fixed binary tree over ranks. Another
    /// choice may change the last bits of sums: `collective::order` states its order.
    pub fn with_algorithm(mut self, algorithm: Algorithm) -> Self {
        self.algorithm = algorithm;
        self
    }

    /// The budget of each chip's tensors, in bytes; none by default.
    pub fn with_memory_budget(mut self, bytes: u64) -> Self {
        self.budget = Some(bytes);
        self
    }

    /// How long a chip waits for another before the run is given up; 10 minutes by default.
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// The same chips under other names of axes: `mesh` has as many.
    pub(crate) fn seen_as(&self, mesh: Mesh) -> Self {
        assert_eq!(mesh.chips(), self.mesh.chips(), "{mesh} for {}", self.mesh);
        Threads {
            mesh: Arc::new(mesh),
            ..self.clone()
        }
    }

    /// The mesh.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// What the chips compute on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The run's seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Threads of each chip.
    pub fn threads_per_chip(&self) -> usize {
        self.threads
    }

    /// Runs the program on every chip at once.
    ///
    /// # Errors
    /// The first failure of any chip, with the chip's name and where its program was: a panic, an exceeded budget, a
    /// deadlock, calls that do not match, a missed deadline. The others are stopped.
    pub fn run<T: Send>(&self, program: impl Fn(&Chip) -> T + Sync) -> Result<Run<T>> {
        let exchange = Exchange::new(self.mesh.clone(), self.deadline, self.at_once());
        let began = Instant::now();
        let ends: Vec<Option<End<T>>> = std::thread::scope(|scope| {
            let one = |rank: usize| {
                let (exchange, program) = (&exchange, &program);
                let body = move || self.rank(rank, exchange, began, program);
                let name = format!("supernode rank {rank}");
                let handle = std::thread::Builder::new()
                    .name(name)
                    .spawn_scoped(scope, body);
                if let Err(e) = &handle {
                    let why = format!("cannot start a thread: {e}");
                    exchange.fail(rank, Error::new(ErrorKind::Io, why));
                }
                handle.ok()
            };
            let handles: Vec<_> = (0..self.mesh.chips()).map(one).collect();
            handles
                .into_iter()
                .map(|h| h.and_then(|h| h.join().ok().flatten()))
                .collect()
        });
        if let Some(error) = exchange.error() {
            return Err(error);
        }
        let mut run = Run {
            outputs: Vec::new(),
            trace: Trace {
                world: "threads".into(),
                mesh: (*self.mesh).clone(),
                classes: Vec::new(),
            },
            pool_peaks: Vec::new(),
        };
        for (rank, end) in ends.into_iter().enumerate() {
            let end = end.ok_or_else(|| {
                Error::new(
                    ErrorKind::Chip,
                    format!("{} ended without a result", exchange.name(rank)),
                )
            })?;
            run.outputs.push(end.output);
            run.pool_peaks.push(end.pool_peak);
            let pattern = self
                .mesh
                .coordinates(rank)
                .iter()
                .copied()
                .map(Some)
                .collect();
            run.trace.classes.push(Class {
                pattern,
                chip: end.trace,
            });
        }
        Ok(run)
    }

    /// How many programs may compute at a time. One that drives another device leaves the cores to others by itself.
    fn at_once(&self) -> usize {
        if self.device.is_cpu() {
            (machine() / self.threads).max(1)
        } else {
            self.mesh.chips()
        }
    }

    fn rank<T: Send>(
        &self,
        rank: usize,
        exchange: &Arc<Exchange>,
        began: Instant,
        program: &(impl Fn(&Chip) -> T + Sync),
    ) -> Option<End<T>> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(self.threads)
            .thread_name(move |t| format!("supernode rank {rank} thread {t}"))
            .build();
        let pool = match pool {
            Ok(pool) => pool,
            Err(e) => {
                let why = format!("cannot start {} threads: {e}", self.threads);
                exchange.fail(rank, Error::new(ErrorKind::Io, why));
                return None;
            }
        };
        let memory = match self.device.memory(rank, self.budget) {
            Ok(memory) => memory,
            Err(error) => {
                exchange.fail(rank, error);
                return None;
            }
        };
        let run = || {
            let lane = exchange.lane(rank);
            lane.begin()
                .unwrap_or_else(|Stopped| std::panic::resume_unwind(Box::new(Stopped)));
            let chip = Chip::new(Setup {
                mesh: self.mesh.clone(),
                rank,
                memory: memory.clone(),
                seed: self.seed,
                algorithm: self.algorithm,
                kinds: self.device.kinds(self.mesh.chips()),
                began,
                lane: Some(lane),
            });
            let output = program(&chip);
            let trace = chip.finish().trace;
            let pool_peak = chip.memory().pool_peak().unwrap_or(0);
            End {
                output,
                trace,
                pool_peak,
            }
        };
        match pool.install(|| catch_unwind(AssertUnwindSafe(run))) {
            Ok(end) => {
                exchange.end(rank);
                Some(end)
            }
            Err(payload) if payload.is::<Stopped>() => None,
            Err(payload) => {
                exchange.fail(rank, failure(payload));
                None
            }
        }
    }
}

/// Cores that are shared out: `RAYON_NUM_THREADS` in the environment, else what the system tells.
///
/// # Errors
/// [`ErrorKind::Input`] if the variable holds no number of threads.
fn cores() -> Result<usize> {
    let told = std::env::var_os(THREADS).filter(|told| !told.is_empty());
    let Some(told) = told else {
        return Ok(machine());
    };
    let number = told.to_str().and_then(|told| told.parse().ok());
    number
        .filter(|n| (1..=MOST_THREADS).contains(n))
        .ok_or_else(|| {
            let why = format!(
                "{THREADS}={} in the environment is no number of threads from 1 to {MOST_THREADS}",
                told.to_string_lossy()
            );
            Error::new(ErrorKind::Input, why)
        })
}

/// Cores that the system tells.
fn machine() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The variable that users of rayon set.
const THREADS: &str = "RAYON_NUM_THREADS";
const MOST_THREADS: usize = 1024;

struct End<T> {
    output: T,
    trace: ChipTrace,
    pool_peak: u64,
}

/// The error that a program's unwinding carries.
pub(super) fn failure(payload: Box<dyn Any + Send>) -> Error {
    match payload.downcast::<Error>() {
        Ok(error) => *error,
        Err(payload) => {
            let text = payload.downcast_ref::<&str>().map(|s| s.to_string());
            let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
            let text = text.unwrap_or_else(|| "a panic without a message".into());
            Error::new(ErrorKind::Chip, format!("the program panicked: {text}"))
        }
    }
}
