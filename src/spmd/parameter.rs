//! Parameters: what a program learns, each chip holding its share.

use super::{Chip, Sharded};
use crate::dtype::DType;
use crate::dtype::TensorType;
use crate::error::Error;
use crate::ops::Local;
use crate::placement::Placements;
use crate::random::Stream;
use crate::tape::ValueId;
use crate::tensor::Tensor;
use rayon::prelude::*;
use std::panic::Location;
use std::rc::Rc;

/// How a parameter's elements begin. Each belongs to its index in the whole tensor, so every mesh begins alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Normal with mean 0 and this standard deviation, from the run's seed and the parameter's name.
    Normal(f32),
    /// All elements this number.
    Constant(f32),
}

impl Init {
    /// Normal with mean 0 and standard deviation `deviation`.
    pub fn normal(deviation: f32) -> Self {
        Init::Normal(deviation)
    }

    /// All zero.
    pub fn zeros() -> Self {
        Init::Constant(0.0)
    }

    /// All one.
    pub fn ones() -> Self {
        Init::Constant(1.0)
    }
}

/// A parameter as a chip holds it.
#[derive(Debug)]
pub struct Parameter {
    /// Its name, unique in the program.
    pub name: Rc<str>,
    /// Shape of the whole, without padding.
    pub shape: Vec<usize>,
    /// Shape of the whole as it is split: the first dimension may be longer than `shape`'s, padded with zeros.
    pub padded: Vec<usize>,
    /// Placement.
    pub placements: Placements,
    /// Placement of the state and of the gradient once it is reduced: `placements`, unless [`Chip::split_parameters`]
    /// splits these and not the parameter.
    pub kept: Placements,
    /// The chip's share, in f32.
    pub value: Tensor,
    /// What an optimizer keeps beside it, placed as `kept`; see [`Chip::keep_state`].
    pub state: Vec<Tensor>,
    /// Contributions to the gradient, by placement.
    pub gradient: Vec<(Placements, Tensor)>,
    pub(super) id: ValueId,
}

impl Parameter {
    /// Elements of the whole, padding not counted.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// True for matrices: what weight decay applies to.
    pub fn is_matrix(&self) -> bool {
        self.shape.len() >= 2
    }
}

/// Where parameters and optimizer state come from instead of their [`Init`]: a checkpoint. Given a name, fills the
/// elements of the whole, unpadded tensor, or says that it does not know the name.
pub(super) type Source = Rc<dyn Fn(&str, &[usize]) -> Result<Option<Vec<f32>>, Error>>;

impl Chip {
    /// The parameter `name` of the whole `shape` in f32, made on its first use.
    ///
    /// # Panics
    /// If the name was used with another shape or placement, or the placements do not fit the shape.
    #[track_caller]
    pub fn parameter(
        &self,
        name: &str,
        shape: impl Into<Vec<usize>>,
        placements: impl Into<Placements>,
        init: Init,
    ) -> Sharded {
        let shape = shape.into();
        self.padded_parameter(name, shape.clone(), shape, placements, init)
    }

    /// A parameter whose storage is longer than it: `padded` is at least `shape` in every dimension, elements beyond
    /// `shape` are zero, get no gradient by the ops that know of it, and appear in no count and no checkpoint.
    ///
    /// # Panics
    /// As [`Chip::parameter`], or if `padded` is smaller than `shape`.
    #[track_caller]
    pub fn padded_parameter(
        &self,
        name: &str,
        shape: impl Into<Vec<usize>>,
        padded: impl Into<Vec<usize>>,
        placements: impl Into<Placements>,
        init: Init,
    ) -> Sharded {
        let (padded, used) = (padded.into(), placements.into());
        self.parameter_as(name, (shape.into(), padded), used, init, DType::F32)
    }

    /// A [`Chip::padded_parameter`] of (shape, padded shape) in the type `dtype`. If [`Chip::split_parameters`] splits
    /// parameters, it is gathered in this type.
    ///
    /// # Panics
    /// As [`Chip::padded_parameter`].
    #[track_caller]
    pub fn parameter_as(
        &self,
        name: &str,
        (shape, padded): (Vec<usize>, Vec<usize>),
        placements: Placements,
        init: Init,
        dtype: DType,
    ) -> Sharded {
        let used = self.normalize(&placements);
        let fits = shape.len() == padded.len() && shape.iter().zip(&padded).all(|(s, p)| s <= p);
        assert!(
            fits,
            "parameter '{name}': padded shape {padded:?} is smaller than {shape:?}"
        );
        let site = Location::caller();
        let (placements, kept) = self.zero_placements(&padded, &used);
        let at = self.known(
            name,
            &(shape.clone(), padded.clone(), used.clone()),
            init,
            site,
        );
        let all = self.parameters();
        let p = &all[at];
        assert!(
            p.shape == shape && p.placements == placements && p.padded == padded,
            "parameter '{name}' is {:?} {} and was asked for as {shape:?} {placements} at {site}",
            p.shape,
            p.placements
        );
        let (leaf, name) = (Sharded::leaf(self, p), p.name.clone());
        drop(all);
        let tracked = leaf.tracked;
        let whole = self.as_used((&name, tracked), leaf.cast(dtype), &used, &kept, site);
        if whole.gathered.is_some()
            && let Some(next) = self.next_in_line(&name)
        {
            let from = (shape, padded, used.clone());
            self.known(&next, &from, init, site);
            self.gather_ahead(&next, dtype, &used, site);
        }
        whole
    }

