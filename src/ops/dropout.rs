//! Elements left out at random, the same ones on every mesh.

use super::activation::one_float;
#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::{Axes, Backward, Cost, Linear, Op, Site};
use crate::cpu::rows;
use crate::dtype::{Slice, SliceMut};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::placement::TokenOrder;
use crate::random::Stream;
use crate::tensor::{Tensor, TensorType};

/// `y = x / (1 - p)` with probability `1 - p`, else 0 (Srivastava et al. 2014).
///
/// Which elements stay is a function of the run's seed, the name, and the element's index in the whole of a step, tokens in the
/// order of the text (see [`Stream`]): chips, micro-batches and the backward agree without sending or storing a mask. Give every use its
/// own name, with the step in it. Backward: the same function of dy.
#[derive(Clone, Debug)]
pub struct Dropout {
    /// Probability of leaving an element out, in 0..1.
    pub p: f32,
    /// The name of the stream of random numbers.
    pub name: String,
    /// In which order tokens, axis 1, are kept.
    pub order: TokenOrder,
    /// Elements along axis 0 that stand before the tensor's in the whole: those of earlier micro-batches of a step.
    pub rows_before: usize,
}

impl Dropout {
    /// Elements of the whole before the tensor's.
    fn before(&self, site: &Site) -> u64 {
        let row: usize = site.inputs[0].global.iter().skip(1).product();
        self.rows_before as u64 * row as u64
    }

    fn apply(&self, site: &Site, x: Slice, y: SliceMut) {
        let stream = Stream::new(site.seed, &self.name);
        let (run, start) = site.inputs[0].runs_in(&self.order);
        let before = self.before(site);
        rows::dropout(x, y, self.p, stream, run, |r| before + start(r));
    }
}

#[cfg(feature = "gpu")]
impl Dropout {
    fn apply_gpu(&self, site: &Site, x: gpu::Operand, y: gpu::Operand) {
        let stream = Stream::new(site.seed, &self.name);
        let (run, start) = site.inputs[0].runs_in(&self.order);
        let before = self.before(site);
        gpu::dropout(x, y, self.p, stream, run, |r| before + start(r));
    }
}

impl Op for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        if !(0.0..1.0).contains(&self.p) {
            return Err(format!(
                "dropout wants a probability from 0 to below 1, got {}",
                self.p
            ));
        }
        one_float("dropout", inputs)
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        Axes::elementwise(1, &inputs[0]).linear(Linear::Jointly)
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 1)
    }

    fn forward(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        self.apply(site, inputs[0].slice(), outputs[0].slice_mut());
    }

    fn backward_cost(&self, inputs: &[TensorType], outputs: &[TensorType], _: &[bool]) -> Cost {
        self.cost(inputs, outputs)
    }

    fn backward(&self, site: &Site, backward: &mut Backward) {
        let dy = backward.gradient(0);
        if let Some(dx) = backward.want(0) {
            self.apply(site, dy.slice(), dx.tensor.slice_mut());
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, site: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        self.apply_gpu(site, read(inputs[0]), write(&mut outputs[0]));
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, site: &Site, backward: &mut Backward) {
        let dy = read(backward.gradient(0));
        if let Some(dx) = backward.want(0) {
            self.apply_gpu(site, dy, dx.operand().0);
        }
    }
}
