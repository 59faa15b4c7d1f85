//! Ops: what can be computed on one chip's share of tensors, one op per file.
//!
//! An op is a value that implements [`Op`]: shape rule, placement rule, cost, forward, backward. The built-in ones have
//! no privileges: a user's own op is sharded, traced, differentiated and priced in the same way.
//!
//! # The placement rule
//! Every op names the axes of its operands, as an Einstein sum does: a matrix product is `mk,kn->mn`. From these letters
//! alone follows what happens when an operand is split over a mesh axis (see [`Axes`]), forward and backward, so no op
//! invents its own communication.

use crate::dtype::{DType, TensorType};
use crate::placement::TokenOrder;
use crate::tensor::Tensor;
use std::fmt;

mod activation;
mod adamw;
mod add;
mod attention;
pub(crate) mod attention_part;
mod bias;
mod cast;
mod concatenate;
mod cross_entropy;
pub(crate) mod device;
mod dropout;
mod embedding;
mod gradient;
mod join_heads;
mod layer_norm;
mod matmul;
mod mixture;
mod multiply;
mod norm;
mod pad;
mod pick_token;
mod ratio;
mod rms_norm;
mod rotary;
mod scale;
mod sgd;
mod sigmoid;
mod slice;
mod softmax;
#[cfg(feature = "gpu")]
mod standardize;
mod sum;
mod swiglu;
mod transpose;
mod vocabulary;

pub use crate::cpu::{Accum, Activation};
pub use activation::Activate;
pub use adamw::AdamW;
pub use add::Add;
pub use attention::Attention;
pub use bias::AddBias;
pub use cast::Cast;
pub use concatenate::Concatenate;
pub use cross_entropy::CrossEntropy;
pub use dropout::Dropout;
pub use embedding::Embedding;
pub use join_heads::JoinHeads;
pub use layer_norm::LayerNorm;
pub use matmul::Matmul;
pub use mixture::{BalanceBias, BalanceLoss, Combine, Dispatch, JoinLoss, NONE, Route, Slots};
pub use multiply::Multiply;
pub use norm::ClipFactor;
pub use pad::Pad;
pub use pick_token::PickToken;
pub use ratio::Ratio;
pub use rms_norm::RmsNorm;
pub use rotary::{Rotary, RotaryPositions, RotaryScaling, RotaryStyle, RotaryTable};
pub use scale::{Scale, ScaleBy};
pub use sgd::Sgd;
pub use sigmoid::Sigmoid;
pub use slice::SliceAxis;
pub use softmax::Softmax;
pub use sum::{CountLabels, Sum, SumOfSquares, scalar};
pub use swiglu::SwiGlu;
pub use transpose::Transpose;
pub use vocabulary::{CrossEntropyFromStatistics, RowExpSum, RowMax};

/// What an op costs on the shapes it is given; the price of it belongs to a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Cost {
    /// Floating-point operations; a fused multiply-add counts as two.
    pub flops: u64,
    /// Bytes read and written once each, assuming perfect reuse.
    pub bytes: u64,
    /// Bytes of working memory beside the tensors, freed when the op ends.
    pub scratch: u64,
}

impl Cost {
    /// The cost of an op that touches each operand once: `flops_per_element` for each element of `outputs`.
    pub fn elementwise(
        inputs: &[TensorType],
        outputs: &[TensorType],
        flops_per_element: u64,
    ) -> Self {
        let elements: u64 = outputs.iter().map(|t| t.elements() as u64).sum();
        Cost {
            flops: elements * flops_per_element,
            bytes: traffic(inputs) + traffic(outputs),
            scratch: 0,
        }
    }

    /// The same with `per_element` flops for each element of `ty`.
    pub fn with_flops(mut self, ty: &TensorType, per_element: u64) -> Self {
        self.flops = ty.elements() as u64 * per_element;
        self
    }
}

/// Bytes of all `types` together: what a pass over them reads or writes.
pub fn traffic(types: &[TensorType]) -> u64 {
    types.iter().map(TensorType::bytes).sum()
}

