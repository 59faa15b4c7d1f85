//! Axes in another order.

#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::gradient::in_dtype;
use super::{Axes, Backward, Cost, Linear, Op, Site, letters, misfit};
use crate::cpu::rows;
use crate::dtype::{Slice, SliceMut};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `y[i_order[0], i_order[1], ..] = x[i_0, i_1, ..]`: axis j of y is axis `order[j]` of x. Any element type.
///
/// Letters for the order 1, 0: `ab->ba`. Backward: the inverse order.
#[derive(Clone, Debug)]
pub struct Transpose {
    /// Which axis of x each axis of y is.
    pub order: Vec<usize>,
}

/// Strides of a row-major tensor.
pub(crate) fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i];
    }
    strides
}

/// `y` = axes of `x` in `order`, both row-major; `shape` is x's.
fn permute(x: Slice, shape: &[usize], order: &[usize], y: SliceMut) {
    let from = strides(shape);
    let to_shape: Vec<usize> = order.iter().map(|&axis| shape[axis]).collect();
    let from: Vec<usize> = order.iter().map(|&axis| from[axis]).collect();
    rows::copy_strided(x, &from, y, &strides(&to_shape), &to_shape);
}

#[cfg(feature = "gpu")]
fn permute_gpu(x: gpu::Operand, shape: &[usize], order: &[usize], y: gpu::Operand) {
    let from = strides(shape);
    let to_shape: Vec<usize> = order.iter().map(|&axis| shape[axis]).collect();
    let from: Vec<usize> = order.iter().map(|&axis| from[axis]).collect();
    gpu::transpose(x, &from, y, &to_shape);
}

impl Op for Transpose {
    fn name(&self) -> &'static str {
        "transpose"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let mut sorted = self.order.clone();
        sorted.sort_unstable();
        match inputs {
            [x] if sorted.iter().copied().eq(0..x.rank()) => {
                let shape: Vec<usize> = self.order.iter().map(|&axis| x.shape[axis]).collect();
                Ok(vec![TensorType::new(shape, x.dtype)])
            }
            _ => {
                let wants = format!("one operand with axes {:?} in some order", self.order);
                Err(misfit("transpose", wants, inputs))
            }
        }
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        let x: Vec<char> = letters(inputs[0].rank()).collect();
        let y: String = self.order.iter().map(|&axis| x[axis]).collect();
        let x: String = x.into_iter().collect();
        Axes::new(&format!("{x}->{y}")).linear(Linear::Jointly)
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 0)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let (x, y) = (inputs[0], outputs[0].slice_mut());
        permute(x.slice(), x.shape(), &self.order, y);
    }

    fn backward_cost(&self, inputs: &[TensorType], outputs: &[TensorType], _: &[bool]) -> Cost {
        self.cost(inputs, outputs)
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let dy = backward.gradient(0);
        let mut inverse = vec![0; self.order.len()];
        for (to, &from) in self.order.iter().enumerate() {
            inverse[from] = to;
        }
        if let Some(dx) = backward.want(0) {
            in_dtype(dy, dx.tensor.dtype(), |values| {
                permute(values, dy.shape(), &inverse, dx.tensor.slice_mut());
            });
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let x = inputs[0];
        permute_gpu(read(x), x.shape(), &self.order, write(&mut outputs[0]));
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        let dy = backward.gradient(0);
        let mut inverse = vec![0; self.order.len()];
        for (to, &from) in self.order.iter().enumerate() {
            inverse[from] = to;
        }
        if let Some(dx) = backward.want(0) {
            permute_gpu(read(dy), dy.shape(), &inverse, dx.operand().0);
        }
    }
}
