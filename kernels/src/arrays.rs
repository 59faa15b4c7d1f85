//! Kernels straight on ndarray, without chips, meshes or tapes: arrays in, arrays out.
//!
//! All take f32, bf16 or f16, compute in f32 and round once. They run on the caller's current rayon pool, and their results
//! depend neither on the number of its threads nor on the instruction set (but see [the order of sums](crate#the-order-of-sums)
//! for bf16 on a matrix unit). A view is read where it lies if its elements
//! fill a stretch of memory in any order of axes (so a transposed matrix is not copied); otherwise it is copied first,
//! because what lies between its elements may belong to somebody else.
//!
//! [`peak_flops`] and [`MemoryStream`] measure what the machine could do at best, to hold a kernel's speed against.

use crate::attention::{
    Geometry, Heads, HeadsMut, attention_backward as backward, attention_forward,
};
use crate::dtype::{Float, Slice, SliceMut};
use crate::matmul::{self as product, Epilogue, Matrix, MatrixMut};
use crate::memory::with_scratch_f32;
use crate::rows;
use crate::{Accum, Activation};
use ndarray::{
    Array, Array2, Array3, Array4, ArrayBase, CowArray, Data, Dimension, Ix1, Ix2, Ix3, Ix4,
};

/// `c[i,j] = sum over p of a[i,p] b[p,j]`: a [m, k], b [k, n], c [m, n]; one chain of fused multiply-adds over ascending p.
///
/// ```
/// use ndarray::array;
/// let a = array![[1.0f32, 2.0], [3.0, 4.0]];
/// assert_eq!(supernode_kernels::matmul(&a, &a.t()), array![[5.0, 11.0], [11.0, 25.0]]);
/// ```
///
/// # Panics
/// If a has not as many columns as b has rows.
pub fn matmul<T: Float>(
    a: &ArrayBase<impl Data<Elem = T>, Ix2>,
    b: &ArrayBase<impl Data<Elem = T>, Ix2>,
) -> Array2<T> {
    let ((m, k), (rows, n)) = (a.dim(), b.dim());
    assert_eq!(
        k,
        rows,
        "matmul: a is {:?} and b is {:?}; the columns of a are not the rows of b",
        a.shape(),
        b.shape()
    );
    let (a, b) = (in_memory(a, |_| true), in_memory(b, |_| true));
    let mut c = Array2::from_elem((m, n), T::from_f32(0.0));
    multiply(1, matrix(&a), matrix(&b), elements_mut(&mut c), [m, n]);
    c
}

/// [`matmul`] of each matrix of a with the same of b: a [b, m, k], b [b, k, n], c [b, m, n].
///
/// # Panics
/// If the numbers of matrices differ, or a's matrices have not as many columns as b's have rows.
pub fn matmul_batched<T: Float>(
    a: &ArrayBase<impl Data<Elem = T>, Ix3>,
    b: &ArrayBase<impl Data<Elem = T>, Ix3>,
) -> Array3<T> {
    let ((batch, m, k), (others, rows, n)) = (a.dim(), b.dim());
    assert!(
        batch == others && k == rows,
        "matmul_batched: a is {:?} and b is {:?}; wanted [b, m, k] and [b, k, n]",
        a.shape(),
        b.shape()
    );
    let (a, b) = (in_memory(a, |_| true), in_memory(b, |_| true));
    let mut c = Array3::from_elem((batch, m, n), T::from_f32(0.0));
    multiply(batch, matrix(&a), matrix(&b), elements_mut(&mut c), [m, n]);
    c
}

/// Which keys a query of [`attention`] sees. Query i stands at position i ([`attention_at`]: elsewhere), key j at position j.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// All.
    Full,
    /// Those up to its own position.
    Causal,
    /// Those up to its own position and less than this many positions away.
    Window(usize),
}

/// `o = softmax(q k^T / sqrt(d) where the mask allows) v` for each batch and head (Vaswani et al. 2017).
///
/// q and o: [b, h, t, d]; k and v: [b, g, s, d], where g divides h and query head i uses key head `i / (h / g)`. An array of
/// [b, t, h, d] whose axes were permuted is read in place. A query that sees nothing gives 0.
///
/// # Panics
/// If the shapes do not fit, or d is above 256.
pub fn attention<T: Float>(
    q: &ArrayBase<impl Data<Elem = T>, Ix4>,
    k: &ArrayBase<impl Data<Elem = T>, Ix4>,
    v: &ArrayBase<impl Data<Elem = T>, Ix4>,
    mask: Mask,
) -> Array4<T> {
    attention_at(q, k, v, mask, 0)
}

