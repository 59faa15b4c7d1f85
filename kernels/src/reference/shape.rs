//! Ops that move elements: embedding, permute, slice, concatenate; and the sum.

use std::ops::Range;

/// `y[i] = table[ids[i] - first]` where that row exists, else 0: table `[v, c]` holds the vocabulary's rows from `first` on,
/// y `[n, c]` for n ids. One shard of a vocabulary-parallel embedding; with `first = 0` and every row, a whole one.
pub fn embedding([v, c]: [usize; 2], table: &[f64], ids: &[u32], first: usize) -> Vec<f64> {
    assert_eq!(table.len(), v * c, "embedding: table is [{v}, {c}]");
    let mut y = vec![0.0; ids.len() * c];
    for (i, row) in held(v, ids, first) {
        y[i * c..][..c].copy_from_slice(&table[row * c..][..c]);
    }
    y
}

/// `dtable` `[v, c]` of [`embedding`]: the sum of the `dy` of every place where the row was used.
pub fn embedding_backward([v, c]: [usize; 2], ids: &[u32], first: usize, dy: &[f64]) -> Vec<f64> {
    assert_eq!(
        dy.len(),
        ids.len() * c,
        "embedding_backward: dy is [ids, {c}]"
    );
    let mut dtable = vec![0.0; v * c];
    for (i, row) in held(v, ids, first) {
        for j in 0..c {
            // y[i,j] = table[row,j]
            dtable[row * c + j] += dy[i * c + j];
        }
    }
    dtable
}

/// (place, row of the table) of the ids that a table of `v` rows from `first` on holds.
fn held(v: usize, ids: &[u32], first: usize) -> impl Iterator<Item = (usize, usize)> {
    let places = ids.iter().enumerate();
    places.filter_map(move |(i, &id)| {
        let row = (id as usize).checked_sub(first)?;
        (row < v).then_some((i, row))
    })
}

/// `y`, whose axis i is axis `axes[i]` of x. `permute(&[r, c], &[1, 0], x)` is the transpose.
pub fn permute(shape: &[usize], axes: &[usize], x: &[f64]) -> Vec<f64> {
    let size: usize = shape.iter().product();
    assert_eq!(x.len(), size, "permute: x is {shape:?}");
    let mut sorted = axes.to_vec();
    sorted.sort_unstable();
    assert!(
        sorted.into_iter().eq(0..shape.len()),
        "permute: {axes:?} of {shape:?}"
    );
    let strides: Vec<usize> = (0..shape.len())
        .map(|axis| shape[axis + 1..].iter().product())
        .collect();
    let source = |mut i: usize| {
        let mut place = 0;
        for &axis in axes.iter().rev() {
            place += i % shape[axis] * strides[axis];
            i /= shape[axis];
        }
        place
    };
    (0..size).map(|i| x[source(i)]).collect()
}

/// `dx` of [`permute`]; `shape` is still x's.
pub fn permute_backward(shape: &[usize], axes: &[usize], dy: &[f64]) -> Vec<f64> {
    let permuted: Vec<usize> = axes.iter().map(|&axis| shape[axis]).collect();
    let mut inverse = vec![0; axes.len()];
    for (i, &axis) in axes.iter().enumerate() {
        inverse[axis] = i;
    }
    permute(&permuted, &inverse, dy)
}

/// The part of x whose index on `axis` lies in `range`.
pub fn slice(shape: &[usize], axis: usize, range: Range<usize>, x: &[f64]) -> Vec<f64> {
    let [outer, n, inner] = around(shape, axis);
    assert_eq!(x.len(), outer * n * inner, "slice: x is {shape:?}");
    assert!(range.end <= n, "slice: {range:?} of {n}");
    (0..outer)
        .flat_map(|o| &x[(o * n + range.start) * inner..(o * n + range.end) * inner])
        .copied()
        .collect()
}

/// `dx` of [`slice()`]: `dy` at its place, zeros around it; `shape` is still x's.
pub fn slice_backward(shape: &[usize], axis: usize, range: Range<usize>, dy: &[f64]) -> Vec<f64> {
    let [outer, n, inner] = around(shape, axis);
    let mut dx = vec![0.0; outer * n * inner];
    let width = range.len() * inner;
    assert_eq!(
        dy.len(),
        outer * width,
        "slice_backward: dy is {range:?} of {shape:?}"
    );
    for o in 0..outer {
        // y = x[range]
        dx[(o * n + range.start) * inner..][..width].copy_from_slice(&dy[o * width..][..width]);
    }
    dx
}

