//! The element types, and slices that know theirs.
//!
//! dtype ends where data is loaded (widened to f32) and stored (narrowed): kernels compute in f32 and are generic over
//! [`Float`] only at their edges.

use bytemuck::Pod;
use half::{bf16, f16};
use std::fmt;

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "lowercase")
)]
pub enum DType {
    /// IEEE 754 single precision.
    F32,
    /// bfloat16: f32's exponent, 8 bits of significand.
    Bf16,
    /// IEEE 754 half precision.
    F16,
    /// Indices: token numbers, labels.
    U32,
}

impl DType {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::Bf16 | DType::F16 => 2,
        }
    }

    /// The name used in files, flags and messages: `f32`, `bf16`, `f16`, `u32`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::U32 => "u32",
        }
    }

    /// True for the types that kernels compute on.
    pub const fn is_float(self) -> bool {
        !matches!(self, DType::U32)
    }

    /// Unit roundoff of the type: half the distance from 1 to the next larger number; 0 for indices.
    pub const fn roundoff(self) -> f64 {
        match self {
            DType::F32 => 1.0 / (1u64 << 24) as f64,
            DType::Bf16 => 1.0 / (1u64 << 8) as f64,
            DType::F16 => 1.0 / (1u64 << 11) as f64,
            DType::U32 => 0.0,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for DType {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        [DType::F32, DType::Bf16, DType::F16, DType::U32]
            .into_iter()
            .find(|d| d.name() == s)
            .ok_or_else(|| format!("'{s}' is no element type; choose f32, bf16, f16 or u32"))
    }
}

/// A tensor's shape and element type: all that a dry run knows of it.
#[derive(Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct TensorType {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
}

impl TensorType {
    /// A type from its parts.
    pub fn new(shape: impl Into<Vec<usize>>, dtype: DType) -> Self {
        TensorType {
            shape: shape.into(),
            dtype,
        }
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of contents, before rounding.
    pub fn bytes(&self) -> u64 {
        (self.elements() * self.dtype.size()) as u64
    }

    /// Bytes that a tensor of this type takes in memory: the contents rounded up to 64.
    pub fn allocated_bytes(&self) -> u64 {
        self.bytes().next_multiple_of(64)
    }

    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// Size of the last axis; 1 for a scalar.
    pub fn last(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Product of all sizes but the last.
    pub fn rows(&self) -> usize {
        self.shape[..self.shape.len().saturating_sub(1)]
            .iter()
            .product()
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)
    }
}

impl fmt::Debug for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
    impl Sealed for u32 {}
}

/// A Rust type that a tensor can hold.
pub trait Element: Pod + Send + Sync + PartialEq + fmt::Debug + sealed::Sealed {
    /// The tensor type of `Self`.
    const DTYPE: DType;
}

/// An element that kernels compute on, in f32.
pub trait Float: Element {
    /// Widen: exact.
    fn to_f32(self) -> f32;
    /// Narrow: round to nearest, ties to even.
    fn from_f32(x: f32) -> Self;
}

macro_rules! elements {
    ($($t:ty => $d:ident),*) => { $(impl Element for $t { const DTYPE: DType = DType::$d; })* };
}
elements!(f32 => F32, bf16 => Bf16, f16 => F16, u32 => U32);

impl Float for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
}

impl Float for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
}

impl Float for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
}

/// Elements of any type, borrowed.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Slice<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
    U32(&'a [u32]),
}

/// Elements of any type, borrowed for writing.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum SliceMut<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
    F16(&'a mut [f16]),
    U32(&'a mut [u32]),
}

impl<'a> Slice<'a> {
    /// Views bytes as elements of `dtype`. Panics if the bytes are misaligned or not a whole number of elements.
    pub fn of_bytes(bytes: &'a [u8], dtype: DType) -> Self {
        match dtype {
            DType::F32 => Slice::F32(bytemuck::cast_slice(bytes)),
            DType::Bf16 => Slice::Bf16(bytemuck::cast_slice(bytes)),
            DType::F16 => Slice::F16(bytemuck::cast_slice(bytes)),
            DType::U32 => Slice::U32(bytemuck::cast_slice(bytes)),
        }
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            Slice::F32(_) => DType::F32,
            Slice::Bf16(_) => DType::Bf16,
            Slice::F16(_) => DType::F16,
            Slice::U32(_) => DType::U32,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Slice::F32(s) => s.len(),
            Slice::Bf16(s) => s.len(),
            Slice::F16(s) => s.len(),
            Slice::U32(s) => s.len(),
        }
    }

    /// True without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as `T`. Panics if they are of another type.
    pub fn typed<T: Element>(self) -> &'a [T] {
        assert_eq!(
            self.dtype(),
            T::DTYPE,
            "elements are {}, asked for {}",
            self.dtype(),
            T::DTYPE
        );
        match self {
            Slice::F32(s) => bytemuck::cast_slice(s),
            Slice::Bf16(s) => bytemuck::cast_slice(s),
            Slice::F16(s) => bytemuck::cast_slice(s),
            Slice::U32(s) => bytemuck::cast_slice(s),
        }
    }
}

impl<'a> SliceMut<'a> {
    /// Views bytes as elements of `dtype`. Panics if the bytes are misaligned or not a whole number of elements.
    pub fn of_bytes(bytes: &'a mut [u8], dtype: DType) -> Self {
        match dtype {
            DType::F32 => SliceMut::F32(bytemuck::cast_slice_mut(bytes)),
            DType::Bf16 => SliceMut::Bf16(bytemuck::cast_slice_mut(bytes)),
            DType::F16 => SliceMut::F16(bytemuck::cast_slice_mut(bytes)),
            DType::U32 => SliceMut::U32(bytemuck::cast_slice_mut(bytes)),
        }
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            SliceMut::F32(_) => DType::F32,
            SliceMut::Bf16(_) => DType::Bf16,
            SliceMut::F16(_) => DType::F16,
            SliceMut::U32(_) => DType::U32,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            SliceMut::F32(s) => s.len(),
            SliceMut::Bf16(s) => s.len(),
            SliceMut::F16(s) => s.len(),
            SliceMut::U32(s) => s.len(),
        }
    }

    /// True without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as `T`. Panics if they are of another type.
    pub fn typed<T: Element>(self) -> &'a mut [T] {
        assert_eq!(
            self.dtype(),
            T::DTYPE,
            "elements are {}, asked for {}",
            self.dtype(),
            T::DTYPE
        );
        match self {
            SliceMut::F32(s) => bytemuck::cast_slice_mut(s),
            SliceMut::Bf16(s) => bytemuck::cast_slice_mut(s),
            SliceMut::F16(s) => bytemuck::cast_slice_mut(s),
            SliceMut::U32(s) => bytemuck::cast_slice_mut(s),
        }
    }

    /// A shorter borrow of the same elements.
    pub fn reborrow(&mut self) -> SliceMut<'_> {
        match self {
            SliceMut::F32(s) => SliceMut::F32(s),
            SliceMut::Bf16(s) => SliceMut::Bf16(s),
            SliceMut::F16(s) => SliceMut::F16(s),
            SliceMut::U32(s) => SliceMut::U32(s),
        }
    }
}
