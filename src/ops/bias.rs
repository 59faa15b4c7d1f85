//! One vector, or one block of trailing axes, added everywhere.

#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::{Axes, Backward, Cost, Linear, Op, Site, letters, misfit};
use crate::cpu::rows;
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `y[.., j] = x[.., j] + bias[j]`, where bias has the shape of the last axis of x, or of its last axes: `[n]` for a linear
/// layer, [t, c] for learned positions on [b, t, c].
///
/// Use it where a matmul's own bias cannot be: after the reduction of a partial sum. Backward: `dx = dy`,
/// `dbias = sum of dy over the leading axes`, one chain per element in row order.
#[derive(Clone, Debug, Default)]
pub struct AddBias;

impl Op for AddBias {
    fn name(&self) -> &'static str {
        "add_bias"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        match inputs {
            [x, bias]
                if x.dtype.is_float()
                    && bias.dtype.is_float()
                    && bias.rank() > 0
                    && x.shape.ends_with(&bias.shape) =>
            {
                Ok(vec![x.clone()])
            }
            _ => Err(misfit(
                "add_bias",
                "a float x and a float bias with the shape of its last axes",
                inputs,
            )),
        }
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        let all: String = letters(inputs[0].rank()).collect();
        let last = &all[inputs[0].rank() - inputs[1].rank()..];
        Axes::new(&format!("{all},{last}->{all}")).linear(Linear::Jointly)
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 1)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        rows::add_bias(inputs[0].slice(), inputs[1].slice(), outputs[0].slice_mut());
    }

    fn accumulates(&self, _: usize) -> bool {
        true
    }

    fn backward_cost(
        &self,
        inputs: &[TensorType],
        outputs: &[TensorType],
        wanted: &[bool],
    ) -> Cost {
        let y = &outputs[0];
        let (dx, dbias) = (wanted[0] as u64, wanted[1] as u64);
        Cost {
            flops: dbias * y.elements() as u64,
            bytes: dx * (inputs[0].bytes() + y.bytes())
                + dbias * (y.bytes() + 4 * inputs[1].elements() as u64),
            scratch: 0,
        }
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let dy = backward.gradient(0);
        if let Some(dx) = backward.want(0) {
            dx.put(dy.slice());
        }
        if let Some(dbias) = backward.want(1) {
            dbias.in_f32(|out, accum| rows::column_sum(dy.slice(), out, accum));
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        gpu::add_bias(read(inputs[0]), read(inputs[1]), write(&mut outputs[0]));
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        let dy = read(backward.gradient(0));
        if let Some(dx) = backward.want(0) {
            dx.put_gpu(dy.clone());
        }
        if let Some(dbias) = backward.want(1) {
            let (out, add) = dbias.operand();
            gpu::column_sum(dy, out, add);
        }
    }
}
