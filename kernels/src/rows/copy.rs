//! Strided copies: transpose, slice, concatenate, and the packing of what a collective sends.
//!
//! Axes are put in the order of the target's strides and merged where both sides allow it, so that the target is written
//! in ascending order. What remains is either contiguous runs, or a transpose, copied in squares so that every cache line
//! of both sides is used whole while it is in cache. A large transpose of f32 writes whole lines past the caches: lines a power of
//! two apart share so few sets that a Zen 5 (second cache of 1 MiB) took 2.4 times a stream of the same bytes through them, in
//! blocks of 64 (2.1 in blocks of 16, 5.4 in blocks of 32); past them it takes 1.1, and two threads 1.0 instead of 1.3.

use super::parallel::SMALL;
use crate::dtype::{Slice, SliceMut};
use crate::simd::{Isa, Kernel, Past, Simd, dispatch, isa, past_caches};
use bytemuck::{Pod, cast_slice, cast_slice_mut};

/// An axis: elements, stride in the source, stride in the target.
type Axis = (usize, usize, usize);

/// Elements from which on a transpose of f32 is written past the caches: no second cache holds both sides, and whoever reads the
/// result begins where a cache has forgotten it.
const LARGE: usize = 4 << 20;

/// How a copy is made.
#[derive(Clone, Copy)]
struct How {
    isa: Isa,
    /// Whether the whole of it has [`LARGE`] elements.
    large: bool,
}

/// `y[sum i_a y_strides[a]] = x[sum i_a x_strides[a]]` for all indices i below `shape`. Strides count elements.
///
/// Panics unless x and y have one element type, all indices lie inside, and no two indices share a target.
pub fn copy_strided(
    x: Slice,
    x_strides: &[usize],
    y: SliceMut,
    y_strides: &[usize],
    shape: &[usize],
) {
    assert!(
        [x_strides.len(), y_strides.len()] == [shape.len(); 2],
        "one stride an axis"
    );
    assert_eq!(x.dtype(), y.dtype(), "a copy does not convert");
    if shape.contains(&0) {
        return;
    }
    let axes = merge(x_strides, y_strides, shape);
    for (len, stride) in [
        (x.len(), axes.iter().map(|a| (a.0 - 1) * a.1).sum::<usize>()),
        (y.len(), axes.iter().map(|a| (a.0 - 1) * a.2).sum::<usize>()),
    ] {
        assert!(stride < len, "the copy reaches element {stride} of {len}");
    }
    let how = How {
        isa: isa(),
        large: axes.iter().map(|a| a.0).product::<usize>() >= LARGE,
    };
    match (x, y) {
        (Slice::F32(x), SliceMut::F32(y)) => walk(how, x, y, &axes),
        (Slice::Bf16(x), SliceMut::Bf16(y)) => walk(how, bits(x), bits_mut(y), &axes),
        (Slice::F16(x), SliceMut::F16(y)) => walk(how, bits(x), bits_mut(y), &axes),
        // Vectors of f32 are only moved: any bits survive.
        (Slice::U32(x), SliceMut::U32(y)) => {
            walk::<f32>(how, cast_slice(x), cast_slice_mut(y), &axes)
        }
        _ => unreachable!("the element types are equal"),
    }
}

fn bits<T: Pod>(x: &[T]) -> &[u16] {
    cast_slice(x)
}

fn bits_mut<T: Pod>(x: &mut [T]) -> &mut [u16] {
    cast_slice_mut(x)
}

/// An element of 4 or 2 bytes.
trait Element: Pod + Send + Sync {
    /// Whether a tile's lines are whole cache lines.
    const WHOLE_LINES: bool;

    /// Transposes the tile at (i, j) of `squares`, past the caches with `past` and [`Element::WHOLE_LINES`]. Write it with
    /// `#[inline(always)]`.
    fn tile<S: Simd>(s: S, squares: &mut Squares<Self>, i: usize, j: usize, past: Option<&Past<S>>);
}

/// Rows and columns of a tile of a transpose: a cache line of f32 each way, so that every line is read and written whole,
/// once.
const TILE: usize = 16;

/// Rows and columns of a block of tiles, for the whole of which memory is asked while the block before is transposed. Lines
/// of one tile alone would be fetched in pairs, of which the other half is gone from a cache whose sets a power of two as
/// stride exhausts when its turn comes: on a Xeon with 2 MiB of second cache 4096 x 4096 took 2.7 times a stream of the same
/// bytes tile by tile, 1.9 in blocks of 32, 1.2 in blocks of 64 (1.3 with blocks walked along the target's rows).
const BLOCK: usize = 4 * TILE;

/// A transpose: y[i ys + j] = x[j xs + i] for i < rows, j < columns, both multiples of `TILE`.
struct Squares<'a, T> {
    x: &'a [T],
    xs: usize,
    y: &'a mut [T],
    ys: usize,
    rows: usize,
    columns: usize,
    /// Whether the result is written past the caches.
    past: bool,
}