/// The letters of an op's axes: which may be split over chips, and what comes out.
///
/// Written `bti,io->bto`: operands separated by commas, results behind the arrow, a letter per axis. For each mesh axis,
/// and its letter `x` in the operands that are split over it:
/// - every operand that has `x` must be split along it, every other one must be replicated;
/// - a result that has `x` is split along it; a result without it is a partial sum (lower-case `x`);
/// - an upper-case letter may not be split: the op needs that axis whole;
/// - the gradient of an operand with `x` is split like it, of one without it a partial sum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Axes {
    /// Letters of each operand.
    pub inputs: Vec<Vec<char>>,
    /// Letters of each result.
    pub outputs: Vec<Vec<char>>,
    /// In which operands the op is linear: partial sums pass through it.
    pub linear: Linear,
    /// Letters that may be split although a result without them is whole: the op's other operands already hold what was
    /// reduced over them. A loss from logits split over the vocabulary and from reduced statistics is one.
    pub whole_without: Vec<char>,
}

/// In which operands an op is linear, so that it may run on partial sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Linear {
    /// In none: partial sums must be reduced first.
    No,
    /// In each operand alone, the others being whole: matmul.
    Each,
    /// In all of them together: add, concatenate, and every linear op of one operand.
    Jointly,
}

impl Axes {
    /// Reads `"mk,kn->mn"`.
    ///
    /// # Panics
    /// Without an arrow.
    pub fn new(letters: &str) -> Self {
        let (inputs, outputs) = letters
            .split_once("->")
            .unwrap_or_else(|| panic!("axes '{letters}' have no '->'"));
        let read = |side: &str| {
            side.split(',')
                .map(|o| o.trim().chars().collect())
                .collect()
        };
        Axes {
            inputs: read(inputs),
            outputs: read(outputs),
            linear: Linear::No,
            whole_without: Vec::new(),
        }
    }

    /// The same letters, linear as said.
    pub fn linear(mut self, linear: Linear) -> Self {
        self.linear = linear;
        self
    }

    /// The same letters; results without one of `letters` are nevertheless whole (see the field).
    pub fn whole_without(mut self, letters: &str) -> Self {
        self.whole_without = letters.chars().collect();
        self
    }

    /// Letters for `inputs` operands and one result that all have the shape of `ty`: an elementwise op.
    pub fn elementwise(inputs: usize, ty: &TensorType) -> Self {
        let letters: Vec<char> = letters(ty.rank()).collect();
        Axes {
            inputs: vec![letters.clone(); inputs],
            outputs: vec![letters],
            linear: Linear::No,
            whole_without: Vec::new(),
        }
    }
}

/// Lower-case letters for `rank` axes, the same for every op that asks.
pub fn letters(rank: usize) -> impl Iterator<Item = char> {
    assert!(
        rank <= 26,
        "a tensor of {rank} axes has more than there are letters"
    );
    ('a'..='z').take(rank)
}

/// `rank` lower-case letters as [`letters`] gives them, leaving out those of `taken`, as a string.
pub fn letters_besides(rank: usize, taken: &str) -> String {
    let free: String = letters(26)
        .filter(|&l| !taken.contains(l))
        .take(rank)
        .collect();
    assert!(
        free.len() == rank,
        "a tensor of {rank} axes has more than there are letters"
    );
    free
}

/// One operand or result as the chip holds it: its share, and where that lies in the whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Local {
    /// The share's shape and type.
    pub ty: TensorType,
    /// The whole tensor's shape.
    pub global: Vec<usize>,
    /// Index of the share's first element along each axis of the whole.
    pub start: Vec<usize>,
}

impl Local {
    /// A tensor that one chip holds whole.
    pub fn whole(ty: TensorType) -> Self {
        Local {
            global: ty.shape.clone(),
            start: vec![0; ty.rank()],
            ty,
        }
    }

    /// Splits the share into runs of elements that are consecutive in the whole: (length of a run, function from the
    /// number of the run to the whole's row-major index of its first element).
    pub fn runs(&self) -> (usize, impl Fn(usize) -> u64 + Sync + '_) {
        self.runs_in(&TokenOrder::Ascending)
    }