/// [`attention`] of queries that continue a sequence: query i stands at position `offset` + i, keys begin at position 0.
///
/// What decoding with kept keys and values needs: one query, t = 1, at the position of the last of s keys has offset s - 1.
/// Where a key head has at most 64 query rows and more than 1024 keys, the keys are cut for the threads.
///
/// # Panics
/// As [`attention`].
pub fn attention_at<T: Float>(
    q: &ArrayBase<impl Data<Elem = T>, Ix4>,
    k: &ArrayBase<impl Data<Elem = T>, Ix4>,
    v: &ArrayBase<impl Data<Elem = T>, Ix4>,
    mask: Mask,
    offset: usize,
) -> Array4<T> {
    with_scratch_f32(q.shape()[..3].iter().product(), |lse| {
        attention_into(q, k, v, mask, offset, lse)
    })
}

/// [`attention`], and the logarithm of each softmax's denominator, which [`attention_backward`] takes:
/// `lse[b,h,t]` = ln of the sum of `e^(q k / sqrt(d))` over the keys that query t sees, minus infinity if there are none.
///
/// # Panics
/// As [`attention`].
pub fn attention_with_lse<T: Float>(
    q: &ArrayBase<impl Data<Elem = T>, Ix4>,
    k: &ArrayBase<impl Data<Elem = T>, Ix4>,
    v: &ArrayBase<impl Data<Elem = T>, Ix4>,
    mask: Mask,
) -> (Array4<T>, Array3<f32>) {
    let (batch, heads, queries, _) = q.dim();
    let mut lse = Array3::zeros((batch, heads, queries));
    let of_rows = lse.as_slice_mut().expect("a new array is row-major");
    let o = attention_into(q, k, v, mask, 0, of_rows);
    (o, lse)
}

/// The gradients `(dq, dk, dv)` of a loss, from its gradient `dout` by the output `o` of [`attention_with_lse`] and the
/// `lse` beside it (Dao et al. 2022, without keeping the weights).
///
/// With `P = e^(q k^T / sqrt(d) - lse)` where the mask allows, else 0, and `D` = sum over d of `dout o`:
/// `dv = P^T dout`, `dS = P (dout v^T - D) / sqrt(d)`, `dq = dS k`, `dk = dS^T q`, summed over the query heads of a key head.
///
/// # Panics
/// If the shapes do not fit, or d is above 256.
pub fn attention_backward<T: Float>(
    [q, k, v]: [&Array4<T>; 3],
    mask: Mask,
    (o, lse): (&Array4<T>, &Array3<f32>),
    dout: &Array4<T>,
) -> [Array4<T>; 3] {
    let geometry = geometry("attention_backward", q, k, v, mask, 0);
    assert!(
        o.shape() == q.shape() && dout.shape() == q.shape() && lse.shape() == &q.shape()[..3],
        "attention_backward: q is {:?}, o {:?}, dout {:?}, lse {:?}; wanted three times [b, h, t, d], and [b, h, t]",
        q.shape(),
        o.shape(),
        dout.shape(),
        lse.shape()
    );
    let last_is_dense = |strides: &[isize]| strides[3] == 1;
    let inputs = [q, k, v, o, dout].map(|x| in_memory(x, last_is_dense));
    let [q_in, k_in, v_in, o_in, dout_in] = inputs.each_ref().map(by_heads);
    let lse = lse.as_standard_layout();
    let mut gradients = [q, k, v].map(|x| Array4::from_elem(x.dim(), T::from_f32(0.0)));
    let [dq, dk, dv] = gradients.each_mut().map(by_heads_mut);
    let lse = lse.as_slice().expect("standard layout");
    backward(&geometry, q_in, k_in, v_in, o_in, dout_in, lse, dq, dk, dv);
    gradients
}

fn attention_into<T: Float>(
    q: &ArrayBase<impl Data<Elem = T>, Ix4>,
    k: &ArrayBase<impl Data<Elem = T>, Ix4>,
    v: &ArrayBase<impl Data<Elem = T>, Ix4>,
    mask: Mask,
    offset: usize,
    lse: &mut [f32],
) -> Array4<T> {
    let geometry = geometry("attention", q, k, v, mask, offset);
    let last_is_dense = |strides: &[isize]| strides[3] == 1;
    let q = in_memory(q, last_is_dense);
    let k = in_memory(k, last_is_dense);
    let v = in_memory(v, last_is_dense);
    let mut o = Array4::from_elem(q.dim(), T::from_f32(0.0));
    let out = by_heads_mut(&mut o);
    attention_forward(
        &geometry,
        by_heads(&q),
        by_heads(&k),
        by_heads(&v),
        out,
        lse,
    );
    o
}

