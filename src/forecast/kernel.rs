//! What a kernel costs on a chip: the roofline, with tiles and waves where they explain the measured times.
//!
//! A product runs in waves of tiles, one tile on each of the chip's cores:
//! `seconds = waves * 2 tm tn (k + prologue) / (peak / cores * efficiency * tile's efficiency)`, with the best of eight tiles, and
//! never below `bytes / (bandwidth * share)`. Of 20 products measured alone on an A100 this misses none by more than 5 %; a
//! constant efficiency misses narrow ones by a factor. A streaming kernel is `bytes / (bandwidth * share of its class)`.
//!
//! An H100 under load slows down: in the curves of a Llama 2 70B layer, products of 0.04 to 0.4 ms reach up to 894 TFLOP/s, those of a
//! layer that takes 10 ms 690, while an A100's reach 240 however long they take. A step is one long load, so the tile's rate is
//! `efficiency * sustained`, where the second is what the longest measured load leaves of the first.
//!
//! Products of the narrow types (fp8, int8, fp4) run at the peak of their type; attention's core, the head and every other product of
//! 2-byte elements at that of bf16.

use super::interval::{Class, Slower};
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
    /// Peak for products of 2-byte elements beside a narrower type; [`Rates::peak`] otherwise.
    pub wide: f64,
    /// Bytes of an element of the type in use.
    pub size: f64,
    /// Memory bandwidth.
    pub bandwidth: f64,
    /// Seconds in which the host launches a kernel. It runs ahead of the chip: a run of kernels lasts as long as the slower of
    /// the two, `max(kernels * launch, sum of their seconds)`; transfers are timed with their own launch.
    pub launch: f64,
    cores: Option<f64>,
    efficiency: f64,
    narrow: f64,
    memory: f64,
    prologue: f64,
    attention: f64,
    attention_backward: f64,
    attention_memory: f64,
    elementwise: f64,
    softmax: f64,
    optimizer: f64,
    norm: f64,
    activation: f64,
    gelu: f64,
}

impl Rates {
    /// The rates of `machine` for matmuls in `dtype` (`bf16`, `fp8`, ..).
    ///
    /// # Errors
    /// If a number is missing.
    pub fn of(machine: &Machine, dtype: &str) -> Result<Rates> {
        let chip = &machine.chip;
        let peak = chip.value(&format!("matmul.{dtype}"))?;
        let size = element_bytes(dtype);
        let sustained = chip.find("kernel.matmul.sustained").unwrap_or(1.0);
        let efficiency = chip.value("kernel.matmul.efficiency")? * sustained;
        let narrow = chip.find("kernel.matmul.narrow");
        let memory = chip.value("kernel.matmul.memory")?;
        let attention = chip.value("kernel.attention.efficiency")?;
        let elementwise = chip.value("kernel.elementwise.memory")?;
        Ok(Rates {
            peak,
            wide: if size < 2.0 {
                chip.value("matmul.bf16")?
            } else {
                peak
            },
            size,
            bandwidth: chip.value("memory.bandwidth")?,
            launch: machine.stack.value("stack.launch")?,
            cores: chip.find("chip.cores"),
            efficiency,
            narrow: narrow.map_or(efficiency, |n| n * sustained),
            memory,
            prologue: chip.value("kernel.matmul.prologue")?,
            attention,
            attention_backward: chip.find("kernel.attention.backward").unwrap_or(attention),
            attention_memory: chip.find("kernel.attention.memory").unwrap_or(memory),
            elementwise,
            softmax: chip.find("kernel.softmax.memory").unwrap_or(elementwise),
            optimizer: chip.find("kernel.optimizer.memory").unwrap_or(elementwise),
            norm: chip.value("kernel.norm.memory")?,
            activation: chip.value("kernel.activation.memory")?,
            gelu: elementwise,
        })
    }

    /// Seconds that no kernel for this work can go below: its operations at the peak, its bytes at the bandwidth.
    pub fn floor(&self, work: &Work) -> f64 {
        (work.flops() / self.peak_of(work)).max(bytes(work) / self.bandwidth)
    }

    fn peak_of(&self, work: &Work) -> f64 {
        match work {
            Work::Matmul { size, .. } if *size <= self.size => self.peak,
            _ => self.wide,
        }
    }

    /// The same machine with a class of work slower; what the network does is not in it.
    pub fn slowed(&self, slower: Slower) -> Rates {
        let (matmul, attention) = (slower.of(Class::Matmul), slower.of(Class::Attention));
        let elementwise = slower.of(Class::Elementwise);
        let activation = slower.of(Class::Activation);
        Rates {
            efficiency: self.efficiency / matmul,
            narrow: self.narrow / matmul,
            memory: self.memory / matmul,
            attention: self.attention / attention,
            attention_backward: self.attention_backward / attention,
            attention_memory: self.attention_memory / attention,
            elementwise: self.elementwise / elementwise,
            softmax: self.softmax / elementwise,
            optimizer: self.optimizer / elementwise,
            norm: self.norm / slower.of(Class::Norm),
            activation: self.activation / activation,
            gelu: self.gelu / activation,
            launch: self.launch * slower.of(Class::Launch),
            ..self.clone()
        }
    }

    /// Seconds of `work`; 0 for what moves between chips.
    pub fn seconds(&self, work: &Work) -> f64 {
        match work {
            Work::Matmul {
                batch,
                m,
                n,
                k,
                size,
                ..
            } => {
                let narrow = *size <= self.size && self.size < 2.0;
                let reached = if narrow { self.narrow } else { self.efficiency };
                let busy = self.tiles(*batch, *m, *n, *k, self.peak_of(work) * reached);
                busy.max(bytes(work) / (self.bandwidth * self.memory))
            }
            Work::Attention {
                flops,
                bytes,
                backward,
            } => {
                let reached = match backward {
                    true => self.attention_backward,
                    false => self.attention,
                };
                let busy = flops / (self.wide * reached);
                busy.max(bytes / (self.bandwidth * self.attention_memory))
            }
            Work::Stream { rows, bytes } => {
                let share = match rows {
                    Rows::Elementwise => self.elementwise,
                    Rows::Softmax => self.softmax,
                    Rows::Optimizer => self.optimizer,
                    Rows::Norm => self.norm,
                    Rows::Activation => self.activation,
                    Rows::Gelu => self.gelu,
                };
                bytes / (self.bandwidth * share)
            }
            _ => 0.0,
        }
    }

    /// The time of the best tile. Without a number of cores there are no waves, and no quantisation.
    fn tiles(&self, batch: usize, m: usize, n: usize, k: usize, rate: f64) -> f64 {
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

/// Bytes of an element of `dtype`.
pub fn element_bytes(dtype: &str) -> f64 {
    match dtype {
        "f32" => 4.0,
        "fp8" | "int8" => 1.0,
        "fp4" => 0.5,
        _ => 2.0,
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
            // What is narrower than 2 bytes is summed and written as 2.
            *batch as f64 * (size.max(2.0) * m * n + size * (m * k + n * k))
        }
        Work::Attention { bytes, .. } | Work::Stream { bytes, .. } => *bytes,
        _ => 0.0,
    }
}
