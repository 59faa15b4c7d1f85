//! Matrix products: `c = f(a b + bias)`, with either operand stored transposed, batched or not.
//!
//! Nothing is copied for a transposition, forward or backward: the kernel takes strides. An element is one chain of
//! fused multiply-adds over k in ascending order, and a gradient that is added to resumes the chain, so accumulating
//! micro-batches gives the bits of one large batch.

#[cfg(feature = "gpu")]
use super::device::{read, write};
use super::{
    Accum, Activation, Axes, Backward, Cost, Linear, Op, Saved, Site, activation, letters_besides,
    misfit, traffic,
};
use crate::cpu::matmul::{self as kernel, Epilogue, Matrix, MatrixMut};
use crate::cpu::memory::with_scratch;
use crate::cpu::rows;
use crate::dtype::{DType, Slice, SliceMut};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::tensor::{Tensor, TensorType};

/// `c[i,j] = f(sum over p of a[i,p] b[p,j] + bias[j])`.
///
/// - a: [.., m, k], or [.., k, m] with `transpose_a`;
/// - b: [k, n], or [n, k] with `transpose_b`, behind none, some or all of a's leading axes, from the first on: one product
///   for each of their indices, and a's other leading axes are rows of it (`transpose_a` wants all of them in b);
/// - bias: `[n]`, a third operand, with `bias`;
/// - result 0: c [.., m, n] in `output`, or in the type of a;
/// - result 1, with an `activation`: the preactivation `a b + bias`, in the type of c, kept for backward.
///
/// The sum is in f32 whatever the types, which may differ. Letters of a 3-axis a: `amk,kn->amn`; batched: `amk,akn->amn`;
/// the experts of a mixture, each with rows of its own: `abmk,akn->abmn`.
/// A split k gives a partial sum, but with a bias or an activation it may not be split: they come after the reduction
/// ([`AddBias`](super::AddBias), [`Activate`](super::Activate)).
///
/// Backward: `da = dz b^T`, `db = a^T dz` (over all rows as one product where b is shared), `dbias = column sums of dz`,
/// with `dz = dc f'(z)`.
#[derive(Clone, Debug, Default)]
pub struct Matmul {
    /// a is stored [.., k, m].
    pub transpose_a: bool,
    /// b is stored [.., n, k].
    pub transpose_b: bool,
    /// A third operand `[n]` is added to every row.
    pub bias: bool,
    /// What follows the sum and the bias.
    pub activation: Option<Activation>,
    /// Element type of the result; that of a if none.
    pub output: Option<DType>,
}

/// What a product's operands come to: `batch` products of [m, k] by [k, n].
struct Sizes {
    batch: usize,
    m: usize,
    n: usize,
    k: usize,
    /// Elements from one b to the next: 0 if b is shared.
    b_stride: usize,
}

impl Matmul {
    /// Sizes and the result's shape.
    fn sizes(&self, a: &[usize], b: &[usize]) -> Result<(Sizes, Vec<usize>), &'static str> {
        if a.len() < 2 || b.len() < 2 {
            return Err("operands of at least two axes");
        }
        let (a_lead, a_last) = a.split_at(a.len() - 2);
        let (b_lead, b_last) = b.split_at(b.len() - 2);
        let (m, k) = ordered(a_last, self.transpose_a);
        let (b_k, n) = ordered(b_last, self.transpose_b);
        if k != b_k {
            return Err(match (self.transpose_a, self.transpose_b) {
                (false, false) => "a [.., m, k] and b [k, n] or [.., k, n] with the same k",
                (false, true) => "a [.., m, k] and b [n, k] or [.., n, k] with the same k",
                (true, false) => "a [.., k, m] and b [k, n] or [.., k, n] with the same k",
                (true, true) => "a [.., k, m] and b [n, k] or [.., n, k] with the same k",
            });
        }
        let Some(rows) = a_lead.strip_prefix(b_lead) else {
            return Err("leading axes of b that are the first of a's");
        };
        if self.transpose_a && !rows.is_empty() {
            return Err(
                "a transposed a of two axes where b has two, and the same leading axes otherwise",
            );
        }
        let mut shape = a_lead.to_vec();
        shape.extend([m, n]);
        let sizes = Sizes {
            batch: b_lead.iter().product(),
            // Leading axes of a that b lacks are more rows of one product.
            m: rows.iter().product::<usize>() * m,
            n,
            k,
            b_stride: if b_lead.is_empty() { 0 } else { k * n },
        };
        Ok((sizes, shape))
    }

    fn of(&self, a: &TensorType, b: &TensorType) -> Sizes {
        match self.sizes(&a.shape, &b.shape) {
            Ok((sizes, _)) => sizes,
            Err(wants) => panic!("{}", misfit("matmul", wants, &[a.clone(), b.clone()])),
        }
    }
}

