//! Rows over threads: outputs are cut into runs of whole rows, safely, by halving.
//!
//! Where the cuts fall never shows in the result, because no sum crosses a row (sums over rows are cut by columns). Work
//! below [`SMALL`] elements stays on the caller: waking a worker costs microseconds, as long as such work takes.

use crate::dtype::{Slice, SliceMut};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Elements up to which work stays on the calling thread.
pub const SMALL: usize = 32 * 1024;

/// Elements of one task, about: big enough to hide the cost of a task, small enough to balance the load.
const CHUNK: usize = 16 * 1024;

/// Elements `range` of `x`.
#[inline]
pub fn part(x: Slice<'_>, range: Range<usize>) -> Slice<'_> {
    match x {
        Slice::F32(x) => Slice::F32(&x[range]),
        Slice::Bf16(x) => Slice::Bf16(&x[range]),
        Slice::F16(x) => Slice::F16(&x[range]),
        Slice::U32(x) => Slice::U32(&x[range]),
    }
}

/// Elements `range` of `x`, for writing.
#[inline]
pub fn part_mut<'a>(x: &'a mut SliceMut<'_>, range: Range<usize>) -> SliceMut<'a> {
    match x {
        SliceMut::F32(x) => SliceMut::F32(&mut x[range]),
        SliceMut::Bf16(x) => SliceMut::Bf16(&mut x[range]),
        SliceMut::F16(x) => SliceMut::F16(&mut x[range]),
        SliceMut::U32(x) => SliceMut::U32(&mut x[range]),
    }
}

/// The elements before `at`, and the others.
pub fn split_at(x: SliceMut<'_>, at: usize) -> (SliceMut<'_>, SliceMut<'_>) {
    macro_rules! halves {
        ($($kind:ident),*) => {
            match x {
                $(SliceMut::$kind(x) => {
                    let (a, b) = x.split_at_mut(at);
                    (SliceMut::$kind(a), SliceMut::$kind(b))
                })*
            }
        };
    }
    halves!(F32, Bf16, F16, U32)
}

/// The same elements, read only.
#[inline]
pub fn shared<'a>(x: &'a SliceMut<'_>) -> Slice<'a> {
    match x {
        SliceMut::F32(x) => Slice::F32(x),
        SliceMut::Bf16(x) => Slice::Bf16(x),
        SliceMut::F16(x) => Slice::F16(x),
        SliceMut::U32(x) => Slice::U32(x),
    }
}

/// Outputs that can be cut before a row.
pub trait Split: Send + Sized {
    /// The first `rows` rows, and the others.
    fn split(self, rows: usize) -> (Self, Self);
}

/// An output of `width` elements a row.
pub struct Out<'a> {
    /// All elements, row after row.
    pub data: SliceMut<'a>,
    /// Elements of a row.
    pub width: usize,
}

impl Split for Out<'_> {
    fn split(self, rows: usize) -> (Self, Self) {
        let width = self.width;
        let (a, b) = split_at(self.data, rows * width);
        (Out { data: a, width }, Out { data: b, width })
    }
}

impl Split for &mut [f32] {
    fn split(self, rows: usize) -> (Self, Self) {
        self.split_at_mut(rows)
    }
}

impl<T: Split> Split for Option<T> {
    fn split(self, rows: usize) -> (Self, Self) {
        match self.map(|x| x.split(rows)) {
            Some((a, b)) => (Some(a), Some(b)),
            None => (None, None),
        }
    }
}

impl<A: Split, B: Split> Split for (A, B) {
    fn split(self, rows: usize) -> (Self, Self) {
        let (a, x) = self.0.split(rows);
        let (b, y) = self.1.split(rows);
        ((a, b), (x, y))
    }
}

impl<A: Split, B: Split, C: Split> Split for (A, B, C) {
    fn split(self, rows: usize) -> (Self, Self) {
        let (a, x) = self.0.split(rows);
        let (b, y) = self.1.split(rows);
        let (c, z) = self.2.split(rows);
        ((a, b, c), (x, y, z))
    }
}