    /// [`Local::runs`] where tokens, axis 1, are kept in `order`: indices are those of the whole in the text's order.
    pub fn runs_in(&self, order: &TokenOrder) -> (usize, impl Fn(usize) -> u64 + Sync + '_) {
        let rank = self.ty.rank();
        let positions = match order {
            TokenOrder::ZigZag { .. } if rank > 1 => {
                let held = self.start[1]..self.start[1] + self.ty.shape[1];
                Some(order.positions(held))
            }
            _ => None,
        };
        // Axes from the last on join a run while the share covers them whole; tokens out of order begin one each.
        let least = if positions.is_some() { 2 } else { 0 };
        let mut first = rank;
        let mut run = 1;
        while first > least {
            first -= 1;
            run *= self.ty.shape[first];
            if self.ty.shape[first] != self.global[first] {
                break;
            }
        }
        let start = move |r: usize| {
            let (mut rest, mut index, mut stride) = (r, 0u64, 1u64);
            for axis in (0..rank).rev() {
                let at = if axis >= first {
                    0
                } else {
                    let at = rest % self.ty.shape[axis];
                    rest /= self.ty.shape[axis];
                    at
                };
                let place = match &positions {
                    Some(positions) if axis == 1 => positions[at],
                    _ => self.start[axis] + at,
                };
                index += place as u64 * stride;
                stride *= self.global[axis] as u64;
            }
            index
        };
        (run.max(1), start)
    }
}

/// Where an op runs: what it may know beside the contents.
#[derive(Debug)]
pub struct Site<'a> {
    /// The operands' shares.
    pub inputs: &'a [Local],
    /// The results' shares.
    pub outputs: &'a [Local],
    /// The run's seed.
    pub seed: u64,
}

/// What the tape keeps of an op for its backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// Operands, one bit each.
    pub inputs: u32,
    /// Results, one bit each.
    pub outputs: u32,
}

impl Saved {
    /// Keeps nothing.
    pub const NOTHING: Saved = Saved {
        inputs: 0,
        outputs: 0,
    };
    /// Keeps every operand.
    pub const INPUTS: Saved = Saved {
        inputs: u32::MAX,
        outputs: 0,
    };
    /// Keeps every result.
    pub const OUTPUTS: Saved = Saved {
        inputs: 0,
        outputs: u32::MAX,
    };
    /// Keeps all.
    pub const ALL: Saved = Saved {
        inputs: u32::MAX,
        outputs: u32::MAX,
    };

    /// Keeps the operands at these positions.
    pub const fn some_inputs(positions: &[u32]) -> Saved {
        let (mut bits, mut i) = (0, 0);
        while i < positions.len() {
            bits |= 1 << positions[i];
            i += 1;
        }
        Saved {
            inputs: bits,
            outputs: 0,
        }
    }
}

/// The gradient of an operand, to be written by [`Op::backward`].
#[derive(Debug)]
pub struct Gradient {
    /// Same shape as the operand; type of the operand, or f32 for a parameter's.
    pub tensor: Tensor,
    /// Whether to overwrite it, or to add to it (only if [`Op::accumulates`] says so).
    pub accum: Accum,
    /// True if `tensor` holds the saved operand itself, to be overwritten (only if [`Op::reuses`] says so).
    pub reused: bool,
}

/// What [`Op::backward`] is given.
#[derive(Debug)]
pub struct Backward<'a> {
    /// Saved operands.
    pub inputs: &'a [Option<Tensor>],
    /// Saved results.
    pub outputs: &'a [Option<Tensor>],
    /// Gradients of the results; none where a result was not used.
    pub gradients: &'a [Option<Tensor>],
    /// Gradients of the operands that are wanted.
    pub wanted: &'a mut [Option<Gradient>],
}

