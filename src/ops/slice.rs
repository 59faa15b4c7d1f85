//! A range of one axis, and its opposite in [`Concatenate`](super::Concatenate).

#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::gradient::in_dtype;
use super::{Accum, Axes, Backward, Cost, Linear, Op, Site, letters, misfit};
use crate::cpu::rows::{
    self,
    parallel::{part, part_mut},
};
use crate::dtype::{Slice, SliceMut};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};
use std::ops::Range;

/// `y = x[.., range, ..]` along `axis`. Any element type.
///
/// Letters for axis 1 of three: `aBc->aBc`: that axis must be whole. Backward: dx is dy inside the range, 0 outside.
#[derive(Clone, Debug)]
pub struct SliceAxis {
    /// Which axis.
    pub axis: usize,
    /// Which of its indices.
    pub range: Range<usize>,
}

/// Letters of `inputs` operands and one result of `rank` axes, of which `axis` must be whole.
pub(crate) fn along(axis: usize, rank: usize, inputs: usize) -> Axes {
    let letters: String = letters(rank)
        .enumerate()
        .map(|(i, l)| if i == axis { l.to_ascii_uppercase() } else { l })
        .collect();
    let operands = vec![letters.as_str(); inputs].join(",");
    Axes::new(&format!("{operands}->{letters}")).linear(Linear::Jointly)
}

/// A tensor cut along an axis: `outer` blocks of `inner` elements each, of which a piece takes `range`.
pub(crate) struct Blocks {
    pub(crate) outer: usize,
    pub(crate) inner: usize,
    pub(crate) range: Range<usize>,
}

impl Blocks {
    /// The piece `range` of `axis` of a tensor of this shape.
    pub(crate) fn new(shape: &[usize], axis: usize, range: Range<usize>) -> Self {
        let below: usize = shape[axis + 1..].iter().product();
        Blocks {
            outer: shape[..axis].iter().product(),
            inner: shape[axis] * below,
            range: range.start * below..range.end * below,
        }
    }

    /// The same for a graphics processor.
    #[cfg(feature = "gpu")]
    pub(crate) fn piece(&self) -> gpu::Piece {
        gpu::Piece {
            inner: self.inner,
            start: self.range.start,
            width: self.range.len(),
        }
    }

    fn strided(&self) -> ([usize; 2], [usize; 2], [usize; 2]) {
        let n = self.range.len();
        ([self.inner, 1], [n, 1], [self.outer, n])
    }

    /// The piece out of the whole.
    pub(crate) fn take(&self, whole: Slice, piece: SliceMut) {
        if self.outer * self.range.len() > 0 {
            let (whole_strides, piece_strides, shape) = self.strided();
            let from = part(whole, self.range.start..whole.len());
            rows::copy_strided(from, &whole_strides, piece, &piece_strides, &shape);
        }
    }

    /// The piece into the whole, of the same element type; the rest of the whole is left as it is.
    pub(crate) fn put(&self, piece: Slice, mut whole: SliceMut) {
        if self.outer * self.range.len() > 0 {
            let (whole_strides, piece_strides, shape) = self.strided();
            let all = whole.len();
            let to = part_mut(&mut whole, self.range.start..all);
            rows::copy_strided(piece, &piece_strides, to, &whole_strides, &shape);
        }
    }

    /// The piece of the whole added to `piece`, any float types.
    pub(crate) fn take_adding(&self, whole: Slice, mut piece: SliceMut) {
        let n = self.range.len();
        for block in 0..self.outer {
            let from = block * self.inner + self.range.start;
            let sum = part_mut(&mut piece, block * n..(block + 1) * n);
            rows::add_assign(sum, part(whole, from..from + n));
        }
    }

    /// The piece added to its place in the whole, any float types.
    pub(crate) fn put_adding(&self, piece: Slice, mut whole: SliceMut) {
        let n = self.range.len();
        for block in 0..self.outer {
            let to = block * self.inner + self.range.start;
            let sum = part_mut(&mut whole, to..to + n);
            rows::add_assign(sum, part(piece, block * n..(block + 1) * n));
        }
    }
}

impl Op for SliceAxis {
    fn name(&self) -> &'static str {
        "slice"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let Range { start, end } = self.range;
        match inputs {
            [x] if self.axis < x.rank() && start <= end && end <= x.shape[self.axis] => {
                let mut shape = x.shape.clone();
                shape[self.axis] = end - start;
                Ok(vec![TensorType::new(shape, x.dtype)])
            }
            _ => {
                let wants = format!(
                    "one operand with indices {start}..{end} on axis {}",
                    self.axis
                );
                Err(misfit("slice", wants, inputs))
            }
        }
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        along(self.axis, inputs[0].rank(), 1)
    }

    fn cost(&self, _: &[TensorType], outputs: &[TensorType]) -> Cost {
        Cost {
            flops: 0,
            bytes: 2 * outputs[0].bytes(),
            scratch: 0,
        }
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let x = inputs[0];
        Blocks::new(x.shape(), self.axis, self.range.clone())
            .take(x.slice(), outputs[0].slice_mut());
    }

    fn accumulates(&self, _: usize) -> bool {
        true
    }

    fn backward_cost(&self, inputs: &[TensorType], outputs: &[TensorType], _: &[bool]) -> Cost {
        Cost {
            flops: 0,
            bytes: outputs[0].bytes() + inputs[0].bytes(),
            scratch: 0,
        }
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let dy = backward.gradient(0);
        let Some(dx) = backward.want(0) else { return };
        let blocks = Blocks::new(dx.tensor.shape(), self.axis, self.range.clone());
        match dx.accum {
            Accum::Add => blocks.put_adding(dy.slice(), dx.tensor.slice_mut()),
            Accum::Replace => in_dtype(dy, dx.tensor.dtype(), |dy| {
                super::sum::fill(dx.tensor.slice_mut(), 0.0);
                blocks.put(dy, dx.tensor.slice_mut());
            }),
        }
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let x = inputs[0];
        let blocks = Blocks::new(x.shape(), self.axis, self.range.clone());
        blocks.piece().take(read(x), write(&mut outputs[0]), false);
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        let dy = read(backward.gradient(0));
        let Some(dx) = backward.want(0) else { return };
        let blocks = Blocks::new(dx.tensor.shape(), self.axis, self.range.clone());
        let (dx, add) = dx.operand();
        blocks.piece().put(dy, dx, add);
    }
}
