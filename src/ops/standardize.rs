//! Layer norm and RMS norm on a graphics processor: one has a mean and a bias more than the other.

use super::Backward;
use super::device::{read, write};
use crate::gpu;
use crate::tensor::Tensor;

/// What a norm has.
pub(super) struct Norm {
    pub(super) name: &'static str,
    pub(super) eps: f32,
    /// A mean is taken away; results are then y, mean, 1 / deviation, else y, 1 / deviation.
    pub(super) mean: bool,
    /// A second operand scales the columns.
    pub(super) weight: bool,
    /// The operand that is added to every row.
    pub(super) bias: Option<usize>,
}

impl Norm {
    pub(super) fn forward(&self, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let [y, statistics @ ..] = outputs else {
            unreachable!("infer gives a result")
        };
        let (mean, rstd) = statistics.split_at_mut(self.mean as usize);
        gpu::norm(
            read(inputs[0]),
            self.weight.then(|| read(inputs[1])),
            self.bias.map(|i| read(inputs[i])),
            self.eps,
            write(y),
            gpu::NormStatistics {
                mean: mean.first_mut().map(write),
                rstd: write(&mut rstd[0]),
            },
        );
    }

    pub(super) fn backward(&self, backward: &mut Backward) {
        let dy = read(backward.only_gradient(self.name));
        let x = read(backward.input(0));
        let statistics = gpu::NormStatistics {
            mean: self.mean.then(|| read(backward.output(1))),
            rstd: read(backward.output(1 + self.mean as usize)),
        };
        let weight = self.weight.then(|| read(backward.input(1)));
        if let Some(dx) = backward.want(0) {
            let (dx, _) = dx.operand();
            gpu::norm_dx(x.clone(), dy.clone(), weight, statistics.clone(), dx);
        }
        if self.weight
            && let Some(dweight) = backward.want(1)
        {
            let (dweight, add) = dweight.operand();
            gpu::norm_dweight(x, dy.clone(), statistics, dweight, add);
        }
        if let Some(i) = self.bias
            && let Some(dbias) = backward.want(i)
        {
            let (dbias, add) = dbias.operand();
            gpu::column_sum(dy, dbias, add);
        }
    }
}
