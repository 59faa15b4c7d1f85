//! One number on the device divided by another.

#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::sum::scalar;
use super::{Axes, Backward, Cost, Op, Saved, Site, misfit};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `y = a / b`: all f32 `[1]`. A mean loss is the sum of the losses over the count of labels, both reduced over the chips
/// first. Backward: `da = dy / b`; there is no gradient to b.
#[derive(Clone, Debug, Default)]
pub struct Ratio;

impl Op for Ratio {
    fn name(&self) -> &'static str {
        "ratio"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        match inputs {
            [a, b] if *a == scalar() && *b == scalar() => Ok(vec![scalar()]),
            _ => Err(misfit("ratio", "two numbers f32[1]", inputs)),
        }
    }

    fn axes(&self, _: &[TensorType]) -> Axes {
        Axes::new("Z,Z->Z")
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 1)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        outputs[0].slice_mut().typed::<f32>()[0] = number(inputs[0]) / number(inputs[1]);
    }

    fn saves(&self) -> Saved {
        Saved::some_inputs(&[1])
    }

    fn differentiable(&self, i: usize) -> bool {
        i == 0
    }

    fn backward_cost(&self, inputs: &[TensorType], outputs: &[TensorType], _: &[bool]) -> Cost {
        self.cost(inputs, outputs)
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let (b, dy) = (backward.input(1), backward.gradient(0));
        if let Some(da) = backward.want(0) {
            da.tensor.slice_mut().typed::<f32>()[0] = number(dy) / number(b);
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        gpu::ratio(read(inputs[0]), read(inputs[1]), write(&mut outputs[0]));
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        let (b, dy) = (read(backward.input(1)), read(backward.gradient(0)));
        if let Some(da) = backward.want(0) {
            gpu::ratio(dy, b, da.operand().0);
        }
    }
}

fn number(x: &Tensor) -> f32 {
    x.slice().typed::<f32>()[0]
}
