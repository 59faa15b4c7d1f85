//! Dropout (Srivastava et al. 2014): an element is kept or dropped by its index in the global tensor, so the mask is the
//! same on every mesh, and its gradient draws the same mask again instead of storing it.
//!
//! Random words are most of the work. On one thread of a Xeon with AVX-512 it took 1.5 times a stream of the same bytes; 3.2 times
//! when words lay in 32 bits, which have to change lanes in every round, and were held against p as f32. On a Zen 5 that was 2.9
//! with 16 counters at a time, whose rounds are two chains that wait for themselves, and counters put together anew each time;
//! with 32, kept and in whole lines of the cache, 1.3 to 2.0.

use super::lanes::{ahead, widen, written};
use super::parallel::{Out, for_rows};
use crate::dtype::{Slice, SliceMut};
use crate::random::{COUNTERS, Counters, Many, Stream};
use crate::simd::{Kernel, Simd, dispatch, isa};
use std::ops::Range;

const BLOCK: usize = 512;

/// y = x / (1 - p) where the element's random number is at least p, else 0. Applied to dy, it gives dx.
///
/// Local elements r run..(r + 1) run have the global indices start(r), start(r) + 1, ... Panics unless 0 <= p <= 1, the
/// lengths of x and y are equal, and `run` divides them.
pub fn dropout(
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
    let (kept, many, start) = (Kept::new(p), &stream.many(), &start);
    for_rows(x.len(), 1, Out { data: y, width: 1 }, |range, y| {
        dispatch(
            isa,
            Drop {
                x,
                range,
                y: y.data,
                kept,
                many,
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
    kept: Option<Kept>,
    many: &'a Many,
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
                |y| match self.kept {
                    Some(kept) => mask(s, x, y, kept, self.many, first),
                    None => y.fill(0.0),
                },
            );
            at = end;
        }
    }
}

/// Elements for which the counters of one [`Many::next`] serve.
const WORDS: usize = 4 * COUNTERS;

/// y = x factor where kept. One counter gives four words, and `first` may lie inside its four.
#[inline(always)]
fn mask<S: Simd>(s: S, x: &[f32], y: &mut [f32], kept: Kept, many: &Many, first: u64) {
    let skip = (first % 4) as usize;
    let end = skip + x.len();
    let mut counters = Counters::from(first / 4);
    for at in (0..end).step_by(WORDS) {
        let words = many.next(&mut counters);
        let words = words.flat();
        // Words at.. belong to elements at - skip.., as far as there are such.
        let from = at.max(skip);
        let to = (at + WORDS).min(end);
        let (x, y) = (&x[from - skip..to - skip], &mut y[from - skip..to - skip]);
        ahead::<S, WORDS, _>(s, x.as_ptr());
        ahead::<S, WORDS, _>(s, y.as_ptr());
        let words = &words[from - at..to - at];
        match (x.try_into(), (&mut *y).try_into(), words.try_into()) {
            (Ok(x), Ok(y), Ok(words)) => kept.group(x, y, words),
            _ => kept.select(x, y, words),
        }
    }
}

/// Which elements are kept, and what for.
#[derive(Clone, Copy)]
struct Kept {
    /// The least word of an element that is.
    least: u32,
    factor: f32,
}

impl Kept {
    /// None if all are dropped.
    fn new(p: f32) -> Option<Self> {
        // A uniform number is the upper 24 bits of a word over 2^24.
        let least = (p * (1 << 24) as f32).ceil() as u32;
        (least < 1 << 24).then(|| Kept {
            least: least << 8,
            factor: 1.0 / (1.0 - p),
        })
    }

    /// [`Kept::select`] of a whole group, without an end to look for.
    #[inline(always)]
    fn group(self, x: &[f32; WORDS], y: &mut [f32; WORDS], words: &[u32; WORDS]) {
        self.select(x, y, words);
    }

    #[inline(always)]
    fn select(self, x: &[f32], y: &mut [f32], words: &[u32]) {
        for ((x, y), word) in x.iter().zip(y).zip(words) {
            *y = if *word >= self.least {
                x * self.factor
            } else {
                0.0
            };
        }
    }
}