    /// Index of the parameter, which is made if this is its first use: of (shape, padded shape, placement in use).
    fn known(
        &self,
        name: &str,
        (shape, padded, used): &(Vec<usize>, Vec<usize>, Placements),
        init: Init,
        site: &'static Location<'static>,
    ) -> usize {
        let found = self.parameters().iter().position(|p| *p.name == *name);
        found.unwrap_or_else(|| {
            let (placements, kept) = self.zero_placements(padded, used);
            let value = self.first_value(name, shape, padded, &placements, init, site);
            let mut parameter = Parameter {
                name: name.into(),
                shape: shape.clone(),
                padded: padded.clone(),
                placements,
                kept,
                value,
                state: Vec::new(),
                gradient: Vec::new(),
                id: self.new_value(),
            };
            self.fill_state(&mut parameter);
            let mut all = self.parameters_mut();
            all.push(parameter);
            all.len() - 1
        })
    }

    fn first_value(
        &self,
        name: &str,
        shape: &[usize],
        padded: &[usize],
        placements: &Placements,
        init: Init,
        site: &'static Location<'static>,
    ) -> Tensor {
        let local = self.local(padded, DType::F32, placements, site);
        let mut value = self.allocate(&local.ty);
        if value.is_ghost() {
            return value;
        }
        let loaded = match self.source() {
            Some(source) => source(name, shape).unwrap_or_else(|e| self.fail(e)),
            None => None,
        };
        match (loaded, init) {
            (Some(whole), _) => fill(&mut value, &local, shape, |first, row| {
                row.copy_from_slice(&whole[first as usize..][..row.len()]);
            }),
            (None, Init::Constant(c)) => fill(&mut value, &local, shape, |_, row| row.fill(c)),
            (None, Init::Normal(deviation)) => {
                let stream = Stream::new(self.seed(), name);
                fill(&mut value, &local, shape, |first, row| {
                    stream.fill_normal(first, row);
                    row.iter_mut().for_each(|x| *x *= deviation);
                });
            }
        }
        value
    }

    /// Keeps a tensor of each of these names in f32 beside every parameter, from the parameter's first use on: an
    /// optimizer's state. It begins as zeros, or as what the checkpoint holds under `name/parameter`. Asked for before the
    /// first step, that step takes as much memory as every later one.
    pub fn keep_state(&self, names: &[&'static str]) {
        *self.inner().state_names.borrow_mut() = names.to_vec();
        let mut all = self.parameters_mut();
        all.iter_mut().for_each(|p| self.fill_state(p));
    }

    fn fill_state(&self, p: &mut Parameter) {
        let names = self.inner().state_names.borrow();
        for name in &names[p.state.len().min(names.len())..] {
            let name = format!("{name}/{}", p.name);
            let (init, site) = (Init::zeros(), Location::caller());
            let state = self.first_value(&name, &p.shape, &p.padded, &p.kept, init, site);
            p.state.push(state);
        }
    }

    /// The whole, unpadded tensor of a share of a parameter or of its state, placed as `placements`, on every chip: what a
    /// checkpoint stores. No ghost has it.
    pub(crate) fn whole(&self, share: &Tensor, placements: &Placements, p: &Parameter) -> Vec<f32> {
        let value = Sharded::unrecorded(self, share.clone(), p.padded.clone(), placements.clone());
        let all = value.gather().tensor().clone();
        let local = Local::whole(TensorType::new(p.padded.clone(), DType::F32));
        let from = all.slice().typed::<f32>();
        let mut out = vec![0.0; p.elements()];
        for (row, data) in from.chunks_exact(local.ty.last().max(1)).enumerate() {
            if let Some((first, len)) = valid_row(&local, &p.shape, row) {
                out[first as usize..][..len].copy_from_slice(&data[..len]);
            }
        }
        out
    }
}

/// Lets `write(index of the first element in the unpadded whole, row)` fill each row of a share, as far as it is no
/// padding; padding is zero.
fn fill(
    tensor: &mut Tensor,
    local: &Local,
    shape: &[usize],
    write: impl Fn(u64, &mut [f32]) + Sync,
) {
    let width = local.ty.last().max(1);
    let data = tensor.slice_mut().typed::<f32>();
    let rows = data.par_chunks_exact_mut(width).enumerate();
    rows.with_min_len(ROWS.div_ceil(width))
        .for_each(|(row, data)| {
            let (first, len) = valid_row(local, shape, row).unwrap_or((0, 0));
            data[len..].fill(0.0);
            if len > 0 {
                write(first, &mut data[..len]);
            }
        });
}

/// Elements that are worth a task of their own.
const ROWS: usize = 1 << 14;

/// Row `row` of a share, a row being its last axis: the index of its first element in the unpadded whole, and how many
/// elements from there on are no padding; none if the whole row is padding.
fn valid_row(local: &Local, shape: &[usize], row: usize) -> Option<(u64, usize)> {
    let Some(last) = shape.len().checked_sub(1) else {
        return Some((0, 1));
    };
    let (mut rest, mut index, mut stride) = (row, local.start[last] as u64, shape[last] as u64);
    for axis in (0..last).rev() {
        let at = local.start[axis] + rest % local.ty.shape[axis];
        rest /= local.ty.shape[axis];
        if at >= shape[axis] {
            return None;
        }
        index += at as u64 * stride;
        stride *= shape[axis] as u64;
    }
    let len = local.ty.shape[last].min(shape[last].saturating_sub(local.start[last]));
    (len > 0).then_some((index, len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_share_know_their_place_in_the_unpadded_whole() {
        // [5, 3] padded to [6, 4]; the share is rows 3..6, columns 2..4.
        let local = Local {
            ty: TensorType::new([3, 2], DType::F32),
            global: vec![6, 4],
            start: vec![3, 2],
        };
        let rows: Vec<_> = (0..3).map(|row| valid_row(&local, &[5, 3], row)).collect();
        assert_eq!(rows, [Some((11, 1)), Some((14, 1)), None]);
    }
}
