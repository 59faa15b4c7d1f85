//! One loop for all functions of single elements, whatever their element types: blocks of a kilobyte or two are widened
//! into the first cache, computed on in f32, and narrowed. f32 is used where it lies, and bf16 where all are bf16.

use super::lanes::{empty, narrow_into, transform, widen, widen_into};
use super::parallel::{Out, for_rows, part, part_mut, shared};
use crate::dtype::{Float, Slice, SliceMut};
use crate::simd::{Isa, Kernel, Simd, dispatch, isa};
use half::bf16;

const BLOCK: usize = 512;

/// A function of N inputs, and of M outputs' old values if it is in place, to M outputs.
pub(crate) trait Pointwise<const N: usize, const M: usize>: Copy + Sync {
    /// Whether `y` is read. Otherwise `at` gets zeros for it.
    const IN_PLACE: bool = false;
    /// The new outputs. Write it with `#[inline(always)]`.
    fn at<S: Simd>(self, s: S, x: [S::V; N], y: [S::V; M]) -> [S::V; M];
}

/// y = f(x, y) on every element, in parallel when there are many. Panics unless all lengths are equal.
pub(crate) fn pointwise<F: Pointwise<N, M>, const N: usize, const M: usize>(
    f: F,
    x: [Slice; N],
    y: [SliceMut; M],
) {
    let n = y[0].len();
    for len in x.iter().map(Slice::len).chain(y.iter().map(SliceMut::len)) {
        assert_eq!(len, n, "element counts differ");
    }
    let isa: Isa = isa();
    let out = y.map(|data| Out { data, width: 1 });
    for_rows(n, 1, out, |range, y| {
        let x = x.map(|x| part(x, range.clone()));
        let y = y.map(|y| y.data);
        dispatch(isa, (f, x, y));
    });
}

/// The function comes first: its module is the tuple's to the compiler, which puts the code there.
impl<F: Pointwise<N, M>, const N: usize, const M: usize> Kernel
    for (F, [Slice<'_>; N], [SliceMut<'_>; M])
{
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let (f, from, mut to) = self;
        if let Some((x, y)) = all_bf16(from, &mut to) {
            return straight(s, f, x, y);
        }
        let n = to[0].len();
        let mut read = [[0f32; BLOCK]; N];
        let mut write = [[0f32; BLOCK]; M];
        // Loops with `while`, not iterators or closures: these would be compiled apart from the instruction set, and
        // are most of the code of a body that exists a hundred times.
        let mut start = 0;
        while start < n {
            let end = n.min(start + BLOCK);
            let len = end - start;
            let mut x: [&[f32]; N] = [&[]; N];
            let mut y = empty();
            let [mut inputs, mut outputs] = [&mut read[..], &mut write[..]];
            let mut i = 0;
            while i < N {
                let near;
                (near, inputs) = inputs.split_first_mut().expect("one for each input");
                x[i] = widen(s, from[i], start..end, near);
                i += 1;
            }
            let mut rest = &mut to[..];
            i = 0;
            while i < M {
                let (near, out);
                (near, outputs) = outputs.split_first_mut().expect("one for each output");
                (out, rest) = rest.split_first_mut().expect("M outputs");
                if let SliceMut::F32(out) = out {
                    y[i] = &mut out[start..end];
                } else {
                    y[i] = &mut near[..len];
                    if F::IN_PLACE {
                        widen_into(s, part(shared(out), start..end), y[i]);
                    }
                }
                i += 1;
            }
            straight(s, f, x, y);
            i = 0;
            while i < M {
                if !matches!(to[i], SliceMut::F32(_)) {
                    narrow_into(s, &write[i][..len], part_mut(&mut to[i], start..end));
                }
                i += 1;
            }
            start = end;
        }
    }
}

/// The slices, if all are bf16: these are widened and narrowed in registers.
#[inline(always)]
#[allow(clippy::type_complexity)]
fn all_bf16<'a, const N: usize, const M: usize>(
    x: [Slice<'a>; N],
    y: &'a mut [SliceMut; M],
) -> Option<([&'a [bf16]; N], [&'a mut [bf16]; M])> {
    let mut inputs = [&[][..]; N];
    let mut i = 0;
    while i < N {
        let Slice::Bf16(x) = x[i] else { return None };
        inputs[i] = x;
        i += 1;
    }
    let mut outputs = empty();
    let mut rest = &mut y[..];
    i = 0;
    while i < M {
        let first;
        (first, rest) = rest.split_first_mut()?;
        let SliceMut::Bf16(y) = first else {
            return None;
        };
        outputs[i] = y;
        i += 1;
    }
    Some((inputs, outputs))
}

/// All elements, without a stop in memory.
#[inline(always)]
fn straight<S: Simd, T: Float, F: Pointwise<N, M>, const N: usize, const M: usize>(
    s: S,
    f: F,
    x: [&[T]; N],
    y: [&mut [T]; M],
) {
    // Two calls, since a constant of a trait cannot be an argument.
    if F::IN_PLACE {
        transform::<S, T, true, N, M>(
            s,
            x,
            y,
            #[inline(always)]
            |x, y| f.at(s, x, y),
        );
    } else {
        transform::<S, T, false, N, M>(
            s,
            x,
            y,
            #[inline(always)]
            |x, y| f.at(s, x, y),
        );
    }
}