/// What attends to what. Panics with the op's name if the shapes do not fit.
fn geometry<T>(
    op: &str,
    q: &ArrayBase<impl Data<Elem = T>, Ix4>,
    k: &ArrayBase<impl Data<Elem = T>, Ix4>,
    v: &ArrayBase<impl Data<Elem = T>, Ix4>,
    mask: Mask,
    offset: usize,
) -> Geometry<'static> {
    let ((batch, heads, queries, d), (b, kv_heads, keys, kd)) = (q.dim(), k.dim());
    assert!(
        k.shape() == v.shape()
            && (b, kd) == (batch, d)
            && kv_heads > 0
            && heads.is_multiple_of(kv_heads)
            && (1..=256).contains(&d),
        "{op}: q is {:?}, k {:?}, v {:?}; wanted [b, h, t, d] and twice [b, g, s, d] with g dividing h and d at \
         most 256",
        q.shape(),
        k.shape(),
        v.shape()
    );
    Geometry {
        batch,
        heads,
        kv_heads,
        queries,
        keys,
        head_dim: d,
        scale: 1.0 / (d as f32).sqrt(),
        soft_cap: None,
        causal: mask != Mask::Full,
        window: match mask {
            Mask::Window(w) => Some(w),
            Mask::Full | Mask::Causal => None,
        },
        offset,
        documents: None,
    }
}

/// `y = (x - mean) / sqrt(variance + eps) weight + bias` over the last axis (Ba et al. 2016): x, y [.., c]; weight, bias `[c]`.
///
/// # Panics
/// If weight or bias has not c elements.
pub fn layer_norm<T: Float, D: Dimension>(
    x: &ArrayBase<impl Data<Elem = T>, D>,
    weight: &ArrayBase<impl Data<Elem = T>, Ix1>,
    bias: &ArrayBase<impl Data<Elem = T>, Ix1>,
    eps: f32,
) -> Array<T, D> {
    let rows = check_rows(
        "layer_norm",
        x,
        &[("weight", weight.len()), ("bias", bias.len())],
    );
    let (w, b) = (weight.as_standard_layout(), bias.as_standard_layout());
    by_rows(x, |x, y| {
        with_scratch_f32(2 * rows, |statistics| {
            let (mean, rstd) = statistics.split_at_mut(rows);
            rows::layer_norm(
                x,
                Some(elements(&w)),
                Some(elements(&b)),
                eps,
                y,
                mean,
                rstd,
            );
        });
    })
}

/// `y = x / sqrt(mean of x^2 + eps) weight` over the last axis (Zhang and Sennrich 2019): x, y [.., c]; weight `[c]`.
///
/// # Panics
/// If weight has not c elements.
pub fn rms_norm<T: Float, D: Dimension>(
    x: &ArrayBase<impl Data<Elem = T>, D>,
    weight: &ArrayBase<impl Data<Elem = T>, Ix1>,
    eps: f32,
) -> Array<T, D> {
    let rows = check_rows("rms_norm", x, &[("weight", weight.len())]);
    let w = weight.as_standard_layout();
    by_rows(x, |x, y| {
        with_scratch_f32(rows, |rstd| {
            rows::rms_norm(x, Some(elements(&w)), eps, y, rstd);
        });
    })
}

/// `y[j] = e^x[j] / sum over i of e^x[i]` over the last axis.
///
/// # Panics
/// If x has no axes.
pub fn softmax<T: Float, D: Dimension>(x: &ArrayBase<impl Data<Elem = T>, D>) -> Array<T, D> {
    check_rows("softmax", x, &[]);
    let c = x.shape().last().copied().unwrap_or(1);
    by_rows(x, |x, y| rows::softmax(x, c, y))
}

/// `y = x/2 (1 + erf(x / sqrt 2))` (Hendrycks and Gimpel 2016), within `2^-22 |x|`: for large negative x, where the function tends
/// to 0, this is an absolute error. 0 at minus infinity.
pub fn gelu<T: Float, D: Dimension>(x: &ArrayBase<impl Data<Elem = T>, D>) -> Array<T, D> {
    by_rows(x, |x, y| rows::activation(Activation::GeluErf, x, y))
}

