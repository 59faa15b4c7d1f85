//! One loop for all functions of single elements, whatever their element types: blocks of a kilobyte or two are widened
//! into the first cache, computed on in f32, and narrowed. f32 is used where it lies.

use super::lanes::{narrow_into, widen, widen_into};
use super::parallel::{Out, for_rows, part, part_mut, shared};
use crate::cpu::simd::{Isa, Kernel, Simd, dispatch, isa};
use crate::dtype::{Slice, SliceMut};

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
        dispatch(isa, Blocks { f, x, y });
    });
}

struct Blocks<'a, F, const N: usize, const M: usize> {
    f: F,
    x: [Slice<'a>; N],
    y: [SliceMut<'a>; M],
}

impl<F: Pointwise<N, M>, const N: usize, const M: usize> Kernel for Blocks<'_, F, N, M> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(mut self, s: S) {
        let n = self.y[0].len();
        let mut read = [[0f32; BLOCK]; N];
        let mut write = [[0f32; BLOCK]; M];
        for start in (0..n).step_by(BLOCK) {
            let range = start..(start + BLOCK).min(n);
            let len = range.len();
            if F::IN_PLACE {
                for (y, write) in self.y.iter().zip(&mut write) {
                    if !matches!(y, SliceMut::F32(_)) {
                        widen_into(s, part(shared(y), range.clone()), &mut write[..len]);
                    }
                }
            }
            // Loops, not closures: those would be compiled apart from the instruction set.
            let mut x: [&[f32]; N] = [&[]; N];
            for ((x, from), to) in x.iter_mut().zip(self.x).zip(&mut read) {
                *x = widen(s, from, range.clone(), to);
            }
            let mut outputs = self.y.iter_mut().zip(&mut write);
            let y: [&mut [f32]; M] = std::array::from_fn(
                #[inline(always)]
                |_| match outputs.next().expect("one for each output") {
                    (SliceMut::F32(y), _) => &mut y[range.clone()],
                    (_, write) => &mut write[..len],
                },
            );
            block(s, self.f, len, x, y);
            for (y, write) in self.y.iter_mut().zip(&write) {
                if !matches!(y, SliceMut::F32(_)) {
                    narrow_into(s, &write[..len], part_mut(y, range.clone()));
                }
            }
        }
    }
}

#[inline(always)]
fn block<S: Simd, F: Pointwise<N, M>, const N: usize, const M: usize>(
    s: S,
    f: F,
    len: usize,
    x: [&[f32]; N],
    y: [&mut [f32]; M],
) {
    for at in (0..len).step_by(S::LANES) {
        let end = (at + S::LANES).min(len);
        let mut inputs = [s.zero(); N];
        for i in 0..N {
            inputs[i] = s.load_first(&x[i][at..end]);
        }
        let mut old = [s.zero(); M];
        if F::IN_PLACE {
            for i in 0..M {
                old[i] = s.load_first(&y[i][at..end]);
            }
        }
        let new = f.at(s, inputs, old);
        for i in 0..M {
            s.store_first(&mut y[i][at..end], new[i]);
        }
    }
}