impl<T: Split, const N: usize> Split for [T; N] {
    fn split(self, rows: usize) -> (Self, Self) {
        let mut pairs = self.map(|x| {
            let (a, b) = x.split(rows);
            (Some(a), Some(b))
        });
        let first = std::array::from_fn(|i| pairs[i].0.take().expect("taken once"));
        let second = std::array::from_fn(|i| pairs[i].1.take().expect("taken once"));
        (first, second)
    }
}

/// Calls `f` on runs of rows that cover `0..rows`, each with its part of `out`; on several threads when
/// `rows * width` elements are worth it.
pub fn for_rows<O: Split>(rows: usize, width: usize, out: O, f: impl Fn(Range<usize>, O) + Sync) {
    if rows * width <= SMALL || rayon::current_num_threads() == 1 {
        return f(0..rows, out);
    }
    in_runs(rows, (CHUNK / width.max(1)).max(1), out, &f);
}

/// Calls `f` in parallel on runs of `grain` of `n` rows, the last one shorter, each with its part of `out`.
///
/// Outputs are cut before the threads meet them: rayon's code would else be compiled for every kind of output.
fn in_runs<O: Split>(n: usize, grain: usize, out: O, f: &(dyn Fn(Range<usize>, O) + Sync)) {
    let mut parts = Vec::with_capacity(n.div_ceil(grain));
    let (mut first, mut rest) = (0, out);
    while n - first > grain {
        let (part, others) = rest.split(grain);
        parts.push(Mutex::new(Some((first..first + grain, part))));
        (first, rest) = (first + grain, others);
    }
    parts.push(Mutex::new(Some((first..n, rest))));
    for_each(0..parts.len(), &|i| {
        let mut part = parts[i].lock().unwrap_or_else(PoisonError::into_inner);
        let (range, out) = part.take().expect("each part is asked for once");
        drop(part);
        f(range, out);
    });
}

/// Calls `f` with every number of `range`, in parallel on the current rayon pool.
pub fn for_each(range: Range<usize>, f: &(dyn Fn(usize) + Sync)) {
    if range.len() <= 1 {
        range.for_each(f);
        return;
    }
    let middle = range.start + range.len() / 2;
    rayon::join(
        || for_each(range.start..middle, f),
        || for_each(middle..range.end, f),
    );
}

/// The width of a block of columns that gives every thread one, a multiple of 64, between 64 and 2048.
///
/// It may follow the number of threads: a column is one chain over the rows whatever block it is in.
pub fn column_block(rows: usize, columns: usize) -> usize {
    let threads = if rows * columns <= SMALL {
        1
    } else {
        rayon::current_num_threads()
    };
    columns
        .div_ceil(threads)
        .next_multiple_of(64)
        .clamp(64, 2048)
}

/// Calls `f` on blocks of at most `block` columns with their part of `out` (one element a column), in parallel.
pub fn for_columns<O: Split>(
    columns: usize,
    block: usize,
    out: O,
    f: impl Fn(Range<usize>, O) + Sync,
) {
    if columns <= block {
        return f(0..columns, out);
    }
    in_runs(columns, block, out, &f);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn runs_of_rows_cover_every_row_once() {
        for (rows, width) in [(0, 7), (1, 100_000), (33, 1), (1009, 61), (70_001, 1)] {
            let mut y = vec![0f32; rows * width];
            let mut index = vec![f32::NAN; rows];
            let calls = AtomicUsize::new(0);
            let out = Out {
                data: SliceMut::F32(&mut y),
                width,
            };
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(2)
                .build()
                .unwrap();
            pool.install(|| {
                for_rows(rows, width, (out, &mut index[..]), |range, (y, index)| {
                    calls.fetch_add(1, Ordering::Relaxed);
                    assert_eq!(index.len(), range.len());
                    y.data.typed::<f32>().iter_mut().for_each(|y| *y += 1.0);
                    for (i, r) in index.iter_mut().zip(range) {
                        *i = r as f32;
                    }
                });
            });
            assert!(y.iter().all(|&y| y == 1.0));
            assert!(index.iter().enumerate().all(|(r, &i)| i == r as f32));
            assert_eq!(calls.into_inner() > 1, rows > 1 && rows * width > SMALL);
        }
    }
}
