//! Root-mean-square normalisation over the last axis.

use super::gradient::optional_in_f32;
use super::layer_norm::{infer_norm, norm_axes};
#[cfg(feature = "gpu")]
use super::standardize::Norm;
use super::{Axes, Backward, Cost, Op, Saved, Site, traffic};
use crate::cpu::rows;
use crate::tensor::{Tensor, TensorType};

/// `y = x rstd weight` of each row, with `rstd = 1 / sqrt(mean of x^2 + eps)` (Zhang and Sennrich 2019).
///
/// - x [.., c]; then weight `[c]`, only if asked for. Per head, on q or k: x [b, t, h, d] and weight `[d]`;
/// - results: y in the type of x, and rstd [..] in f32, which backward reads.
///
/// Letters: `abC,C->abC,ab`. Backward, with `n = x rstd` and `g = dy weight`: `dx = rstd (g - n mean of g n)`,
/// `dweight = sum over rows of dy n`.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    /// Added to the mean of squares.
    pub eps: f32,
    /// A second operand scales the columns.
    pub weight: bool,
}

impl Default for RmsNorm {
    fn default() -> Self {
        RmsNorm {
            eps: 1e-5,
            weight: true,
        }
    }
}

impl Op for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let statistic = infer_norm("rms_norm", self.weight as usize, inputs)?;
        Ok(vec![inputs[0].clone(), statistic])
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        norm_axes(&inputs[0], self.weight as usize, 1)
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 0).with_flops(&inputs[0], 3 + self.weight as u64)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let [y, rstd] = outputs else {
            unreachable!("infer gives two results")
        };
        rows::rms_norm(
            inputs[0].slice(),
            self.weight.then(|| inputs[1].slice()),
            self.eps,
            y.slice_mut(),
            rstd.slice_mut().typed(),
        );
    }

    fn saves(&self) -> Saved {
        let mut saved = Saved::INPUTS;
        saved.outputs = 1 << 1;
        saved
    }

    fn accumulates(&self, i: usize) -> bool {
        i > 0
    }

    fn backward_cost(
        &self,
        inputs: &[TensorType],
        outputs: &[TensorType],
        wanted: &[bool],
    ) -> Cost {
        let x = &inputs[0];
        let dx = wanted[0] as u64;
        let dweight = (self.weight && wanted[1]) as u64;
        let weight = inputs[1..].first().map_or(0, TensorType::bytes);
        Cost {
            flops: (dx * (6 + self.weight as u64) + dweight * 3) * x.elements() as u64,
            bytes: traffic(outputs)
                + (1 + dx) * x.bytes()
                + dx * weight
                + dweight * 4 * x.last() as u64,
            scratch: 0,
        }
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let dy = backward.only_gradient("rms_norm").slice();
        let x = backward.input(0).slice();
        let weight = self.weight.then(|| backward.input(1).slice());
        let rstd = backward.output(1).slice().typed();
        let (dx, dweight) = backward
            .wanted
            .split_first_mut()
            .expect("rms_norm has an operand");
        let dx = dx.as_mut().map(|dx| dx.tensor.slice_mut());
        let dweight = dweight.first_mut().and_then(Option::as_mut);
        optional_in_f32(dweight, |dweight| {
            rows::rms_norm_backward(dy, x, weight, rstd, dx, dweight);
        });
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        self.norm().forward(inputs, outputs);
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        self.norm().backward(backward);
    }
}

#[cfg(feature = "gpu")]
impl RmsNorm {
    fn norm(&self) -> Norm {
        Norm {
            name: "rms_norm",
            eps: self.eps,
            mean: false,
            weight: self.weight,
            bias: None,
        }
    }
}
