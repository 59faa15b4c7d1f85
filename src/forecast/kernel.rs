//! What a kernel costs on a chip: the roofline, with tiles and waves where they explain the measured times.
//!
//! A product runs in waves of tiles, one tile on each of the chip's cores:
//! `seconds = waves * 2 tm tn (k + prologue) / (peak / cores * efficiency * tile's efficiency)`, with the best of eight tiles, and
//! never below `bytes / (bandwidth * share)`. Of 20 products measured alone on an A100 this misses none by more than 5 %; a
//! constant efficiency misses narrow ones by a factor. A streaming kernel is `bytes / (bandwidth * share of its class)`.

use super::work::{Rows, Work};
use crate::cluster::Machine;
use crate::error::Result;

/// Tile rows, tile columns, and what the tile reaches of the chip's best.
const TILES: [(usize, usize, f64); 8] = [
    (256, 128, 1.0),
    (128, 256, 1.0),
    (128, 128, 0.93),
    (64, 256, 0.85),
    (256, 64, 0.85),
    (128, 64, 0.8),
    (64, 128, 0.8),
    (64, 64, 0.65),
];

/// Numbers of a chip that prices need, in SI.
#[derive(Clone, Debug)]
pub struct Rates {
    /// Peak of the matrix units for the type in use.
    pub peak: f64,
    /// Memory bandwidth.
    pub bandwidth: f64,
    /// Seconds in which the host launches a kernel. It runs ahead of the chip: a run of kernels lasts as long as the slower of
    /// the two, `max(launches * launch, sum of seconds)`.
    pub launch: f64,
    cores: Option<f64>,
    efficiency: f64,
    memory: f64,
    prologue: f64,
    attention: f64,
    elementwise: f64,
    norm: f64,
    activation: f64,
}

impl Rates {
    /// The rates of `machine` for matmuls in `dtype` (`bf16`, `fp8`, ..).
    ///
    /// # Errors
    /// If a number is missing.
    pub fn of(machine: &Machine, dtype: &str) -> Result<Rates> {
        let chip = &machine.chip;
        Ok(Rates {
            peak: chip.value(&format!("matmul.{dtype}"))?,
            bandwidth: chip.value("memory.bandwidth")?,
            launch: machine.stack.value("stack.launch")?,
            cores: chip.find("chip.cores"),
            efficiency: chip.value("kernel.matmul.efficiency")?,
            memory: chip.value("kernel.matmul.memory")?,
            prologue: chip.value("kernel.matmul.prologue")?,
            attention: chip.value("kernel.attention.efficiency")?,
            elementwise: chip.value("kernel.elementwise.memory")?,
            norm: chip.value("kernel.norm.memory")?,
            activation: chip.value("kernel.activation.memory")?,
        })
    }

    /// Seconds that no kernel for this work can go below: its operations at the peak, its bytes at the bandwidth.
    pub fn floor(&self, work: &Work) -> f64 {
        (work.flops() / self.peak).max(bytes(work) / self.bandwidth)
    }

    /// Seconds of `work`; 0 for what moves between chips.
    pub fn seconds(&self, work: &Work) -> f64 {
        match work {
            Work::Matmul { batch, m, n, k, .. } => {
                let busy = self.tiles(*batch, *m, *n, *k);
                self.launch
                    .max(busy.max(bytes(work) / (self.bandwidth * self.memory)))
            }
            Work::Attention { flops, bytes } => {
                let busy = flops / (self.peak * self.attention);
                self.launch
                    .max(busy.max(bytes / (self.bandwidth * self.memory)))
            }
            Work::Stream { rows, bytes } => {
                let share = match rows {
                    Rows::Elementwise => self.elementwise,
                    Rows::Norm => self.norm,
                    Rows::Activation => self.activation,
                };
                bytes / (self.bandwidth * share)
            }
            Work::Collective { .. } | Work::Message { .. } => 0.0,
        }
    }

    /// The time of the best tile. Without a number of cores there are no waves, and no quantisation.
    fn tiles(&self, batch: usize, m: usize, n: usize, k: usize) -> f64 {
        let rate = self.peak * self.efficiency;
        let Some(cores) = self.cores else {
            return 2.0 * batch as f64 * m as f64 * n as f64 * k as f64 / rate;
        };
        let depth = k as f64 + self.prologue;
        let time = |(rows, columns, reached): (usize, usize, f64)| {
            let tiles = batch * m.div_ceil(rows) * n.div_ceil(columns);
            let waves = (tiles as f64 / cores).ceil();
            waves * 2.0 * (rows * columns) as f64 * depth / (rate / cores * reached)
        };
        TILES.into_iter().map(time).fold(f64::INFINITY, f64::min)
    }
}

/// Bytes that a kernel must read and write.
fn bytes(work: &Work) -> f64 {
    match work {
        Work::Matmul {
            batch,
            m,
            n,
            k,
            size,
        } => {
            let (m, n, k) = (*m as f64, *n as f64, *k as f64);
            *batch as f64 * size * (m * n + m * k + n * k)
        }
        Work::Attention { bytes, .. } | Work::Stream { bytes, .. } => *bytes,
        Work::Collective { .. } | Work::Message { .. } => 0.0,
    }
}
