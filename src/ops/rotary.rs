//! Rotary positions: pairs of a head's elements turn by an angle that grows with the token's position.
//!
//! The table of cosines and sines is computed in f64 and rounded once to f32; clones of an op share it, so that a model
//! which keeps one [`Rotary`] computes it once.

#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::{Axes, Backward, Cost, Linear, Local, Op, Site, misfit};
use crate::cpu::rows;
use crate::dtype::{Slice, SliceMut};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::placement::TokenOrder;
use crate::tensor::{Tensor, TensorType};
use std::f64::consts::TAU;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

pub use crate::cpu::rows::RotaryStyle;

/// `(y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin)` for each pair of a head's elements, with the angle
/// `position * theta^(-2i / rotary_dim)` of pair i (Su et al. 2021).
///
/// x and y: [b, t, h, d]. Elements from `rotary_dim` on are copied. Letters: `bthD->bthD`; a chip that holds part of the
/// tokens starts at its own position. Backward: the turn back.
#[derive(Clone, Debug)]
pub struct Rotary {
    /// Base of the wavelengths.
    pub theta: f64,
    /// How many elements of a head turn, from the first on; all if none. Even.
    pub rotary_dim: Option<usize>,
    /// Which elements are a pair.
    pub style: RotaryStyle,
    /// Where the tokens of the whole tensor stand.
    pub positions: RotaryPositions,
    /// How the frequencies are changed to stretch the context.
    pub scaling: RotaryScaling,
    /// The last table that this op or a clone of it used; leave it at its default.
    pub table: RotaryTable,
}

impl Default for Rotary {
    fn default() -> Self {
        Rotary {
            theta: 10_000.0,
            rotary_dim: None,
            style: RotaryStyle::Halves,
            positions: RotaryPositions::default(),
            scaling: RotaryScaling::None,
            table: RotaryTable::default(),
        }
    }
}

/// Where the tokens of a tensor [b, t, h, d] stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RotaryPositions {
    /// Token t of every sequence stands at `offset` and its place in the order in which tokens are kept.
    Alike {
        /// Position of the first token.
        offset: usize,
        /// The order.
        order: TokenOrder,
    },
    /// The first token of each sequence stands at its own position \[b\], and the others behind it.
    From(Arc<[usize]>),
    /// Every token [b, t], as tokens are kept, stands at its own position, which is below t: that in its document.
    Each(Arc<[u32]>),
}

impl Default for RotaryPositions {
    fn default() -> Self {
        RotaryPositions::Alike {
            offset: 0,
            order: TokenOrder::Ascending,
        }
    }
}

impl RotaryPositions {
    /// How many tables of angles a share has: one, or one for each sequence; and the positions of all their tokens.
    fn of(&self, local: &Local) -> (usize, Vec<usize>) {
        let (batch, tokens) = (local.ty.shape[0], local.ty.shape[1]);
        let held = local.start[1]..local.start[1] + tokens;
        match self {
            RotaryPositions::Alike { offset, order } => {
                let positions = order.positions(held);
                (1, positions.into_iter().map(|p| offset + p).collect())
            }
            RotaryPositions::From(starts) => {
                let mine = &starts[local.start[0]..local.start[0] + batch];
                let row = |start: &usize| held.clone().map(move |t| start + t).collect::<Vec<_>>();
                (batch, mine.iter().flat_map(row).collect())
            }
            RotaryPositions::Each(all) => {
                let (b, t) = (local.global[0], local.global[1]);
                let below = all.iter().all(|p| (*p as usize) < t);
                assert!(
                    all.len() == b * t && below,
                    "rotary positions of {b} sequences of {t} tokens are as many numbers below {t}, not {} up to {}",
                    all.len(),
                    all.iter().max().unwrap_or(&0)
                );
                let row = |b: usize| {
                    let first = (local.start[0] + b) * t + local.start[1];
                    all[first..first + tokens].iter().map(|p| *p as usize)
                };
                (batch, (0..batch).flat_map(row).collect())
            }
        }
    }

