//! What this machine could do at best: the ruler that kernels are measured with.
//!
//! Each thread counts what it does in a window of its own and the rates are added, so that neither starting nor
//! collecting the threads is counted. Clocks and neighbours change from second to second: measure in turn with what is
//! compared, and take the best of both.

use super::memory::Buffer;
use super::simd::{Kernel, Simd, TileKernel, dispatch, isa};
use crate::dtype::DType;
use std::hint::black_box;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long one measurement takes.
const WINDOW: Duration = Duration::from_millis(50);

/// Steps of every chain between two looks at the clock, which costs as much as a hundred of them.
const STEPS: u64 = 1 << 14;

/// Floating-point operations per second of the current rayon pool's threads together, a fused multiply-add counted as two:
/// a loop of independent chains in registers, for 50 ms.
///
/// bf16 is that of the unit that products use: the matrix unit (AMX), else the instruction that multiplies pairs of bf16
/// (`vdpbf16ps`), where the processor has one that is faster than f32; every other type is computed in f32.
///
/// ```
/// let peak = supernode_kernels::peak_flops(supernode_kernels::DType::F32);
/// assert!(peak > 0.0);
/// ```
pub fn peak_flops(dtype: DType) -> f64 {
    #[cfg(target_arch = "x86_64")]
    if dtype == DType::Bf16
        && let Some(unit) = super::simd::matrix_unit()
    {
        return rate(|_| {
            black_box(unit.chains(STEPS));
            STEPS * super::simd::amx::Amx::FLOPS_PER_STEP
        });
    }
    let isa = isa();
    #[cfg(target_arch = "x86_64")]
    if dtype == DType::Bf16
        && let Some(unit) = isa.pair_unit()
    {
        return rate(|_| {
            black_box(unit.chains(STEPS));
            STEPS * super::simd::PairUnit::FLOPS_PER_STEP
        });
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = dtype;
    rate(|_| {
        let chains = dispatch(isa, FmaChains { steps: STEPS });
        black_box(chains.sum);
        chains.flops
    })
}

/// What a loop of chains did.
struct Chains {
    /// Floating-point operations.
    flops: u64,
    /// Sum over the lanes of all chains.
    sum: f32,
}

/// `x <- x / 2 + 1`, `steps` times, in as many chains as a matmul has accumulators. Each ends at 2.
struct FmaChains {
    steps: u64,
}

impl Kernel for FmaChains {
    type Output = Chains;
    #[inline(always)]
    fn call<S: Simd>(self, s: S) -> Chains {
        s.tiled(self)
    }
}

impl TileKernel for FmaChains {
    type Output = Chains;
    #[inline(always)]
    fn call<S: Simd, const ROWS: usize, const VECTORS: usize>(self, s: S) -> Chains {
        // Hidden values: equal chains would be computed once. Nested loops, which are unrolled into registers; one over
        // a flattened tile is not.
        let mut x = [[s.splat(0.0); VECTORS]; ROWS];
        for (i, row) in x.iter_mut().enumerate() {
            for (j, x) in row.iter_mut().enumerate() {
                *x = s.splat(black_box((i * VECTORS + j) as f32));
            }
        }
        let (half, one) = (s.splat(black_box(0.5)), s.splat(black_box(1.0)));
        for _ in 0..self.steps {
            for row in &mut x {
                for x in row {
                    *x = s.fma(*x, half, one);
                }
            }
        }
        let mut sum = 0.0;
        for row in x {
            for x in row {
                let mut lanes = [0.0f32; 16];
                s.store_first(&mut lanes[..S::LANES], x);
                sum += lanes.iter().sum::<f32>();
            }
        }
        Chains {
            flops: 2 * self.steps * (ROWS * VECTORS * S::LANES) as u64,
            sum,
        }
    }
}

/// A stream through memory: so many bytes read and so many written in a pass, each once and in order, as an op does that
/// is limited by memory.
///
/// A working set that fits a cache is streamed from that cache, like the op's own. Larger ones than 256 MiB are cut to that
/// in proportion: no cache holds them either.
pub struct MemoryStream {
    read: Buffer,
    written: Buffer,
}

impl MemoryStream {
    /// Largest working set in bytes.
    const MOST: u64 = 256 << 20;

    /// A stream of this many bytes read and written, rounded up to whole f32.
    pub fn new(reads: u64, writes: u64) -> Self {
        let part = Self::MOST as f64 / reads.saturating_add(writes).max(Self::MOST) as f64;
        let buffer = |bytes: u64| {
            let mut buffer = Buffer::new((bytes as f64 * part) as usize / 4 * 4);
            // Pages that were never written are one page of zeros, in the cache.
            bytemuck::cast_slice_mut::<u8, f32>(buffer.as_bytes_mut()).fill(1.0);
            buffer
        };
        MemoryStream {
            read: buffer(reads.next_multiple_of(4)),
            written: buffer(writes.next_multiple_of(4)),
        }
    }

    /// Bytes per second, read and written together, of the current rayon pool's threads, each on its own part: passes for
    /// 50 ms.
    pub fn bytes_per_second(&mut self) -> f64 {
        let threads = rayon::current_num_threads();
        let read = bytemuck::cast_slice::<u8, f32>(self.read.as_bytes());
        let written = bytemuck::cast_slice_mut::<u8, f32>(self.written.as_bytes_mut());
        let (reads, writes) = (
            read.len().div_ceil(threads).max(1),
            written.len().div_ceil(threads).max(1),
        );
        let mut read = read.chunks(reads);
        let mut written = written.chunks_mut(writes);
        let parts: Vec<Mutex<(&[f32], &mut [f32])>> = (0..threads)
            .map(|_| {
                Mutex::new((
                    read.next().unwrap_or_default(),
                    written.next().unwrap_or_default(),
                ))
            })
            .collect();
        let isa = isa();
        rate(|thread| {
            let mut part = parts[thread].lock().unwrap_or_else(PoisonError::into_inner);
            let (read, written) = &mut *part;
            let bytes = 4 * (read.len() + written.len()) as u64;
            if bytes == 0 {
                return 0;
            }
            // Looking at the clock after a pass over a few lines would be most of the time.
            let passes = (1u64 << 20).div_ceil(bytes);
            for _ in 0..passes {
                black_box(dispatch(isa, Sum(black_box(read))));
                dispatch(isa, Fill(black_box(written), 1.0));
            }
            passes * bytes
        })
    }
}

impl std::fmt::Debug for MemoryStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (reads, writes) = (self.read.len(), self.written.len());
        write!(
            f,
            "MemoryStream({reads} bytes read, {writes} bytes written)"
        )
    }
}

