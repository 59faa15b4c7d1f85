//! Copies of blocks of A and B in the order in which the microkernel reads them, widened to f32.
//!
//! Both operands are cut into panels: W lines (rows of A, columns of B) side by side, element (p, i) of a panel at
//! p W + i. One function serves both, since a panel of A is a panel of B transposed. What is contiguous in memory
//! decides how: along the lines (vectors are copied), along k (squares are transposed in registers), or neither.

#![allow(unsafe_code)]

use super::super::simd::{Kernel, Simd};
use crate::dtype::{DType, Float};
use half::{bf16, f16};
use std::marker::PhantomData;

/// Part of an operand: `lines` (rows of A, columns of B) by `depth` (k), at any distance from one another.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub data: *const u8,
    pub dtype: DType,
    pub lines: usize,
    pub depth: usize,
    /// Elements from a line to the next.
    pub line_stride: usize,
    /// Elements from one k to the next.
    pub depth_stride: usize,
}

/// Writes panels of W = `width` lines, `depth * width` f32 each; the missing lines of the last panel are 0.
///
/// # Safety
/// The block's elements are readable. From `to`, `lines` rounded up to `width`, times `depth`, plus 16 f32 are writable.
#[inline(always)]
pub(super) unsafe fn pack<S: Simd>(s: S, block: Block, width: usize, to: *mut f32) {
    // A function of its own for each type, not a copy wherever something is packed.
    match block.dtype {
        DType::F32 => s.run(Pack::<f32>(block, width, to, PhantomData)),
        DType::Bf16 => s.run(Pack::<bf16>(block, width, to, PhantomData)),
        DType::F16 => s.run(Pack::<f16>(block, width, to, PhantomData)),
        DType::U32 => unreachable!("checked on entry"),
    }
}

/// The arguments of [`pack`], whose promise holds wherever one is made.
struct Pack<T>(Block, usize, *mut f32, PhantomData<T>);

impl<T: Float> Kernel for Pack<T> {
    type Output = ();
    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        // SAFETY: made by `pack` only, under its promise.
        unsafe { pack_typed::<S, T>(s, self.0, self.1, self.2) }
    }
}

#[inline(always)]
unsafe fn pack_typed<S: Simd, T: Float>(s: S, block: Block, width: usize, to: *mut f32) {
    let data = block.data.cast::<T>();
    for (panel, line) in (0..block.lines).step_by(width).enumerate() {
        let lines = width.min(block.lines - line);
        // SAFETY: the panel's lines lie in the block, its copy in the space that the caller promised.
        unsafe {
            let (from, to) = (
                data.add(line * block.line_stride),
                to.add(panel * width * block.depth),
            );
            if block.line_stride == 1 {
                copy_lines(s, from, block, lines, width, to);
            } else if block.depth_stride == 1 {
                transpose_lines(s, from, block, lines, width, to);
            } else {
                for p in 0..block.depth {
                    for i in 0..width {
                        *to.add(p * width + i) = if i < lines {
                            (*from.add(i * block.line_stride + p * block.depth_stride)).to_f32()
                        } else {
                            0.0
                        };
                    }
                }
            }
        }
    }
}

/// # Safety
/// As [`pack`], for one panel. Stores reach up to a vector beyond the width: what lies there is written later.
#[inline(always)]
unsafe fn copy_lines<S: Simd, T: Float>(
    s: S,
    from: *const T,
    block: Block,
    lines: usize,
    width: usize,
    to: *mut f32,
) {
    for p in 0..block.depth {
        // SAFETY: vector by vector inside the lines; the stores stay within 15 f32 after the panel.
        unsafe {
            let (from, to) = (from.add(p * block.depth_stride), to.add(p * width));
            for i in (0..width).step_by(S::LANES) {
                let v = if i + S::LANES <= lines {
                    s.load_ptr(from.add(i))
                } else if i < lines {
                    s.load_first_ptr(from.add(i), lines - i)
                } else {
                    s.zero()
                };
                s.store_ptr(to.add(i), v);
            }
        }
    }
}

/// # Safety
/// As [`pack`], for one panel. Stores reach up to a vector beyond the width: what lies there is written later.
#[inline(always)]
unsafe fn transpose_lines<S: Simd, T: Float>(
    s: S,
    from: *const T,
    block: Block,
    lines: usize,
    width: usize,
    to: *mut f32,
) {
    let mut square = [s.zero(); 16];
    let square = &mut square[..S::LANES];
    for p in (0..block.depth).step_by(S::LANES) {
        let deep = S::LANES.min(block.depth - p);
        for i in (0..width).step_by(S::LANES) {
            for (row, v) in square.iter_mut().enumerate() {
                let from = from.wrapping_add((i + row) * block.line_stride + p);
                // SAFETY: line i + row < lines is the block's, and `deep` elements from p on are.
                *v = unsafe {
                    match i + row < lines {
                        true if deep == S::LANES => s.load_ptr(from),
                        true => s.load_first_ptr(from, deep),
                        false => s.zero(),
                    }
                };
            }
            s.transpose(square);
            for (q, &v) in square.iter().enumerate().take(deep) {
                // SAFETY: row p + q of the panel, and at most 15 f32 after the panel. Where the width is less than a
                // vector the rows are written in ascending order, so that each one's excess is overwritten.
                unsafe {
                    let to = to.add((p + q) * width + i);
                    if i == 0 || i + S::LANES <= width {
                        s.store_ptr(to, v);
                    } else {
                        s.store_first_ptr(to, width - i, v);
                    }
                }
            }
        }
    }
}
