//! Times something repeatedly, in turn with what the machine could do at best.
//!
//! The best batch is taken, not the mean: whatever else runs can only make it slower. A batch is long enough that reading
//! the clock and waking threads do not count.

use std::time::{Duration, Instant};
use supernode::DType;
use supernode::kernels::{MemoryStream, peak_flops};

/// Shortest batch of runs.
const BATCH: Duration = Duration::from_millis(50);

/// What one run has to do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Demand {
    /// Floating-point operations, as other libraries' are counted.
    pub(super) flops: f64,
    /// Bytes read at least.
    pub(super) reads: u64,
    /// Bytes written at least.
    pub(super) writes: u64,
    /// Type of the operands.
    pub(super) dtype: DType,
    /// For how long batches are timed.
    pub(super) budget: Duration,
}

/// What limits a run on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bound {
    /// Arithmetic: the limit is a loop of multiply-adds in registers.
    Compute,
    /// Memory: the limit is a stream through as many bytes.
    Memory,
}

impl Bound {
    pub(super) fn name(self) -> &'static str {
        match self {
            Bound::Compute => "compute",
            Bound::Memory => "memory",
        }
    }
}

/// What was found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measured {
    /// Seconds of a run, in the best batch.
    pub(super) seconds: f64,
    /// Floating-point operations per nanosecond.
    pub(super) gflops: f64,
    /// Seconds at the limit / seconds.
    pub(super) fraction_of_peak: f64,
    pub(super) bound: Bound,
}

/// Times `run` on the threads of the current pool. It has run before, to be verified, and is warm.
pub(super) fn measure(demand: &Demand, mut run: impl FnMut()) -> Measured {
    let mut limit = Limit::new(demand);
    let (mut best, mut spent, mut runs) = (f64::INFINITY, Duration::ZERO, 1u64);
    while spent < demand.budget || best == f64::INFINITY {
        let began = Instant::now();
        for _ in 0..runs {
            run();
        }
        let elapsed = began.elapsed();
        if elapsed < BATCH {
            // Too short to count. Beyond the goal, so that a slightly faster batch is long enough as well.
            let more = 1.2 * BATCH.as_secs_f64() / elapsed.as_secs_f64().max(1e-9);
            runs = ((runs as f64 * more) as u64).max(runs + 1);
            continue;
        }
        best = best.min(elapsed.as_secs_f64() / runs as f64);
        spent += elapsed;
        limit.measure_again();
    }
    Measured {
        seconds: best,
        gflops: demand.flops / best / 1e9,
        fraction_of_peak: limit.seconds / best,
        bound: limit.bound,
    }
}

/// The fewest seconds that a run could take.
struct Limit {
    demand: Demand,
    bound: Bound,
    stream: MemoryStream,
    seconds: f64,
}

impl Limit {
    /// Finds out which of the two limits is the nearer one.
    fn new(demand: &Demand) -> Self {
        let mut limit = Limit {
            demand: *demand,
            bound: Bound::Compute,
            stream: MemoryStream::new(demand.reads, demand.writes),
            seconds: f64::INFINITY,
        };
        let compute = limit.one();
        limit.bound = Bound::Memory;
        let memory = limit.one();
        if compute >= memory {
            limit.bound = Bound::Compute;
        }
        limit.seconds = compute.max(memory);
        limit
    }

    fn one(&mut self) -> f64 {
        match self.bound {
            Bound::Compute => self.demand.flops / peak_flops(self.demand.dtype),
            Bound::Memory => {
                (self.demand.reads + self.demand.writes) as f64 / self.stream.bytes_per_second()
            }
        }
    }

    fn measure_again(&mut self) {
        self.seconds = self.seconds.min(self.one());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn demand(flops: f64, reads: u64) -> Demand {
        Demand {
            flops,
            reads,
            writes: 0,
            dtype: DType::F32,
            budget: Duration::from_millis(60),
        }
    }

    #[test]
    fn a_sleep_takes_its_time_and_is_repeated_until_batches_are_long() {
        let calls = Cell::new(0);
        let measured = measure(&demand(5e6, 4), || {
            calls.set(calls.get() + 1);
            std::thread::sleep(Duration::from_millis(5));
        });
        assert!(measured.seconds >= 5e-3, "{measured:?}");
        assert!(calls.get() >= 11, "{} runs of 5 ms", calls.get());
        assert!(
            measured.gflops > 0.0 && measured.gflops <= 1.0,
            "{measured:?}"
        );
    }

    #[test]
    fn the_nearer_limit_is_named() {
        let pause = || std::thread::sleep(Duration::from_millis(51));
        assert_eq!(measure(&demand(1e12, 4), pause).bound, Bound::Compute);
        assert_eq!(measure(&demand(1.0, 1 << 20), pause).bound, Bound::Memory);
    }
}
