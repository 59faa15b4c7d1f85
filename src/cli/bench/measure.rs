//! Times something repeatedly, in turn with what the machine could do at best.
//!
//! The best batch is taken, not the mean: whatever else runs can only make it slower. A batch is long enough that reading
//! the clock and waking threads do not count. On a graphics processor a batch ends when the device has done all of it.

use std::time::{Duration, Instant};
use supernode::DType;
use supernode::kernels::{MemoryStream, peak_flops};
use supernode::spmd::Chip;
#[cfg(feature = "gpu")]
use supernode::{Result, gpu};

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
#[derive(Clone, Debug)]
pub(super) struct Measured {
    /// Seconds of a run, in the best batch.
    pub(super) seconds: f64,
    /// Floating-point operations per nanosecond.
    pub(super) gflops: f64,
    /// Seconds at the limit / seconds.
    pub(super) fraction_of_peak: f64,
    pub(super) bound: Bound,
    /// On a graphics processor with timestamps: what each kernel of one run took on the device.
    #[cfg(feature = "gpu")]
    pub(super) kernels: Vec<gpu::Timed>,
}

/// Times `run` on the chip. It has run before, to be verified, and is warm.
pub(super) fn measure(chip: &Chip, demand: &Demand, mut run: impl FnMut()) -> Measured {
    let mut limit = Limit::new(chip, demand);
    let (mut best, mut spent, mut runs) = (f64::INFINITY, Duration::ZERO, 1u64);
    while spent < demand.budget || best == f64::INFINITY {
        let began = Instant::now();
        for _ in 0..runs {
            run();
        }
        settle(chip);
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
        #[cfg(feature = "gpu")]
        kernels: kernels(chip, run),
    }
}

/// Waits for what a graphics processor still computes.
fn settle(chip: &Chip) {
    #[cfg(feature = "gpu")]
    if let Some(device) = chip.memory().gpu_chip() {
        device.finish().unwrap_or_else(|e| chip.fail(e));
    }
    let _ = chip;
}

#[cfg(feature = "gpu")]
fn kernels(chip: &Chip, run: impl FnOnce()) -> Vec<gpu::Timed> {
    let device = chip.memory().gpu_chip();
    let timed = device
        .filter(|d| d.adapter().timestamps)
        .map(|d| d.timed(run));
    match timed {
        None => Vec::new(),
        Some(timed) => timed.unwrap_or_else(|e| chip.fail(e)).1,
    }
}

/// The fewest seconds that a run could take.
struct Limit<'a> {
    // Only graphics processors are asked.
    #[cfg_attr(not(feature = "gpu"), allow(dead_code))]
    chip: &'a Chip,
    demand: Demand,
    bound: Bound,
    stream: Option<MemoryStream>,
    seconds: f64,
}

impl<'a> Limit<'a> {
    /// Finds out which of the two limits is the nearer one.
    fn new(chip: &'a Chip, demand: &Demand) -> Self {
        #[cfg(feature = "gpu")]
        let on_processor = chip.memory().gpu_chip().is_none();
        #[cfg(not(feature = "gpu"))]
        let on_processor = true;
        let mut limit = Limit {
            chip,
            demand: *demand,
            bound: Bound::Compute,
            stream: on_processor.then(|| MemoryStream::new(demand.reads, demand.writes)),
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
        let (chip, bytes) = (self.chip, self.demand.reads + self.demand.writes);
        #[cfg(feature = "gpu")]
        if let Some(device) = chip.memory().gpu_chip() {
            let told = |r: Result<f64>| r.unwrap_or_else(|e| chip.fail(e));
            return match self.bound {
                Bound::Compute => self.demand.flops / told(device.peak_flops()),
                Bound::Memory => bytes as f64 / told(device.bytes_per_second(bytes)),
            };
        }
        let _ = chip;
        match (self.bound, &mut self.stream) {
            (Bound::Memory, Some(stream)) => bytes as f64 / stream.bytes_per_second(),
            _ => self.demand.flops / peak_flops(self.demand.dtype),
        }
    }

    fn measure_again(&mut self) {
        self.seconds = self.seconds.min(self.one());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
    use supernode::mesh::Mesh;
    use supernode::spmd::{Device, World};

    /// Times `run` on a chip of the processor.
    fn timed(demand: Demand, run: impl Fn() + Sync) -> Measured {
        let world = World::threads(&Mesh::single(), Device::cpu()).unwrap();
        let run = world.run(|chip| measure(chip, &demand, &run)).unwrap();
        run.into_outputs().remove(0)
    }

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
        let calls = AtomicU32::new(0);
        let measured = timed(demand(5e6, 4), || {
            calls.fetch_add(1, Relaxed);
            std::thread::sleep(Duration::from_millis(5));
        });
        assert!(measured.seconds >= 5e-3, "{measured:?}");
        let calls = calls.into_inner();
        assert!(calls >= 11, "{calls} runs of 5 ms");
        assert!(
            measured.gflops > 0.0 && measured.gflops <= 1.0,
            "{measured:?}"
        );
    }

    #[test]
    fn the_nearer_limit_is_named() {
        let pause = || std::thread::sleep(Duration::from_millis(51));
        assert_eq!(timed(demand(1e12, 4), pause).bound, Bound::Compute);
        assert_eq!(timed(demand(1.0, 1 << 20), pause).bound, Bound::Memory);
    }
}
