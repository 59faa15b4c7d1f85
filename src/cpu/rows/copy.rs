//! Strided copies: transpose, slice, concatenate, and the packing of what a collective sends.
//!
//! Axes are put in the order of the target's strides and merged where both sides allow it, so that the target is written
//! in ascending order. What remains is either contiguous runs, or a transpose, copied in squares so that every cache line
//! of both sides is used whole while it is in cache.

use super::parallel::SMALL;
use crate::dtype::{Slice, SliceMut};
use bytemuck::Pod;

/// An axis: elements, stride in the source, stride in the target.
type Axis = (usize, usize, usize);

/// Side of a square of a transpose.
const SQUARE: usize = 32;

/// y[sum i_a y_strides[a]] = x[sum i_a x_strides[a]] for all indices i below `shape`. Strides count elements.
///
/// Panics unless x and y have one element type, all indices lie inside, and no two indices share a target.
pub(crate) fn copy_strided(
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
    match (x, y) {
        (Slice::F32(x), SliceMut::F32(y)) => walk(x, y, &axes),
        (Slice::Bf16(x), SliceMut::Bf16(y)) => walk(x, y, &axes),
        (Slice::F16(x), SliceMut::F16(y)) => walk(x, y, &axes),
        (Slice::U32(x), SliceMut::U32(y)) => walk(x, y, &axes),
        _ => unreachable!("the element types are equal"),
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
fn walk<T: Pod + Send + Sync>(x: &[T], y: &mut [T], axes: &[Axis]) {
    let elements: usize = axes.iter().map(|a| a.0).product();
    if elements > SMALL && axes[0].0 > 1 && rayon::current_num_threads() > 1 {
        let (n, sx, sy) = axes[0];
        let half = n / 2;
        let (a, b) = y.split_at_mut(half * sy);
        let part = |n: usize| -> Vec<Axis> {
            std::iter::once((n, sx, sy))
                .chain(axes[1..].iter().copied())
                .collect()
        };
        rayon::join(
            || walk(x, a, &part(half)),
            || walk(&x[half * sx..], b, &part(n - half)),
        );
    } else {
        visit(x, y, axes);
    }
}

fn visit<T: Pod>(x: &[T], y: &mut [T], axes: &[Axis]) {
    match *axes {
        [] => y[0] = x[0],
        [(n, 1, 1)] => y[..n].copy_from_slice(&x[..n]),
        [(n, sx, sy)] => {
            for i in 0..n {
                y[i * sy] = x[i * sx];
            }
        }
        [rows, columns] if rows.1 < columns.1 => squares(x, y, rows, columns),
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
            visit_outer(x, y, &order);
        }
        _ => visit_outer(x, y, axes),
    }
}

fn visit_outer<T: Pod>(x: &[T], y: &mut [T], axes: &[Axis]) {
    let (n, sx, sy) = axes[0];
    for i in 0..n {
        visit(&x[i * sx..], &mut y[i * sy..], &axes[1..]);
    }
}

fn squares<T: Pod>(x: &[T], y: &mut [T], rows: Axis, columns: Axis) {
    for i0 in (0..rows.0).step_by(SQUARE) {
        for j0 in (0..columns.0).step_by(SQUARE) {
            for i in i0..(i0 + SQUARE).min(rows.0) {
                for j in j0..(j0 + SQUARE).min(columns.0) {
                    y[i * rows.2 + j * columns.2] = x[i * rows.1 + j * columns.1];
                }
            }
        }
    }
}