/// Elements ahead along x's rows that a transpose past the caches asks for.
const COLUMNS_AHEAD: usize = 64;

impl<T: Element> Kernel for Squares<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(mut self, s: S) {
        if self.past {
            past_caches(
                s,
                #[inline(always)]
                |past| self.walk_past(s, past),
            );
            return;
        }
        for j in (0..self.columns).step_by(BLOCK) {
            for i in (0..self.rows).step_by(BLOCK) {
                self.ask(s, i + BLOCK, j);
                for j in (j..(j + BLOCK).min(self.columns)).step_by(TILE) {
                    for i in (i..(i + BLOCK).min(self.rows)).step_by(TILE) {
                        T::tile(s, &mut self, i, j, None);
                    }
                }
            }
        }
    }
}

impl<T: Element> Squares<'_, T> {
    /// As many rows of x as a block has, read along as streams.
    #[inline(always)]
    fn walk_past<S: Simd>(&mut self, s: S, past: &Past<S>) {
        for block in (0..self.columns).step_by(BLOCK) {
            for i in (0..self.rows).step_by(TILE) {
                for j in (block..(block + BLOCK).min(self.columns)).step_by(TILE) {
                    for row in j..j + TILE {
                        let ahead = row * self.xs + i + COLUMNS_AHEAD;
                        s.prefetch(self.x.as_ptr().wrapping_add(ahead));
                    }
                    T::tile(s, self, i, j, Some(past));
                }
            }
        }
    }

    /// Asks for the block at (i, j), which need not exist: no processor guesses where a column goes on.
    #[inline(always)]
    fn ask<S: Simd>(&self, s: S, i: usize, j: usize) {
        for at in 0..BLOCK {
            for line in (0..BLOCK).step_by(64 / size_of::<T>()) {
                s.prefetch(self.x.as_ptr().wrapping_add((j + at) * self.xs + i + line));
                s.prefetch(self.y.as_ptr().wrapping_add((i + at) * self.ys + j + line));
            }
        }
    }
}

impl Element for f32 {
    const WHOLE_LINES: bool = true;

    #[inline(always)]
    fn tile<S: Simd>(s: S, t: &mut Squares<f32>, i: usize, j: usize, past: Option<&Past<S>>) {
        let mut lines = [[0f32; TILE]; TILE];
        for down in (0..TILE).step_by(S::LANES) {
            for right in (0..TILE).step_by(S::LANES) {
                let mut square = [s.zero(); TILE];
                let square = &mut square[..S::LANES];
                for (row, v) in square.iter_mut().enumerate() {
                    *v = s.load(&t.x[(j + down + row) * t.xs + i + right..]);
                }
                s.transpose(square);
                for (row, v) in square.iter().enumerate() {
                    s.store(&mut lines[right + row][down..], *v);
                }
            }
        }
        for (row, line) in lines.iter().enumerate() {
            let to = &mut t.y[(i + row) * t.ys + j..][..TILE];
            match past {
                Some(past) => {
                    for v in (0..TILE).step_by(S::LANES) {
                        past.store(&mut to[v..], s.load(&line[v..]));
                    }
                }
                None => to.copy_from_slice(line),
            }
        }
    }
}

impl Element for u16 {
    const WHOLE_LINES: bool = false;

    #[inline(always)]
    fn tile<S: Simd>(_: S, t: &mut Squares<u16>, i: usize, j: usize, _: Option<&Past<S>>) {
        let mut tile = [[0; TILE]; TILE];
        for (row, tile) in tile.iter_mut().enumerate() {
            tile.copy_from_slice(&t.x[(j + row) * t.xs + i..][..TILE]);
        }
        for column in 0..TILE {
            let to = &mut t.y[(i + column) * t.ys + j..][..TILE];
            for (to, tile) in to.iter_mut().zip(&tile) {
                *to = tile[column];
            }
        }
    }
}

/// The axes of more than one element, outermost in the target first, neighbours merged.
fn merge(x_strides: &[usize], y_strides: &[usize], shape: &[usize]) -> Vec<Axis> {
    let mut axes: Vec<Axis> = (0..shape.len())
        .filter(|&a| shape[a] > 1)
        .map(|a| (shape[a], x_strides[a], y_strides[a]))
        .collect();
    axes.sort_by_key(|a| std::cmp::Reverse(a.2));
    let mut extent = 1;
    for &(n, _, stride) in axes.iter().rev() {
        assert!(
            stride >= extent,
            "two indices share an element of the target"
        );
        extent += (n - 1) * stride;
    }
    let mut merged: Vec<Axis> = Vec::with_capacity(axes.len());
    for (n, sx, sy) in axes {
        match merged.last_mut() {
            Some(outer) if outer.1 == n * sx && outer.2 == n * sy => {
                *outer = (outer.0 * n, sx, sy);
            }
            _ => merged.push((n, sx, sy)),
        }
    }
    merged
}