fn ordered(last: &[usize], transposed: bool) -> (usize, usize) {
    if transposed {
        (last[1], last[0])
    } else {
        (last[0], last[1])
    }
}

/// `rows` by `cols` of consecutive matrices that are stored by rows, or by columns if `transposed`.
fn matrix(data: Slice, rows: usize, cols: usize, transposed: bool) -> Matrix {
    let (row_stride, col_stride) = if transposed { (1, rows) } else { (cols, 1) };
    Matrix {
        data,
        rows,
        cols,
        row_stride,
        col_stride,
        batch_stride: rows * cols,
    }
}

fn matrix_mut(data: SliceMut, rows: usize, cols: usize) -> MatrixMut {
    MatrixMut {
        data,
        rows,
        cols,
        row_stride: cols,
        batch_stride: rows * cols,
    }
}

impl Op for Matmul {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let operands = if self.bias { 3 } else { 2 };
        if inputs.len() != operands {
            return Err(misfit("matmul", format!("{operands} operands"), inputs));
        }
        if let Some(narrow) = inputs.iter().find(|t| !t.dtype.is_float()) {
            return Err(misfit(
                "matmul",
                format!("floats, not {}", narrow.dtype),
                inputs,
            ));
        }
        let (sizes, shape) = self
            .sizes(&inputs[0].shape, &inputs[1].shape)
            .map_err(|wants| misfit("matmul", wants, inputs))?;
        if self.bias && inputs[2].shape != [sizes.n] {
            return Err(misfit("matmul", format!("a bias [{}]", sizes.n), inputs));
        }
        let output = self.output.unwrap_or(inputs[0].dtype);
        if !output.is_float() {
            return Err(misfit("matmul", "a float result type, not u32", inputs));
        }
        let c = TensorType::new(shape, output);
        Ok(match self.activation {
            None => vec![c],
            Some(_) => vec![c.clone(), c],
        })
    }

    fn axes(&self, inputs: &[TensorType]) -> Axes {
        let whole = self.bias || self.activation.is_some();
        let k = if whole { 'K' } else { 'k' };
        let pair = |x: char, y: char, swapped: bool| {
            if swapped {
                format!("{y}{x}")
            } else {
                format!("{x}{y}")
            }
        };
        let lead = letters_besides(inputs[0].rank() - 2, "kmn");
        let a = pair('m', k, self.transpose_a);
        let b = pair(k, 'n', self.transpose_b);
        let b_lead = &lead[..inputs[1].rank() - 2];
        let bias = if self.bias { ",n" } else { "" };
        let mut letters = format!("{lead}{a},{b_lead}{b}{bias}->{lead}mn");
        if self.activation.is_some() {
            letters += &format!(",{lead}mn");
        }
        Axes::new(&letters).linear(if whole { Linear::No } else { Linear::Each })
    }

    fn cost(&self, inputs: &[TensorType], outputs: &[TensorType]) -> Cost {
        let s = self.of(&inputs[0], &inputs[1]);
        let results = (s.batch * s.m * s.n) as u64;
        let after = self.bias as u64 + self.activation.map_or(0, activation::flops);
        Cost {
            flops: 2 * results * s.k as u64 + results * after,
            bytes: traffic(inputs) + traffic(outputs),
            scratch: kernel::scratch(
                s.batch,
                s.m,
                s.n,
                s.k,
                inputs[0].dtype,
                inputs[1].dtype,
                outputs[0].dtype,
            ) as u64,
        }
    }

    fn forward(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let s = self.of(inputs[0].ty(), inputs[1].ty());
        let (c, z) = outputs.split_at_mut(1);
        let mut b = matrix(inputs[1].slice(), s.k, s.n, self.transpose_b);
        b.batch_stride = s.b_stride;
        kernel::matmul(
            s.batch,
            matrix(inputs[0].slice(), s.m, s.k, self.transpose_a),
            b,
            matrix_mut(c[0].slice_mut(), s.m, s.n),
            Accum::Replace,
            Epilogue {
                bias: self.bias.then(|| inputs[2].slice()),
                activation: self.activation,
                preactivation: z.first_mut().map(Tensor::slice_mut),
            },
        );
    }

    fn saves(&self) -> Saved {
        let mut saved = Saved::some_inputs(&[0, 1]);
        if self.activation.is_some() {
            saved.outputs = 1 << 1;
        }
        saved
    }

    fn accumulates(&self, _: usize) -> bool {
        true
    }

    fn backward_cost(
        &self,
        inputs: &[TensorType],
        outputs: &[TensorType],
        wanted: &[bool],
    ) -> Cost {
        let s = self.of(&inputs[0], &inputs[1]);
        let [a, b, c] = [&inputs[0], &inputs[1], &outputs[0]];
        let product = 2 * (s.batch * s.m * s.n * s.k) as u64;
        let mut cost = Cost::default();
        if let Some(f) = self.activation {
            cost.flops += c.elements() as u64 * activation::backward_flops(f);
            cost.bytes += 3 * c.bytes();
            cost.scratch = c.allocated_bytes();
        }
        let mut scratch = 0;
        if wanted[0] {
            cost.flops += product;
            cost.bytes += a.bytes() + b.bytes() + c.bytes();
            scratch = kernel::scratch(s.batch, s.m, s.k, s.n, c.dtype, b.dtype, a.dtype);
        }
        if wanted[1] {
            cost.flops += product;
            cost.bytes += a.bytes() + c.bytes() + (b.elements() * 4) as u64;
            scratch = scratch.max(kernel::scratch(
                s.batch,
                s.k,
                s.n,
                s.m,
                a.dtype,
                c.dtype,
                DType::F32,
            ));
        }
        if self.bias && wanted[2] {
            cost.flops += c.elements() as u64;
            cost.bytes += c.bytes() + (s.n * 4) as u64;
        }
        cost.scratch += scratch as u64;
        cost
    }

    fn backward(&self, _: &Site, backward: &mut Backward) {
        let dc = backward.only_gradient("matmul");
        let Some(f) = self.activation else {
            return self.products(dc.slice(), backward);
        };
        let z = backward.output(1);
        with_scratch(z.ty().bytes() as usize, |bytes| {
            rows::activation_backward(
                f,
                z.slice(),
                dc.slice(),
                SliceMut::of_bytes(bytes, z.dtype()),
            );
            self.products(Slice::of_bytes(bytes, z.dtype()), backward);
        });
    }

    #[cfg(feature = "gpu")]
    fn forward_gpu(&self, _: &Site, inputs: &[&Tensor], outputs: &mut [Tensor]) {
        let (a, b) = (inputs[0].ty(), inputs[1].ty());
        let s = self.of(a, b);
        let (c, z) = outputs.split_at_mut(1);
        let mut right = matrix_gpu(read(inputs[1]), s.k, s.n, self.transpose_b);
        right.batch = s.b_stride;
        gpu::matmul(
            s.batch,
            [s.m, s.n, s.k],
            matrix_gpu(read(inputs[0]), s.m, s.k, self.transpose_a),
            right,
            write(&mut c[0]),
            false,
            gpu::After {
                bias: self.bias.then(|| read(inputs[2])),
                activation: self.activation.map(activation::number),
                preactivation: z.first_mut().map(write),
            },
        );
    }

    #[cfg(feature = "gpu")]
    fn backward_gpu(&self, _: &Site, backward: &mut Backward) {
        let dc = read(backward.only_gradient("matmul"));
        let dz = match self.activation {
            None => dc,
            Some(f) => {
                let z = read(backward.output(1));
                let dz = z.scratch_of(z.dtype, z.elements);
                gpu::activation_backward(activation::number(f), z, dc, dz.clone());
                dz
            }
        };
        self.products_gpu(dz, backward);
    }
}