/// The parts one after another on `axis`; each is (shape, elements), and the other axes are equal.
pub fn concatenate(axis: usize, parts: &[(&[usize], &[f64])]) -> Vec<f64> {
    let Some((first, _)) = parts.first() else {
        return Vec::new();
    };
    let [outer, _, inner] = around(first, axis);
    let mut y = Vec::new();
    for o in 0..outer {
        for &(shape, x) in parts {
            let [o_, n, i_] = around(shape, axis);
            assert_eq!(
                [o_, i_],
                [outer, inner],
                "concatenate: {first:?} and {shape:?}"
            );
            assert_eq!(
                x.len(),
                outer * n * inner,
                "concatenate: a part is {shape:?}"
            );
            y.extend_from_slice(&x[o * n * inner..][..n * inner]);
        }
    }
    y
}

/// The derivatives by each part of [`concatenate`], from the parts' shapes.
pub fn concatenate_backward(axis: usize, shapes: &[&[usize]], dy: &[f64]) -> Vec<Vec<f64>> {
    let total = shapes.iter().map(|s| s[axis]).sum();
    let mut start = 0;
    let part = |s: &&[usize]| {
        let mut whole = s.to_vec();
        whole[axis] = total;
        start += s[axis];
        slice(&whole, axis, start - s[axis]..start, dy)
    };
    shapes.iter().map(part).collect()
}

/// `shape` as `[outer, n, inner]` with n = `shape[axis]`.
fn around(shape: &[usize], axis: usize) -> [usize; 3] {
    [
        shape[..axis].iter().product(),
        shape[axis],
        shape[axis + 1..].iter().product(),
    ]
}

/// `y = sum of x`.
pub fn sum(x: &[f64]) -> f64 {
    x.iter().sum()
}

/// `dx` of [`sum`] for n elements: `dy` everywhere.
pub fn sum_backward(n: usize, dy: f64) -> Vec<f64> {
    vec![dy; n]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::{assert_gradient, normals};

    #[test]
    fn embedding_follows_its_gradient() {
        let ids = [3, 0, 3, 4, 1];
        for (rows, first) in [(5, 0), (2, 3)] {
            assert_gradient(
                "embedding",
                &[normals("table", rows * 3)],
                |x| embedding([rows, 3], &x[0], &ids, first),
                |_, dy| vec![embedding_backward([rows, 3], &ids, first, dy)],
            );
        }
        assert_eq!(
            embedding([1, 2], &[7., 8.], &[4, 3, 5], 4),
            [7., 8., 0., 0., 0., 0.]
        );
    }

    #[test]
    fn moves_by_hand() {
        let x = [1., 2., 3., 4., 5., 6.];
        assert_eq!(permute(&[2, 3], &[1, 0], &x), [1., 4., 2., 5., 3., 6.]);
        assert_eq!(
            permute(&[1, 2, 3], &[2, 0, 1], &x),
            [1., 4., 2., 5., 3., 6.]
        );
        assert_eq!(slice(&[2, 3], 1, 1..3, &x), [2., 3., 5., 6.]);
        assert_eq!(slice(&[2, 3], 0, 1..2, &x), [4., 5., 6.]);
        let joined = concatenate(1, &[(&[2, 1], &[0., 9.]), (&[2, 3], &x)]);
        assert_eq!(joined, [0., 1., 2., 3., 9., 4., 5., 6.]);
    }

    #[test]
    fn moves_follow_their_gradients() {
        let (shape, axes) = ([2, 3, 4], [2, 0, 1]);
        let x = [normals("x", 24), normals("z", 12)];
        assert_gradient(
            "permute",
            &x[..1],
            |x| permute(&shape, &axes, &x[0]),
            |_, dy| vec![permute_backward(&shape, &axes, dy)],
        );
        assert_gradient(
            "slice",
            &x[..1],
            |x| slice(&shape, 1, 1..3, &x[0]),
            |_, dy| vec![slice_backward(&shape, 1, 1..3, dy)],
        );
        assert_gradient(
            "concatenate",
            &x,
            |x| concatenate(2, &[(&shape, &x[0]), (&[2, 3, 2], &x[1])]),
            |_, dy| concatenate_backward(2, &[&shape, &[2, 3, 2]], dy),
        );
        assert_gradient(
            "sum",
            &x[..1],
            |x| vec![sum(&x[0])],
            |x, dy| vec![sum_backward(x[0].len(), dy[0])],
        );
    }
}
