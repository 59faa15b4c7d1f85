//! How a kernel of rows or of columns runs: outputs cut for the threads, scratch from the thread, code for the
//! instruction set.

use super::parallel::{Split, column_block, for_columns, for_rows};
use crate::memory::with_scratch_f32;
use crate::simd::{Kernel, Simd, dispatch, isa};
use std::ops::Range;

/// A loop over some of the rows, or columns, with their part of the output.
pub(crate) trait Run<O>: Sync {
    /// Works on `range`; `scratch` has unspecified contents. Write it with `#[inline(always)]`.
    fn run<S: Simd>(&self, s: S, range: Range<usize>, out: O, scratch: &mut [f32]);
}

/// The kernel comes first: its module is the tuple's to the compiler, which puts the code there.
impl<K: Run<O>, O> Kernel for (&K, Range<usize>, O, &mut [f32]) {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let (kernel, range, out, scratch) = self;
        kernel.run(s, range, out, scratch);
    }
}

/// Runs the kernel over `rows` rows of `width` elements; each run of rows has `scratch` f32 for itself.
pub(crate) fn over_rows<O: Split>(
    kernel: &impl Run<O>,
    rows: usize,
    width: usize,
    scratch: usize,
    out: O,
) {
    let isa = isa();
    for_rows(rows, width, out, |range, out| {
        with_scratch_f32(scratch, |scratch| {
            dispatch(isa, (kernel, range, out, scratch));
        });
    });
}

/// Runs the kernel over blocks of `columns` columns of `rows` rows; a block has `scratch` f32 for each of its columns.
pub(crate) fn over_columns<O: Split>(
    kernel: &impl Run<O>,
    rows: usize,
    columns: usize,
    scratch: usize,
    out: O,
) {
    let isa = isa();
    let block = column_block(rows, columns);
    for_columns(columns, block, out, |range, out| {
        with_scratch_f32(scratch * range.len(), |scratch| {
            dispatch(isa, (kernel, range, out, scratch));
        });
    });
}
