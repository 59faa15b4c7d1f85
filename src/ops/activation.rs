//! Elementwise functions that stand alone: GELU, SiLU, squared ReLU. (A matmul fuses them: see [`Matmul`](super::Matmul).)

#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::{Activation, Axes, Backward, Cost, Op, Saved, Site, misfit};
use crate::cpu::rows;
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `y = f(x)`, x and y of one shape and type.
///
/// - [`Activation::GeluTanh`]: `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`; [`Activation::GeluErf`]:
///   `x/2 (1 + erf(x / sqrt 2))` (Hendrycks and Gimpel 2016)
/// - [`Activation::Silu`]: `x / (1 + e^-x)` (Elfwing et al. 2017)
/// - [`Activation::Relu2`]: `max(x, 0)^2` (So et al. 2021)
///
/// Backward: `dx = dy f'(x)`.
#[derive(Clone, Debug)]
pub struct Activate {
    /// f.
    pub activation: Activation,
}

/// Arithmetic operations per element of f, one for each of exp, tanh and erf.
pub(crate) fn flops(f: Activation) -> u64 {
    match f {
        Activation::GeluTanh => 9,
        Activation::GeluErf => 5,
        Activation::Silu => 4,
        Activation::Relu2 => 2,
    }
}

/// Arithmetic operations per element of `dy f'(x)`, counted likewise.
pub(crate) fn backward_flops(f: Activation) -> u64 {
    match f {
        Activation::GeluTanh => 17,
        Activation::GeluErf => 10,
        Activation::Silu => 8,
        Activation::Relu2 => 3,
    }
}

/// f's number in the shaders' prelude.
#[cfg(feature = "gpu")]
pub(crate) fn number(f: Activation) -> u32 {
    match f {
        Activation::GeluTanh => 0,
        Activation::GeluErf => 1,
        Activation::Relu2 => 2,
        Activation::Silu => 3,
    }
}

impl Op for Activate {
    fn name(&self) -> &'static str {
        match self.activation {
            Activation::GeluTanh => "gelu_tanh",
            Activation::GeluErf => "gelu",
            Activation::Silu => "silu",
            Activation::Relu2 => "relu2",
        }
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        one_float(self.name(), inputs)
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        Axes::elementwise(1, &inputs[0])
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, flops(self.activation))
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        rows::activation(self.activation, inputs[0].slice(), outputs[0].slice_mut());
    }

    fn saves(&self) -> Saved {
        Saved::INPUTS
    }

    fn backward_cost(&self, inputs: &[TensorType], _: &[TensorType], _: &[bool]) -> Cost {
        let x = &inputs[0];
        Cost {
            flops: x.elements() as u64 * backward_flops(self.activation),
            bytes: 3 * x.bytes(),
            scratch: 0,
        }
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let (x, dy) = (backward.input(0), backward.gradient(0));
        if let Some(dx) = backward.want(0) {
            let out = dx.tensor.slice_mut();
            rows::activation_backward(self.activation, x.slice(), dy.slice(), out);
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let (x, y) = (read(inputs[0]), write(&mut outputs[0]));
        gpu::activation(number(self.activation), x, y);
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        let (x, dy) = (read(backward.input(0)), read(backward.gradient(0)));
        if let Some(dx) = backward.want(0) {
            gpu::activation_backward(number(self.activation), x, dy, dx.operand().0);
        }
    }
}

/// The result of an op that takes one float tensor to one like it.
pub(crate) fn one_float(op: &str, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
    match inputs {
        [x] if x.dtype.is_float() => Ok(vec![x.clone()]),
        _ => Err(misfit(op, "one float operand", inputs)),
    }
}

/// The result of an op that takes two float tensors of one shape to one like the first.
pub(crate) fn two_floats(op: &str, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
    match inputs {
        [a, b] if a.dtype.is_float() && b.dtype.is_float() && a.shape == b.shape => {
            Ok(vec![a.clone()])
        }
        _ => Err(misfit(op, "two float operands of one shape", inputs)),
    }
}