/// The sum of the elements, in an order that follows the instruction set: a ruler, no result.
struct Sum<'a>(&'a [f32]);

impl Kernel for Sum<'_> {
    type Output = f32;
    #[inline(always)]
    fn call<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.splat(0.0); 8];
        let mut blocks = self.0.chunks_exact(8 * S::LANES);
        for block in &mut blocks {
            for (sum, x) in sums.iter_mut().zip(block.chunks_exact(S::LANES)) {
                *sum = s.add(*sum, s.load(x));
            }
        }
        for x in blocks.remainder().chunks(S::LANES) {
            sums[0] = s.add(sums[0], s.load_first(x));
        }
        let sum = sums[1..].iter().fold(sums[0], |a, b| s.add(a, *b));
        let mut lanes = [0.0f32; 16];
        s.store_first(&mut lanes[..S::LANES], sum);
        lanes.iter().sum()
    }
}

/// Writes one value everywhere.
struct Fill<'a>(&'a mut [f32], f32);

impl Kernel for Fill<'_> {
    type Output = ();
    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let value = s.splat(self.1);
        let mut vectors = self.0.chunks_exact_mut(S::LANES);
        for y in &mut vectors {
            s.store(y, value);
        }
        s.store_first(vectors.into_remainder(), value);
    }
}

/// Runs `work`, which is given the thread's number and returns how much it did, on every thread of the pool until the
/// window is over: the sum of the threads' rates, per second.
fn rate(work: impl Fn(usize) -> u64 + Sync) -> f64 {
    let rates = rayon::broadcast(|context| {
        let (began, mut done) = (Instant::now(), 0);
        loop {
            done += work(context.index());
            let elapsed = began.elapsed();
            if elapsed >= WINDOW {
                return done as f64 / elapsed.as_secs_f64();
            }
        }
    });
    rates.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;

    #[test]
    fn chains_are_computed_to_the_end_and_counted() {
        for isa in Isa::available() {
            let [short, long] = [40, 80].map(|steps| dispatch(isa, FmaChains { steps }));
            assert_eq!(long.flops, 2 * short.flops, "{isa:?}");
            // Every lane of every chain is 2 in the end; a chain counts two operations a step.
            assert_eq!(
                long.sum as u64 * 80,
                long.flops,
                "{isa:?}: {} flops",
                long.flops
            );
            assert_eq!(short.sum, long.sum, "{isa:?}");
        }
    }

    #[test]
    fn streams_read_and_write_every_element() {
        for isa in Isa::available() {
            for n in [0, 1, 7, 16, 127, 128, 1000] {
                let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
                let want = x.iter().sum::<f32>();
                assert_eq!(dispatch(isa, Sum(&x)), want, "{isa:?} {n}");
                let mut y = vec![0.0f32; n + 1];
                dispatch(isa, Fill(&mut y[..n], 3.0));
                assert!(y[..n].iter().all(|&y| y == 3.0), "{isa:?} {n}");
                assert_eq!(y[n], 0.0, "{isa:?} {n}: beyond the end");
            }
        }
    }

    #[test]
    fn every_thread_is_measured() {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(3)
            .build()
            .unwrap();
        let rates = pool.install(|| {
            let mut stream = MemoryStream::new(64, 8);
            [
                peak_flops(DType::F32),
                peak_flops(DType::Bf16),
                stream.bytes_per_second(),
            ]
        });
        assert!(rates.iter().all(|&r| r > 0.0 && r.is_finite()), "{rates:?}");
        let seen = Mutex::new(vec![false; 3]);
        pool.install(|| {
            rate(|thread| {
                seen.lock().unwrap()[thread] = true;
                1
            })
        });
        assert_eq!(seen.into_inner().unwrap(), [true; 3]);
    }

    #[test]
    fn large_streams_are_cut_in_proportion() {
        let stream = MemoryStream::new(3 << 30, 1 << 30);
        assert_eq!(stream.read.len(), 192 << 20);
        assert_eq!(stream.written.len(), 64 << 20);
        assert_eq!(MemoryStream::new(5, 0).read.len(), 8);
    }
}