    /// Why these are no positions of a tensor [b, t, ..]; none if they are.
    fn misfit(&self, shape: &[usize]) -> Option<String> {
        let (b, t) = (shape[0], shape[1]);
        match self {
            RotaryPositions::From(starts) if starts.len() != b => {
                Some(format!("as many sequences as positions, {}", starts.len()))
            }
            RotaryPositions::Each(all) if all.len() < b * t => {
                Some(format!("as many tokens as positions, {}", all.len()))
            }
            _ => None,
        }
    }
}

/// How rotary frequencies change to stretch the context.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RotaryScaling {
    /// As they are.
    None,
    /// All divided by `factor`: positions are interpolated (Chen et al. 2023).
    Linear {
        /// How many times longer the context becomes.
        factor: f64,
    },
    /// Waves longer than `original_context / low` tokens divided by `factor`, those shorter than
    /// `original_context / high` kept, a blend that is linear in the turns per context between (Llama 3.1, 2024).
    Llama3 {
        /// How many times longer the context becomes.
        factor: f64,
        /// Turns per original context below which a frequency is divided.
        low: f64,
        /// Turns per original context above which a frequency is kept.
        high: f64,
        /// Tokens of context before stretching.
        original_context: f64,
    },
}

impl RotaryScaling {
    fn apply(self, frequency: f64) -> f64 {
        match self {
            RotaryScaling::None => frequency,
            RotaryScaling::Linear { factor } => frequency / factor,
            RotaryScaling::Llama3 {
                factor,
                low,
                high,
                original_context,
            } => {
                let turns = original_context * frequency / TAU;
                let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                kept * frequency + (1.0 - kept) * frequency / factor
            }
        }
    }
}

/// The table that clones of a [`Rotary`] share.
#[derive(Clone, Default)]
pub struct RotaryTable(Arc<Mutex<Option<Arc<Angles>>>>);

impl fmt::Debug for RotaryTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RotaryTable")
    }
}

