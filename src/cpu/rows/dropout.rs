//! Dropout (Srivastava et al. 2014): an element is kept or dropped by its index in the global tensor, so the mask is the
//! same on every mesh, and its gradient draws the same mask again instead of storing it.

use super::lanes::{widen, written};
use super::parallel::{Out, for_rows};
use crate::cpu::simd::{Kernel, Simd, dispatch, isa};
use crate::dtype::{Slice, SliceMut};
use crate::random::{COUNTERS, Stream};
use std::ops::Range;

const BLOCK: usize = 512;

/// y = x / (1 - p) where the element's random number is at least p, else 0. Applied to dy, it gives dx.
///
/// Local elements r run..(r + 1) run have the global indices start(r), start(r) + 1, ... Panics unless 0 <= p <= 1, the
/// lengths of x and y are equal, and `run` divides them.
pub(crate) fn dropout(
    x: Slice,
    y: SliceMut,
    p: f32,
    stream: Stream,
    run: usize,
    start: impl Fn(usize) -> u64 + Sync,
) {
    assert!((0.0..=1.0).contains(&p), "{p} is no probability");
    assert_eq!(x.len(), y.len(), "x and y differ in length");
    if x.is_empty() {
        return;
    }
    assert!(
        run > 0 && x.len().is_multiple_of(run),
        "{} elements are not whole runs of {run}",
        x.len()
    );
    let isa = isa();
    let factor = if p < 1.0 { 1.0 / (1.0 - p) } else { 0.0 };
    let start = &start;
    for_rows(x.len(), 1, Out { data: y, width: 1 }, |range, y| {
        dispatch(
            isa,
            Drop {
                x,
                range,
                y: y.data,
                p,
                factor,
                stream,
                run,
                start,
            },
        );
    });
}

struct Drop<'a, F> {
    x: Slice<'a>,
    range: Range<usize>,
    y: SliceMut<'a>,
    p: f32,
    factor: f32,
    stream: Stream,
    run: usize,
    start: &'a F,
}

impl<F: Fn(usize) -> u64> Kernel for Drop<'_, F> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(mut self, s: S) {
        let mut wide = [0f32; BLOCK];
        let mut narrow = [0f32; BLOCK];
        let mut at = self.range.start;
        while at < self.range.end {
            // A block ends with its run, so that its global indices are consecutive.
            let r = at / self.run;
            let end = ((r + 1) * self.run).min(at + BLOCK).min(self.range.end);
            let first = (self.start)(r) + (at - r * self.run) as u64;
            let x = widen(s, self.x, at..end, &mut wide);
            let local = at - self.range.start..end - self.range.start;
            written(
                s,
                &mut self.y,
                local,
                &mut narrow,
                #[inline(always)]
                |y| {
                    mask(x, y, self.p, self.factor, &self.stream, first);
                },
            );
            at = end;
        }
    }
}

/// y = x factor where kept. One counter gives four words, and `first` may lie inside its four.
///
/// Words first, comparisons after: two plain loops that the compiler can make vectors of.
#[inline(always)]
fn mask(x: &[f32], y: &mut [f32], p: f32, factor: f32, stream: &Stream, first: u64) {
    let mut words = [[0u32; 4]; BLOCK / 4 + COUNTERS];
    let skip = (first % 4) as usize;
    let counters = (skip + x.len()).div_ceil(4);
    let used = &mut words[..counters.next_multiple_of(COUNTERS)];
    for (c, words) in used.chunks_exact_mut(COUNTERS).enumerate() {
        words.copy_from_slice(&stream.words_of_many(first / 4 + (c * COUNTERS) as u64));
    }
    let words = &words.as_flattened()[skip..];
    for ((x, y), word) in x.iter().zip(y).zip(words) {
        let uniform = (word >> 8) as f32 * (1.0 / (1 << 24) as f32);
        *y = if uniform >= p { x * factor } else { 0.0 };
    }
}