impl<'a> Backward<'a> {
    /// Saved operand `i`. Panics if it was not saved.
    pub fn input(&self, i: usize) -> &'a Tensor {
        self.inputs[i]
            .as_ref()
            .expect("Op::saves names the operands that backward reads")
    }

    /// Saved result `i`. Panics if it was not saved.
    pub fn output(&self, i: usize) -> &'a Tensor {
        self.outputs[i]
            .as_ref()
            .expect("Op::saves names the results that backward reads")
    }

    /// Gradient of result `i`. Panics if the result was not used.
    pub fn gradient(&self, i: usize) -> &'a Tensor {
        self.gradients[i]
            .as_ref()
            .expect("backward runs only if the first result was used")
    }
}

/// Something to compute on one chip's shares.
///
/// `forward` and `backward` run only where tensors are real; a ghost asks for everything else.
pub trait Op: fmt::Debug + 'static {
    /// The name in traces and messages.
    fn name(&self) -> &'static str;

    /// The results' types from the operands', or a sentence that says which operand does not fit, with both sides.
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String>;

    /// Which axes may be split (see [`Axes`]).
    fn axes(&self, inputs: &[TensorType]) -> Axes;

    /// The cost of `forward`.
    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost;

    /// Computes the results. Their contents are unwritten before.
    fn forward(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]);

    /// Computes the results on a graphics processor: see [`Tensor::operand`] and [`Launch`](crate::gpu::Launch). Nothing
    /// falls back to the processor: that would be slow without a word.
    ///
    /// # Panics
    /// By default: the op has no kernel there.
    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let _ = (site, inputs, outputs);
        panic!(
            "op '{}' has no kernel for graphics processors; implement Op::forward_gpu or run it on cpu",
            self.name()
        );
    }

    /// What `backward` reads.
    fn saves(&self) -> Saved {
        Saved::NOTHING
    }

    /// True if operand `i` has a gradient (indices have none).
    fn differentiable(&self, i: usize) -> bool {
        let _ = i;
        true
    }

    /// True if `backward` can add to an existing gradient of operand `i`; otherwise it is added afterwards.
    fn accumulates(&self, i: usize) -> bool {
        let _ = i;
        false
    }

    /// True if every operand's gradient is the result's gradient, as in a sum: it is handed on without a copy, and
    /// `backward` never runs.
    fn passes_gradient(&self) -> bool {
        false
    }

    /// The saved operand `i` whose storage the gradient of operand `i` may take over, if nothing else uses it.
    fn reuses(&self) -> Option<usize> {
        None
    }

    /// The cost of `backward` for the wanted operands.
    fn backward_cost(
        &self,
        inputs: &[TensorType],
        outputs: &[TensorType],
        wanted: &[bool],
    ) -> Cost {
        let _ = wanted;
        let forward = self.cost(inputs, outputs);
        Cost {
            flops: 2 * forward.flops,
            bytes: 2 * forward.bytes,
            scratch: forward.scratch,
        }
    }

    /// Computes the wanted gradients.
    ///
    /// # Panics
    /// By default: the op has no backward.
    fn backward(&self, site: &Site, backward: &mut Backward) {
        let _ = (site, backward);
        panic!(
            "op '{}' has no backward; implement Op::backward or use it outside of differentiation",
            self.name()
        );
    }

    /// Computes the wanted gradients on a graphics processor.
    ///
    /// # Panics
    /// By default: the op has no kernel there.
    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, site: &Site, backward: &mut Backward) {
        let _ = (site, backward);
        panic!(
            "op '{}' has no backward for graphics processors; implement Op::backward_gpu or run it on cpu",
            self.name()
        );
    }
}

/// The sentence for operands that do not fit: what the op is, what it wants and what it got.
pub fn misfit(op: &str, wants: impl fmt::Display, inputs: &[TensorType]) -> String {
    let got: Vec<String> = inputs.iter().map(ToString::to_string).collect();
    format!("{op} wants {wants}, got {}", got.join(", "))
}

/// The type of `inputs[i]` with another element type.
pub fn with_dtype(ty: &TensorType, dtype: DType) -> TensorType {
    TensorType::new(ty.shape.clone(), dtype)
}

#[cfg(test)]
mod tests;
