//! Layer normalisation over the last axis.

use super::gradient::optional_in_f32;
#[cfg(feature = "gpu")]
use super::standardize::Norm;
use super::{Axes, Backward, Cost, Op, Saved, Site, letters_besides, misfit, traffic};
use crate::cpu::rows;
use crate::dtype::DType;
use crate::tensor::{Tensor, TensorType};

/// `y = (x - mean) rstd weight + bias` of each row, with `rstd = 1 / sqrt(variance + eps)` (Ba et al. 2016).
///
/// - x [.., c]; then weight `[c]` and bias `[c]`, each only if asked for;
/// - results: y in the type of x, and the statistics mean and rstd [..] in f32, which backward reads.
///
/// Letters: `abC,C,C->abC,ab,ab`. Backward, with `n = (x - mean) rstd` and `g = dy weight`:
/// `dx = rstd (g - mean of g - n mean of g n)`, `dweight = sum over rows of dy n`, `dbias = sum over rows of dy`.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    /// Added to the variance.
    pub eps: f32,
    /// A second operand scales the columns.
    pub weight: bool,
    /// A last operand is added to every row.
    pub bias: bool,
}

impl Default for LayerNorm {
    fn default() -> Self {
        LayerNorm {
            eps: 1e-5,
            weight: true,
            bias: true,
        }
    }
}

/// Checks x [.., c] and `vectors` operands `[c]`; gives the type of a statistic.
pub(crate) fn infer_norm(
    op: &str,
    vectors: usize,
    inputs: &[TensorType],
) -> Result<TensorType, String> {
    let fits = |x: &TensorType| {
        x.rank() > 0
            && inputs.len() == 1 + vectors
            && inputs.iter().all(|t| t.dtype.is_float())
            && inputs[1..].iter().all(|v| v.shape == [x.last()])
    };
    match inputs.first() {
        Some(x) if fits(x) => Ok(TensorType::new(&x.shape[..x.rank() - 1], DType::F32)),
        _ => {
            let wants = format!("floats: x [.., c] and {vectors} operands [c]");
            Err(misfit(op, wants, inputs))
        }
    }
}

/// Letters of a norm: the last axis whole, `vectors` operands along it, `statistics` results without it.
pub(crate) fn norm_axes(x: &TensorType, vectors: usize, statistics: usize) -> Axes {
    let lead = letters_besides(x.rank() - 1, "");
    Axes::new(&format!(
        "{lead}C{}->{lead}C{}",
        ",C".repeat(vectors),
        format!(",{lead}").repeat(statistics)
    ))
}

impl LayerNorm {
    fn vectors(&self) -> usize {
        self.weight as usize + self.bias as usize
    }

    fn bias_at(&self) -> usize {
        1 + self.weight as usize
    }
}

impl Op for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let statistic = infer_norm("layer_norm", self.vectors(), inputs)?;
        Ok(vec![inputs[0].clone(), statistic.clone(), statistic])
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        norm_axes(&inputs[0], self.vectors(), 2)
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 0).with_flops(&inputs[0], 6 + self.vectors() as u64)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let [y, mean, rstd] = outputs else {
            unreachable!("infer gives three results")
        };
        rows::layer_norm(
            inputs[0].slice(),
            self.weight.then(|| inputs[1].slice()),
            self.bias.then(|| inputs[self.bias_at()].slice()),
            self.eps,
            y.slice_mut(),
            mean.slice_mut().typed(),
            rstd.slice_mut().typed(),
        );
    }

    fn saves(&self) -> Saved {
        let mut saved = Saved::some_inputs(if self.weight { &[0, 1] } else { &[0] });
        saved.outputs = 1 << 1 | 1 << 2;
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
        let vectors = wanted[1..].iter().filter(|w| **w).count() as u64;
        let dweight = self.weight && wanted[1];
        let dbias = self.bias && wanted[self.bias_at()];
        let dx = wanted[0] as u64;
        let flops = dx * (9 + self.weight as u64) + 4 * dweight as u64 + dbias as u64;
        Cost {
            flops: flops * x.elements() as u64,
            bytes: traffic(outputs)
                + (1 + dx) * x.bytes()
                + self.weight as u64 * dx * inputs[1..].first().map_or(0, TensorType::bytes)
                + vectors * 4 * x.last() as u64,
            scratch: 0,
        }
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let dy = backward.only_gradient("layer_norm").slice();
        let x = backward.input(0).slice();
        let weight = self.weight.then(|| backward.input(1).slice());
        let mean = backward.output(1).slice().typed();
        let rstd = backward.output(2).slice().typed();
        let (dx, rest) = backward
            .wanted
            .split_first_mut()
            .expect("layer_norm has an operand");
        let (dweight, dbias) = rest.split_at_mut(self.weight as usize);
        let dx = dx.as_mut().map(|dx| dx.tensor.slice_mut());
        let dweight = dweight.first_mut().and_then(Option::as_mut);
        let dbias = dbias.first_mut().and_then(Option::as_mut);
        optional_in_f32(dweight, |dweight| {
            optional_in_f32(dbias, |dbias| {
                rows::layer_norm_backward(dy, x, weight, mean, rstd, dx, dweight, dbias);
            });
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
impl LayerNorm {
    fn norm(&self) -> Norm {
        Norm {
            name: "layer_norm",
            eps: self.eps,
            mean: true,
            weight: self.weight,
            bias: self.bias.then(|| self.bias_at()),
        }
    }
}
