//! Tensors joined along one axis.

#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::gradient::in_dtype;
use super::slice::{Blocks, along};
use super::{Accum, Axes, Backward, Cost, Op, Site, misfit};
use crate::tensor::{Tensor, TensorType};

/// `y = x0, x1, ..` one after the other along `axis`, all of one type and of one shape but for that axis.
///
/// Letters for axis 1 of three: `aBc,aBc->aBc`: that axis must be whole. Backward: each operand takes its part of dy.
#[derive(Clone, Debug)]
pub struct Concatenate {
    /// Which axis.
    pub axis: usize,
}

impl Concatenate {
    /// Where each operand lies on the axis of the result.
    fn places(&self, sizes: impl Iterator<Item = usize>) -> impl Iterator<Item = (usize, usize)> {
        sizes.scan(0, |end, size| {
            let start = *end;
            *end += size;
            Some((start, *end))
        })
    }
}

impl Op for Concatenate {
    fn name(&self) -> &'static str {
        "concatenate"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let axis = self.axis;
        let alike = |x: &TensorType, y: &TensorType| {
            x.dtype == y.dtype
                && x.rank() == y.rank()
                && (0..x.rank()).all(|i| i == axis || x.shape[i] == y.shape[i])
        };
        match inputs {
            [first, ..] if axis < first.rank() && inputs.iter().all(|x| alike(first, x)) => {
                let mut shape = first.shape.clone();
                shape[axis] = inputs.iter().map(|x| x.shape[axis]).sum();
                Ok(vec![TensorType::new(shape, first.dtype)])
            }
            _ => {
                let wants = format!("operands that differ on axis {axis} only");
                Err(misfit("concatenate", wants, inputs))
            }
        }
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        along(self.axis, inputs[0].rank(), inputs.len())
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost::elementwise(inputs, outputs, 0)
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let y = &mut outputs[0];
        let sizes = inputs.iter().map(|x| x.shape()[self.axis]);
        for (x, (start, end)) in inputs.iter().zip(self.places(sizes)) {
            let blocks = Blocks::new(y.shape(), self.axis, start..end);
            blocks.put(x.slice(), y.slice_mut());
        }
    }

    fn accumulates(&self, _: usize) -> bool {
        true
    }

    fn backward_cost(&self, inputs: &[TensorType], _: &[TensorType], wanted: &[bool]) -> Cost {
        let taken = inputs.iter().zip(wanted).filter(|(_, w)| **w);
        Cost {
            flops: 0,
            bytes: taken.map(|(x, _)| 2 * x.bytes()).sum(),
            scratch: 0,
        }
    }

    fn backward(&self, site: &Site, backward: &mut Backward) {
        let dy = backward.gradient(0);
        let sizes = site.inputs.iter().map(|x| x.ty.shape[self.axis]);
        for (i, (start, end)) in self.places(sizes).enumerate() {
            let Some(dx) = backward.want(i) else { continue };
            let blocks = Blocks::new(dy.shape(), self.axis, start..end);
            let accum = dx.accum;
            match accum {
                Accum::Add => blocks.take_adding(dy.slice(), dx.tensor.slice_mut()),
                Accum::Replace => in_dtype(dy, dx.tensor.dtype(), |dy| {
                    blocks.take(dy, dx.tensor.slice_mut());
                }),
            }
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let y = &mut outputs[0];
        let sizes = inputs.iter().map(|x| x.shape()[self.axis]);
        for (x, (start, end)) in inputs.iter().zip(self.places(sizes)) {
            let piece = Blocks::new(y.shape(), self.axis, start..end).piece();
            piece.place(read(x), write(y));
        }
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, site: &Site, backward: &mut Backward) {
        let dy = backward.gradient(0);
        let sizes = site.inputs.iter().map(|x| x.ty.shape[self.axis]);
        for (i, (start, end)) in self.places(sizes).enumerate() {
            let Some(dx) = backward.want(i) else { continue };
            let (dx, add) = dx.operand();
            let piece = Blocks::new(dy.shape(), self.axis, start..end).piece();
            piece.take(read(dy), dx, add);
        }
    }
}
