//! Sums, products, scales and casts of single elements. Each function computes in f32 and rounds once.

use super::pointwise::{Pointwise, pointwise};
use crate::dtype::{Slice, SliceMut};
use crate::simd::Simd;

#[derive(Clone, Copy)]
struct Add;
impl Pointwise<2, 1> for Add {
    #[inline(always)]
    fn at<S: Simd>(self, s: S, [a, b]: [S::V; 2], _: [S::V; 1]) -> [S::V; 1] {
        [s.add(a, b)]
    }
}

/// y = a + b. Panics unless the lengths are equal, as all functions of this file do.
pub fn add(a: Slice, b: Slice, y: SliceMut) {
    pointwise(Add, [a, b], [y]);
}

#[derive(Clone, Copy)]
struct Multiply;
impl Pointwise<2, 1> for Multiply {
    #[inline(always)]
    fn at<S: Simd>(self, s: S, [a, b]: [S::V; 2], _: [S::V; 1]) -> [S::V; 1] {
        [s.mul(a, b)]
    }
}

/// y = a b, element by element.
pub fn multiply(a: Slice, b: Slice, y: SliceMut) {
    pointwise(Multiply, [a, b], [y]);
}

#[derive(Clone, Copy)]
struct Scale(f32);
impl Pointwise<1, 1> for Scale {
    #[inline(always)]
    fn at<S: Simd>(self, s: S, [x]: [S::V; 1], _: [S::V; 1]) -> [S::V; 1] {
        [s.mul(x, s.splat(self.0))]
    }
}

/// y = factor x.
pub fn scale(x: Slice, factor: f32, y: SliceMut) {
    pointwise(Scale(factor), [x], [y]);
}

#[derive(Clone, Copy)]
struct AddAssign;
impl Pointwise<1, 1> for AddAssign {
    const IN_PLACE: bool = true;
    #[inline(always)]
    fn at<S: Simd>(self, s: S, [x]: [S::V; 1], [y]: [S::V; 1]) -> [S::V; 1] {
        [s.add(y, x)]
    }
}

/// sum <- sum + x.
pub fn add_assign(sum: SliceMut, x: Slice) {
    pointwise(AddAssign, [x], [sum]);
}

#[derive(Clone, Copy)]
struct Cast;
impl Pointwise<1, 1> for Cast {
    #[inline(always)]
    fn at<S: Simd>(self, _: S, x: [S::V; 1], _: [S::V; 1]) -> [S::V; 1] {
        x
    }
}

/// y = x, in y's element type (nearest, ties to even).
pub fn cast(x: Slice, y: SliceMut) {
    pointwise(Cast, [x], [y]);
}