impl Matmul {
    /// The wanted gradients from dz, the gradient of the preactivation.
    fn products(&self, dz: Slice, backward: &mut Backward) {
        let (a, b) = (backward.input(0), backward.input(1));
        let s = self.of(a.ty(), b.ty());
        let (a, b) = (a.slice(), b.slice());
        if let Some(da) = backward.want(0) {
            // da = dz b^T, or stored transposed: da^T = b dz^T.
            let mut bt = matrix(b, s.n, s.k, !self.transpose_b);
            let mut plain = matrix(b, s.k, s.n, self.transpose_b);
            (bt.batch_stride, plain.batch_stride) = (s.b_stride, s.b_stride);
            let (x, y) = if self.transpose_a {
                (plain, matrix(dz, s.n, s.m, true))
            } else {
                (matrix(dz, s.m, s.n, false), bt)
            };
            product(s.batch, x, y, da);
        }
        if let Some(db) = backward.want(1) {
            // db = a^T dz, or stored transposed: db^T = dz^T a.
            let (x, y) = if self.transpose_b {
                (
                    matrix(dz, s.n, s.m, true),
                    matrix(a, s.m, s.k, self.transpose_a),
                )
            } else {
                (
                    matrix(a, s.k, s.m, !self.transpose_a),
                    matrix(dz, s.m, s.n, false),
                )
            };
            product(s.batch, x, y, db);
        }
        if self.bias
            && let Some(dbias) = backward.want(2)
        {
            dbias.in_f32(|out, accum| rows::column_sum(dz, out, accum));
        }
    }
}