/// Copies all axes; the outermost in halves on several threads while the part is big.
fn walk<T: Element>(how: How, x: &[T], y: &mut [T], axes: &[Axis]) {
    let elements: usize = axes.iter().map(|a| a.0).product();
    let axes = match axes {
        [(1, ..), inner @ ..] if !inner.is_empty() => inner,
        _ => axes,
    };
    let grain = match axes {
        [rows, columns] if is_transpose(*rows, *columns) => BLOCK,
        _ => 1,
    };
    let n = axes.first().map_or(1, |a| a.0);
    let half = (n / 2).next_multiple_of(grain);
    if elements > SMALL && half < n && rayon::current_num_threads() > 1 {
        let (_, sx, sy) = axes[0];
        let (a, b) = y.split_at_mut(half * sy);
        let part = |n: usize| -> Vec<Axis> {
            std::iter::once((n, sx, sy))
                .chain(axes[1..].iter().copied())
                .collect()
        };
        rayon::join(
            || walk(how, x, a, &part(half)),
            || walk(how, &x[half * sx..], b, &part(n - half)),
        );
    } else {
        visit(how, x, y, axes);
    }
}

/// Whether neighbours in x are not those in y.
fn is_transpose(rows: Axis, columns: Axis) -> bool {
    rows.1 < columns.1
}

/// Rows ahead that a copy of short rows asks for.
const ROWS_AHEAD: usize = 8;

/// Copies rows of `n` elements that lie apart. Short ones end before a processor has guessed that they go on, and where the
/// next one begins it does not guess.
struct Rows<'a, T> {
    x: &'a [T],
    y: &'a mut [T],
    rows: Axis,
    n: usize,
}

impl<T: Element> Kernel for Rows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call<S: Simd>(self, s: S) {
        let (count, sx, sy) = self.rows;
        for i in 0..count {
            for line in (0..self.n).step_by(64 / size_of::<T>()) {
                s.prefetch(self.x.as_ptr().wrapping_add((i + ROWS_AHEAD) * sx + line));
                s.prefetch(self.y.as_ptr().wrapping_add((i + ROWS_AHEAD) * sy + line));
            }
            self.y[i * sy..][..self.n].copy_from_slice(&self.x[i * sx..][..self.n]);
        }
    }
}

fn visit<T: Element>(how: How, x: &[T], y: &mut [T], axes: &[Axis]) {
    match *axes {
        [] => y[0] = x[0],
        [(n, 1, 1)] => y[..n].copy_from_slice(&x[..n]),
        [(n, sx, sy)] => {
            for i in 0..n {
                y[i * sy] = x[i * sx];
            }
        }
        [rows, (n, 1, 1)] if n * size_of::<T>() <= 4096 => {
            dispatch(how.isa, Rows { x, y, rows, n });
        }
        [rows, columns] if is_transpose(rows, columns) => squares(how, x, y, rows, columns),
        // A transpose's two axes need not be neighbours: bring the source's innermost one next to the target's.
        [.., columns]
            if axes.len() > 2
                && columns.1 != 1
                && axes[..axes.len() - 2].iter().any(|a| a.1 == 1) =>
        {
            let at = axes.iter().position(|a| a.1 == 1).expect("just seen");
            let mut order = axes.to_vec();
            let inner = order.remove(at);
            order.insert(axes.len() - 2, inner);
            visit_outer(how, x, y, &order);
        }
        _ => visit_outer(how, x, y, axes),
    }
}

fn visit_outer<T: Element>(how: How, x: &[T], y: &mut [T], axes: &[Axis]) {
    let (n, sx, sy) = axes[0];
    for i in 0..n {
        visit(how, &x[i * sx..], &mut y[i * sy..], &axes[1..]);
    }
}

/// A transpose: `rows` are neighbours in x, `columns` in y; whole tiles first, then what they leave at both edges.
fn squares<T: Element>(how: How, x: &[T], y: &mut [T], rows: Axis, columns: Axis) {
    let whole = if rows.1 == 1 && columns.2 == 1 {
        (rows.0 / TILE * TILE, columns.0 / TILE * TILE)
    } else {
        (0, 0)
    };
    if whole.0 * whole.1 > 0 {
        let lines = y.as_ptr().addr().is_multiple_of(64) && rows.2.is_multiple_of(TILE);
        let squares = Squares {
            x,
            xs: columns.1,
            y: &mut *y,
            ys: rows.2,
            rows: whole.0,
            columns: whole.1,
            past: T::WHOLE_LINES && how.large && lines,
        };
        dispatch(how.isa, squares);
    }
    for i in 0..rows.0 {
        let from = if i < whole.0 { whole.1 } else { 0 };
        for j in from..columns.0 {
            y[i * rows.2 + j * columns.2] = x[i * rows.1 + j * columns.1];
        }
    }
}
