//! A tensor over the mesh: this chip's share, the whole's shape, and a placement per mesh axis.
//!
//! Ops on sharded tensors send nothing: they run where the operands' placements allow it and say which placement would
//! do where they do not. Only the functions of `redistribute` move data, and each shows in the trace.

use super::parameter::Parameter;
use super::zero::Gathered;
use super::{Chip, Pending};
use crate::dtype::{DType, TensorType};
use crate::ops::{self, Activation};
use crate::placement::{Placement, Placements};
use crate::tape::ValueId;
use crate::tensor::Tensor;
use crate::trace::Value;
use ndarray::ArrayD;
use std::fmt;
use std::rc::Rc;

/// A tensor over the mesh. Clones share the contents.
#[derive(Clone)]
pub struct Sharded {
    pub(super) chip: Chip,
    pub(super) tensor: Tensor,
    pub(super) global: Vec<usize>,
    pub(super) placements: Placements,
    pub(super) tracked: Tracked,
    /// Set if this is a parameter that was gathered to be used.
    pub(super) gathered: Option<Rc<Gathered>>,
}

/// What the tape knows of a value.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tracked {
    /// The value's identity; none if no gradient flows to it.
    pub value: Option<ValueId>,
    /// Index of the parameter that the value is.
    pub leaf: Option<usize>,
    /// True for parameters and what is computed from parameters alone.
    pub weight: bool,
    /// The type of the value's gradient: f32 for all that is a parameter, else the value's own.
    pub gradient: DType,
}

impl Sharded {
    /// A value that no gradient flows to.
    pub(super) fn unrecorded(
        chip: &Chip,
        tensor: Tensor,
        global: Vec<usize>,
        placements: Placements,
    ) -> Self {
        let tracked = Tracked {
            value: None,
            leaf: None,
            weight: false,
            gradient: tensor.dtype(),
        };
        Sharded {
            chip: chip.clone(),
            tensor,
            global,
            placements,
            tracked,
            gathered: None,
        }
    }

    pub(super) fn leaf(chip: &Chip, parameter: &Parameter) -> Self {
        let leaf = chip.parameters().iter().position(|p| p.id == parameter.id);
        let tracked = Tracked {
            value: Some(parameter.id),
            leaf,
            weight: true,
            gradient: DType::F32,
        };
        Sharded {
            chip: chip.clone(),
            tensor: parameter.value.clone(),
            global: parameter.padded.clone(),
            placements: parameter.placements.clone(),
            tracked,
            gathered: None,
        }
    }

    /// The chip that holds this share.
    pub fn chip(&self) -> &Chip {
        &self.chip
    }

    /// Shape of the whole.
    pub fn shape(&self) -> &[usize] {
        &self.global
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.tensor.dtype()
    }

    /// One placement per mesh axis; over axes of one chip it reads `Replicate`.
    pub fn placements(&self) -> &Placements {
        &self.placements
    }

    /// This chip's share.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// This chip's share widened to f32; none in a ghost. The loop around a training step may read; the program itself
    /// does not branch on contents.
    pub fn read(&self) -> Option<ArrayD<f32>> {
        self.tensor.read_on_host();
        (!self.tensor.is_ghost()).then(|| self.tensor.to_array())
    }

    /// The same contents as a value of its own that gradients flow to: see [`Chip::take_gradient`].
    pub fn variable(&self) -> Sharded {
        let tracked = Tracked {
            value: Some(self.chip.new_value()),
            leaf: None,
            weight: false,
            gradient: self.dtype(),
        };
        Sharded {
            tracked,
            ..self.clone()
        }
    }

    /// The same contents, through which no gradient flows.
    pub fn detach(&self) -> Sharded {
        Sharded::unrecorded(
            &self.chip,
            self.tensor.clone(),
            self.global.clone(),
            self.placements.clone(),
        )
    }

    pub(super) fn traced(&self) -> Value {
        Value {
            ty: self.tensor.ty().clone(),
            placement: self.placements.clone(),
        }
    }

    /// Type of the whole.
    pub(super) fn global_type(&self) -> TensorType {
        TensorType::new(self.global.clone(), self.dtype())
    }

    /// `self w`: [.., m, k] by [k, n], or batched [.., m, k] by [.., k, n]. See [`ops::Matmul`].
    #[track_caller]
    pub fn matmul(&self, other: &Sharded) -> Sharded {
        self.chip.apply_one(ops::Matmul::default(), &[self, other])
    }

    /// `self w` with the result placed as `placements`: operands and result are moved so that the fewest bytes are sent,
    /// whatever their placements. See [`Grid`](super::Grid).
    ///
    /// # Panics
    /// If the shapes do not fit, or nothing leads to `placements`.
    #[track_caller]
    pub fn matmul_to(&self, other: &Sharded, placements: impl Into<Placements>) -> Sharded {
        self.chip.matmul_to(self, other, &placements.into())
    }

