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
    /// The chip's share, in f32.
    pub value: Tensor,
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
        let (shape, padded) = (shape.into(), padded.into());
        let placements = self.normalize(&placements.into());
        let fits = shape.len() == padded.len() && shape.iter().zip(&padded).all(|(s, p)| s <= p);
        assert!(
            fits,
            "parameter '{name}': padded shape {padded:?} is smaller than {shape:?}"
        );
        let site = Location::caller();
        let known = self.parameters().iter().position(|p| *p.name == *name);
        let at = known.unwrap_or_else(|| {
            let value = self.first_value(name, &shape, &padded, &placements, init, site);
            let mut all = self.parameters_mut();
            all.push(Parameter {
                name: name.into(),
                shape: shape.clone(),
                padded: padded.clone(),
                placements: placements.clone(),
                value,
                gradient: Vec::new(),
                id: self.new_value(),
            });
            all.len() - 1
        });
        let all = self.parameters();
        let p = &all[at];
        assert!(
            p.shape == shape && p.placements == placements && p.padded == padded,
            "parameter '{name}' is {:?} {} and was asked for as {shape:?} {placements} at {site}",
            p.shape,
            p.placements
        );
        Sharded::leaf(self, p)
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
            (Some(whole), _) => fill(&mut value, &local, shape, |i| whole[i as usize]),
            (None, Init::Constant(c)) => fill(&mut value, &local, shape, |_| c),
            (None, Init::Normal(deviation)) => {
                let stream = Stream::new(self.seed(), name);
                fill(&mut value, &local, shape, |i| deviation * stream.normal(i));
            }
        }
        value
    }

    /// Optimizer state beside a parameter: zeros, or what the checkpoint holds under `name`.
    pub(crate) fn state(&self, name: &str, parameter: &Parameter) -> Tensor {
        let p = parameter;
        self.first_value(
            name,
            &p.shape,
            &p.padded,
            &p.placements,
            Init::zeros(),
            Location::caller(),
        )
    }

    /// The whole, unpadded tensor of a share, on every chip: what a checkpoint stores. No ghost has it.
    pub(crate) fn whole(&self, share: &Tensor, parameter: &Parameter) -> Vec<f32> {
        let p = parameter;
        let value =
            Sharded::unrecorded(self, share.clone(), p.padded.clone(), p.placements.clone());
        let all = value.gather().tensor().clone();
        let local = Local::whole(TensorType::new(p.padded.clone(), DType::F32));
        let from = all.slice().typed::<f32>();
        let mut out = vec![0.0; p.elements()];
        each_valid(&local, &p.shape, |at, index| out[index as usize] = from[at]);
        out
    }
}

/// Writes `value(index in the unpadded whole)` to each element of a share, and zero where the share is padding.
fn fill(tensor: &mut Tensor, local: &Local, shape: &[usize], value: impl Fn(u64) -> f32 + Sync) {
    let data = tensor.slice_mut().typed::<f32>();
    data.fill(0.0);
    each_valid(local, shape, |at, index| data[at] = value(index));
}

/// Calls `visit(index in the share, index in the unpadded whole)` for every element of the share that is no padding.
fn each_valid(local: &Local, shape: &[usize], mut visit: impl FnMut(usize, u64)) {
    let axes = shape.len();
    let mut at = vec![0usize; axes];
    for i in 0..local.ty.elements() {
        let index = (0..axes).try_fold(0u64, |index, axis| {
            let global = local.start[axis] + at[axis];
            (global < shape[axis]).then_some(index * shape[axis] as u64 + global as u64)
        });
        if let Some(index) = index {
            visit(i, index);
        }
        for axis in (0..axes).rev() {
            at[axis] += 1;
            if at[axis] < local.ty.shape[axis] {
                break;
            }
            at[axis] = 0;
        }
    }
}