/// Cosines and sines [tokens, rotary_dim / 2] and what they were computed for.
struct Angles {
    key: (u64, usize, RotaryScaling, Vec<usize>),
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotary {
    fn turning(&self, head_dim: usize) -> usize {
        self.rotary_dim.unwrap_or(head_dim)
    }

    fn angles(&self, dim: usize, positions: Vec<usize>) -> Arc<Angles> {
        let key = (self.theta.to_bits(), dim, self.scaling, positions);
        let mut kept = self.table.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(angles) = kept.as_ref().filter(|a| a.key == key) {
            return angles.clone();
        }
        let frequencies: Vec<f64> = (0..dim / 2)
            .map(|i| {
                self.scaling
                    .apply(self.theta.powf(-2.0 * i as f64 / dim as f64))
            })
            .collect();
        let (cos, sin) = key
            .3
            .iter()
            .flat_map(|&position| frequencies.iter().map(move |f| position as f64 * f))
            .map(|angle| (angle.cos() as f32, angle.sin() as f32))
            .unzip();
        let angles = Arc::new(Angles { key, cos, sin });
        *kept = Some(angles.clone());
        angles
    }

    /// How many tables of angles a share has, and the angles of its tokens.
    fn angles_of(&self, local: &Local, dim: usize) -> (usize, Arc<Angles>) {
        let (tables, positions) = self.positions.of(local);
        let RotaryPositions::Each(_) = self.positions else {
            return (tables, self.angles(dim, positions));
        };
        // Positions differ from batch to batch: the table that is kept is that of one row, of which each token takes a line.
        let row = self.angles(dim, (0..local.global[1]).collect());
        let line = |table: &[f32], p: usize| table[p * (dim / 2)..][..dim / 2].to_vec();
        let lines = |table: &[f32]| -> Vec<f32> {
            positions.iter().flat_map(|p| line(table, *p)).collect()
        };
        let (cos, sin) = (lines(&row.cos), lines(&row.sin));
        let key = (row.key.0, row.key.1, row.key.2, positions);
        (tables, Arc::new(Angles { key, cos, sin }))
    }

    fn turn(&self, site: &Site, x: Slice, y: SliceMut, inverse: bool) {
        let local = &site.inputs[0];
        let [b, t, h, d] = local.ty.shape[..] else {
            unreachable!("infer wants four axes")
        };
        let dim = self.turning(d);
        // Sequences with positions of their own are one sequence to the kernel.
        let (tables, angles) = self.angles_of(local, dim);
        let shape = rows::Rotary {
            batch: b / tables.max(1),
            tokens: t * tables,
            heads: h,
            head_dim: d,
            rotary_dim: dim,
            style: self.style,
            inverse,
        };
        rows::rotary(x, y, shape, &angles.cos, &angles.sin);
    }
}

#[cfg(feature = "gpu")]
impl Rotary {
    fn turn_gpu(&self, site: &Site, x: gpu::Operand, y: gpu::Operand, inverse: bool) {
        let local = &site.inputs[0];
        let [_, tokens, heads, head_dim] = local.ty.shape[..] else {
            unreachable!("infer wants four axes")
        };
        let dim = self.turning(head_dim);
        if dim == 0 {
            return gpu::cast(x, y);
        }
        let (tables, angles) = self.angles_of(local, dim);
        let turn = gpu::Turn {
            tokens: tokens * tables,
            heads,
            head_dim,
            half: dim / 2,
            pairs: self.style == RotaryStyle::Pairs,
            inverse,
        };
        gpu::rotary(x, y, turn, &angles.cos, &angles.sin);
    }
}

impl Op for Rotary {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        match inputs {
            [x] if x.dtype.is_float() && x.rank() == 4 => {
                let dim = self.turning(x.last());
                if dim > x.last() || !dim.is_multiple_of(2) {
                    let wants = format!(
                        "an even number of turning elements, at most the head size {}, not {dim}",
                        x.last()
                    );
                    return Err(misfit("rotary", wants, inputs));
                }
                if let Some(wants) = self.positions.misfit(&x.shape) {
                    return Err(misfit("rotary", wants, inputs));
                }
                Ok(vec![x.clone()])
            }
            _ => Err(misfit("rotary", "one float operand [b, t, h, d]", inputs)),
        }
    }

    fn axes(&self, _: &[TensorType]) -> Axes {
        Axes::new("bthD->bthD").linear(Linear::Jointly)
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        let x = &inputs[0];
        let dim = self.turning(x.last());
        let tables = match &self.positions {
            RotaryPositions::Alike { .. } => 1,
            RotaryPositions::From(_) | RotaryPositions::Each(_) => x.shape[0],
        };
        let table = 4 * (tables * x.shape[1] * dim) as u64;
        let mut cost = Cost::elementwise(inputs, outputs, 0);
        cost.flops = 3 * (x.rows() * dim) as u64;
        cost.bytes += table;
        cost
    }

    fn forward(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        self.turn(site, inputs[0].slice(), outputs[0].slice_mut(), false);
    }

    fn backward_cost(&self, inputs: &[TensorType], outputs: &[TensorType], _: &[bool]) -> Cost {
        self.cost(inputs, outputs)
    }

    fn backward(&self, site: &Site, backward: &mut Backward) {
        let dy = backward.gradient(0);
        if let Some(dx) = backward.want(0) {
            self.turn(site, dy.slice(), dx.tensor.slice_mut(), true);
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        self.turn_gpu(site, read(inputs[0]), write(&mut outputs[0]), false);
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, site: &Site, backward: &mut Backward) {
        let dy = read(backward.gradient(0));
        if let Some(dx) = backward.want(0) {
            self.turn_gpu(site, dy, dx.operand().0, true);
        }
    }
}