    /// `self w^T`: [.., m, k] by [n, k].
    #[track_caller]
    pub fn matmul_transposed(&self, other: &Sharded) -> Sharded {
        self.chip.apply_one(
            ops::Matmul {
                transpose_b: true,
                ..Default::default()
            },
            &[self, other],
        )
    }

    /// `activation(self w + bias)`; bias and activation may be absent.
    #[track_caller]
    pub fn linear(
        &self,
        weight: &Sharded,
        bias: Option<&Sharded>,
        activation: Option<Activation>,
    ) -> Sharded {
        let op = ops::Matmul {
            bias: bias.is_some(),
            activation,
            ..Default::default()
        };
        let mut operands = vec![self, weight];
        operands.extend(bias);
        self.chip.apply_one(op, &operands)
    }

    /// Elementwise sum.
    #[track_caller]
    pub fn add(&self, other: &Sharded) -> Sharded {
        self.chip.apply_one(ops::Add, &[self, other])
    }

    /// Elementwise product.
    #[track_caller]
    pub fn multiply(&self, other: &Sharded) -> Sharded {
        self.chip.apply_one(ops::Multiply, &[self, other])
    }

    /// Every element times a number.
    #[track_caller]
    pub fn scale(&self, factor: f32) -> Sharded {
        self.chip.apply_one(ops::Scale { factor }, &[self])
    }

    /// `self + bias` with bias along the last axis.
    #[track_caller]
    pub fn add_bias(&self, bias: &Sharded) -> Sharded {
        self.chip.apply_one(ops::AddBias, &[self, bias])
    }

    /// The sum of all elements, `[1]` in f32.
    #[track_caller]
    pub fn sum(&self) -> Sharded {
        self.chip.apply_one(ops::Sum, &[self])
    }

    /// An activation, elementwise.
    #[track_caller]
    pub fn activate(&self, activation: Activation) -> Sharded {
        self.chip.apply_one(ops::Activate { activation }, &[self])
    }

    /// `silu(self) up`: the gated half of SwiGLU.
    #[track_caller]
    pub fn swiglu(&self, up: &Sharded) -> Sharded {
        self.chip.apply_one(ops::SwiGlu, &[self, up])
    }

    /// The same numbers in another element type. The gradient of a cast parameter stays in f32 and is the parameter's as it comes,
    /// partial sums too: they are reduced once, at the end of the step.
    #[track_caller]
    pub fn cast(&self, dtype: DType) -> Sharded {
        if dtype == self.dtype() {
            return self.clone();
        }
        if self.tracked.leaf.is_some() {
            let mut cast = self.detach().cast(dtype);
            cast.tracked = self.tracked;
            return cast;
        }
        let mut cast = self.chip.apply_one(ops::Cast { dtype }, &[self]);
        if self.tracked.weight {
            cast.tracked.gradient = self.tracked.gradient;
        }
        cast
    }

    /// The same elements under another shape of the whole.
    ///
    /// # Panics
    /// If the number of elements differs, or a split dimension is torn apart: it must keep what is before it, and
    /// either its length or be divisible, before and after, by the chips that split it.
    #[track_caller]
    pub fn reshape(&self, shape: impl Into<Vec<usize>>) -> Sharded {
        self.chip.reshape(self, shape.into())
    }

    /// This tensor with other placements: moves what has to move. See `placement::plan`.
    ///
    /// # Panics
    /// If no transition leads there; the message says which placement would do.
    #[track_caller]
    pub fn redistribute(&self, placements: impl Into<Placements>) -> Sharded {
        self.chip.redistribute(self, &placements.into())
    }

    /// The whole tensor on every chip.
    #[track_caller]
    pub fn gather(&self) -> Sharded {
        self.redistribute(self.chip.replicated())
    }

    /// The same share seen as a summand: along `axis` every chip has a number of its own, of which the sum is meant. An axis
    /// of one chip, or one that the mesh lacks, changes nothing.
    pub(crate) fn as_summand(&self, axis: &str) -> Sharded {
        let mut x = self.detach();
        if self.chip.size_of(axis) > 1 {
            x.placements = x
                .placements
                .with(self.chip.mesh().axis_index(axis), Placement::Partial);
        }
        x
    }

    /// Starts to move this tensor; [`Pending::wait`] gives it. At most one transition.
    #[track_caller]
    pub fn start_redistribute(&self, placements: impl Into<Placements>) -> Pending {
        self.chip.start_redistribute(self, &placements.into())
    }

    /// Runs the tape backward from this scalar. Gradients of parameters add up in the chip's parameters.
    ///
    /// # Panics
    /// If nothing was recorded, or this is no scalar on the tape.
    #[track_caller]
    pub fn backward(&self) {
        self.chip.backward(self);
    }
}

impl fmt::Debug for Sharded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Sharded({}{:?} {}, share {})",
            self.dtype(),
            self.global,
            self.placements,
            self.tensor.ty()
        )
    }
}