#[cfg(feature = "gpu")]
fn matrix_gpu(data: gpu::Operand, rows: usize, cols: usize, transposed: bool) -> gpu::Matrix {
    let (row, column) = if transposed { (1, rows) } else { (cols, 1) };
    gpu::Matrix {
        data,
        row,
        column,
        batch: rows * cols,
    }
}

#[cfg(feature = "gpu")]
impl Matmul {
    /// As `products`, on a graphics processor.
    fn products_gpu(&self, dz: gpu::Operand, backward: &mut Backward) {
        let (a, b) = (backward.input(0), backward.input(1));
        let s = self.of(a.ty(), b.ty());
        let (a, b) = (read(a), read(b));
        let product = |[m, n, k]: [usize; 3], x, y, c: &mut super::Gradient| {
            let (c, add) = c.operand();
            gpu::matmul(s.batch, [m, n, k], x, y, c, add, gpu::After::default());
        };
        if let Some(da) = backward.want(0) {
            let mut bt = matrix_gpu(b.clone(), s.n, s.k, !self.transpose_b);
            let mut plain = matrix_gpu(b, s.k, s.n, self.transpose_b);
            (bt.batch, plain.batch) = (s.b_stride, s.b_stride);
            if self.transpose_a {
                let dzt = matrix_gpu(dz.clone(), s.n, s.m, true);
                product([s.k, s.m, s.n], plain, dzt, da);
            } else {
                let dz = matrix_gpu(dz.clone(), s.m, s.n, false);
                product([s.m, s.k, s.n], dz, bt, da);
            }
        }
        if let Some(db) = backward.want(1) {
            if self.transpose_b {
                let dzt = matrix_gpu(dz.clone(), s.n, s.m, true);
                let a = matrix_gpu(a, s.m, s.k, self.transpose_a);
                product([s.n, s.k, s.m], dzt, a, db);
            } else {
                let at = matrix_gpu(a, s.k, s.m, !self.transpose_a);
                let dz = matrix_gpu(dz.clone(), s.m, s.n, false);
                product([s.k, s.n, s.m], at, dz, db);
            }
        }
        if self.bias
            && let Some(dbias) = backward.want(2)
        {
            let (out, add) = dbias.operand();
            gpu::column_sum(dz, out, add);
        }
    }
}

/// `c (+)= x y` into a gradient.
fn product(batch: usize, x: Matrix, y: Matrix, c: &mut super::Gradient) {
    let (rows, cols, accum) = (x.rows, y.cols, c.accum);
    kernel::matmul(
        batch,
        x,
        y,
        matrix_mut(c.tensor.slice_mut(), rows, cols),
        accum,
        Epilogue::default(),
    );
}
