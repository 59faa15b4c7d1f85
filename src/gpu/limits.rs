//! What a device could do at best, to hold a kernel's speed against: a loop of multiply-adds in registers, and a copy through
//! its memory. The best of some runs is taken: whatever else runs can only make them slower.

use super::chip::Chip;
use super::launch::{Launch, Operand};
use super::library as k;
use crate::dtype::DType;
use crate::error::Result;
use std::time::Instant;

/// Multiply-adds of an invocation in a round of the loop.
const IN_A_ROUND: usize = 8 * 4;
/// Runs of which the best counts.
const RUNS: usize = 5;

impl Chip {
    fn best_of(&self, run: impl Fn()) -> Result<f64> {
        run();
        self.finish()?;
        let mut best = f64::INFINITY;
        for _ in 0..RUNS {
            let began = Instant::now();
            run();
            self.finish()?;
            best = best.min(began.elapsed().as_secs_f64());
        }
        Ok(best)
    }

    /// f32 working memory on the chip.
    pub(super) fn working(&self, elements: usize) -> Result<Operand> {
        let block = self.allocate((elements * 4) as u64)?;
        Ok(Operand::holding(self, block, DType::F32, elements))
    }

    /// Floating-point operations a second of multiply-adds in f32, in which all kernels compute.
    ///
    /// # Errors
    /// As [`Chip::finish`].
    pub fn peak_flops(&self) -> Result<f64> {
        // A software device has few lanes; a card wants many invocations on each.
        let software = self.device().is_software();
        let (count, rounds) = if software {
            (1 << 9, 1 << 14)
        } else {
            (1 << 20, 1 << 10)
        };
        let y = self.working(count)?;
        let seconds = self.best_of(|| {
            Launch::new(&k::PEAK)
                .operand("y", y.clone())
                .number("rounds", rounds as u32)
                .run(count);
        })?;
        Ok((2 * IN_A_ROUND * count * rounds) as f64 / seconds)
    }

    /// Bytes a second that the device moves when it copies `bytes` of its memory, those read and those written.
    ///
    /// # Errors
    /// As [`Chip::finish`], or if the device has no room for two blocks of half as many.
    pub fn bytes_per_second(&self, bytes: u64) -> Result<f64> {
        let most = self.adapter().largest_tensor / 2;
        let half = (bytes / 2).clamp(1 << 16, most).next_multiple_of(64);
        let [from, to] = [self.allocate(half)?, self.allocate(half)?];
        let seconds = self.best_of(|| self.copy(&from.buffer, &to.buffer, 0, half))?;
        Ok(2.0 * half as f64 / seconds)
    }
}