/// `y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`, GPT-2's form of [`gelu`], within the same bound.
pub fn gelu_tanh<T: Float, D: Dimension>(x: &ArrayBase<impl Data<Elem = T>, D>) -> Array<T, D> {
    by_rows(x, |x, y| rows::activation(Activation::GeluTanh, x, y))
}

/// `y = x / (1 + e^-x)` (Elfwing et al. 2017). 0 at minus infinity, and below -87.
pub fn silu<T: Float, D: Dimension>(x: &ArrayBase<impl Data<Elem = T>, D>) -> Array<T, D> {
    by_rows(x, |x, y| rows::activation(Activation::Silu, x, y))
}

/// The array itself if a kernel can read it where it lies, a row-major copy otherwise.
fn in_memory<'a, T: Float, D: Dimension>(
    x: &'a ArrayBase<impl Data<Elem = T>, D>,
    fits: impl Fn(&[isize]) -> bool,
) -> CowArray<'a, T, D> {
    let dense = x.as_slice_memory_order().is_some();
    if dense && x.strides().iter().all(|&s| s >= 0) && fits(x.strides()) {
        return x.view().into();
    }
    x.as_standard_layout().into_owned().into()
}

/// All elements, in the order in which they lie in memory.
fn elements<'a, T: Float, D: Dimension>(x: &'a CowArray<'_, T, D>) -> Slice<'a> {
    if x.is_empty() {
        // Whatever its strides are.
        return Slice::of_bytes(bytemuck::cast_slice::<T, u8>(&[]), T::DTYPE);
    }
    let all = x
        .as_slice_memory_order()
        .expect("in_memory copies what is not dense");
    Slice::of_bytes(bytemuck::cast_slice(all), T::DTYPE)
}

fn elements_mut<T: Float, D: Dimension>(x: &mut Array<T, D>) -> SliceMut<'_> {
    let all = x.as_slice_mut().expect("a new array is row-major");
    SliceMut::of_bytes(bytemuck::cast_slice_mut(all), T::DTYPE)
}

/// The last two axes as rows and columns, the one before as the batch.
fn matrix<'a, T: Float, D: Dimension>(x: &'a CowArray<'_, T, D>) -> Matrix<'a> {
    let (shape, strides, last) = (x.shape(), x.strides(), x.ndim() - 1);
    Matrix {
        data: elements(x),
        rows: shape[last - 1],
        cols: shape[last],
        row_stride: strides[last - 1] as usize,
        col_stride: strides[last] as usize,
        batch_stride: if last > 1 { strides[0] as usize } else { 0 },
    }
}

fn multiply(batch: usize, a: Matrix, b: Matrix, c: SliceMut, [m, n]: [usize; 2]) {
    let c = MatrixMut {
        data: c,
        rows: m,
        cols: n,
        row_stride: n,
        batch_stride: m * n,
    };
    product::matmul(batch, a, b, c, Accum::Replace, Epilogue::default());
}

fn by_heads<'a, T: Float>(x: &'a CowArray<'_, T, Ix4>) -> Heads<'a> {
    let strides = x.strides();
    Heads {
        data: elements(x),
        strides: [0, 1, 2].map(|axis| strides[axis] as usize),
    }
}

fn by_heads_mut<T: Float>(x: &mut Array4<T>) -> HeadsMut<'_> {
    let (_, heads, tokens, d) = x.dim();
    HeadsMut {
        strides: [heads * tokens * d, tokens * d, d],
        data: elements_mut(x),
    }
}

/// A new array that `f` writes from x, both row-major.
fn by_rows<T: Float, D: Dimension>(
    x: &ArrayBase<impl Data<Elem = T>, D>,
    f: impl FnOnce(Slice, SliceMut),
) -> Array<T, D> {
    let x = x.as_standard_layout();
    let mut y = Array::from_elem(x.raw_dim(), T::from_f32(0.0));
    f(elements(&x), elements_mut(&mut y));
    y
}

/// Number of rows. Panics unless x has a last axis, and each vector is as long.
fn check_rows<T, D: Dimension>(
    kernel: &str,
    x: &ArrayBase<impl Data<Elem = T>, D>,
    vectors: &[(&str, usize)],
) -> usize {
    let (&c, rest) = x
        .shape()
        .split_last()
        .unwrap_or_else(|| panic!("{kernel}: x has no axes; wanted [.., c]"));
    for (name, len) in vectors {
        assert_eq!(
            *len,
            c,
            "{kernel}: x is {:?} and {name} is [{len}]",
            x.shape()
        );
    }
    rest.iter().product()
}

#[cfg(test)]
mod tests;
