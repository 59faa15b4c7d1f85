//! Against the textbook in f64 within gamma(k) |A| |B|, and bit for bit across everything that must not matter.

use super::super::simd::{Isa, with_isa};
use super::*;
use crate::dtype::{Element, Float};
use half::{bf16, f16};

/// Elements of any float type that own their memory.
#[derive(Clone, Debug, PartialEq)]
enum Data {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl Data {
    fn new(dtype: DType, x: impl Iterator<Item = f32>) -> Self {
        fn all<T: Float>(x: impl Iterator<Item = f32>) -> Vec<T> {
            x.map(T::from_f32).collect()
        }
        match dtype {
            DType::F32 => Data::F32(all(x)),
            DType::Bf16 => Data::Bf16(all(x)),
            DType::F16 => Data::F16(all(x)),
            DType::U32 => unreachable!(),
        }
    }
    fn random(dtype: DType, len: usize, seed: u32) -> Self {
        let mut state = seed.wrapping_mul(747_796_405).wrapping_add(1);
        Data::new(
            dtype,
            std::iter::repeat_with(move || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .take(len),
        )
    }
    fn slice(&self) -> Slice<'_> {
        match self {
            Data::F32(x) => Slice::F32(x),
            Data::Bf16(x) => Slice::Bf16(x),
            Data::F16(x) => Slice::F16(x),
        }
    }
    fn slice_mut(&mut self) -> SliceMut<'_> {
        match self {
            Data::F32(x) => SliceMut::F32(x),
            Data::Bf16(x) => SliceMut::Bf16(x),
            Data::F16(x) => SliceMut::F16(x),
        }
    }
    fn get(&self, i: usize) -> f32 {
        match self {
            Data::F32(x) => x[i],
            Data::Bf16(x) => x[i].to_f32(),
            Data::F16(x) => x[i].to_f32(),
        }
    }
    fn bits(&self) -> Vec<u8> {
        match self {
            Data::F32(x) => bytemuck::cast_slice(x).to_vec(),
            Data::Bf16(x) => bytemuck::cast_slice(x).to_vec(),
            Data::F16(x) => bytemuck::cast_slice(x).to_vec(),
        }
    }
}

/// One product; the defaults of [`case`] are changed field by field.
#[derive(Clone, Debug)]
struct Case {
    batch: usize,
    m: usize,
    n: usize,
    k: usize,
    types: [DType; 3],
    /// Whether a and b lie transposed in memory.
    transposed: [bool; 2],
    /// Elements between rows, columns left unused.
    gap: usize,
    shared_b: bool,
    accum: Accum,
    bias: bool,
    activation: Option<Activation>,
    preactivation: bool,
}

fn case(m: usize, n: usize, k: usize) -> Case {
    Case {
        batch: 1,
        m,
        n,
        k,
        types: [DType::F32; 3],
        transposed: [false; 2],
        gap: 0,
        shared_b: false,
        accum: Accum::Replace,
        bias: false,
        activation: None,
        preactivation: false,
    }
}

/// What a case computes: c with its surroundings, and the preactivation.
struct Computed {
    c: Data,
    preactivation: Option<Data>,
}

impl Case {
    fn operands(&self) -> [Data; 4] {
        let extra = self.gap + 3;
        let a = self.batch * (self.m + extra) * (self.k + extra);
        let b = self.batch * (self.k + extra) * (self.n + extra);
        let c = self.batch * (self.m + 1) * (self.n + extra);
        let old = match self.accum {
            Accum::Replace => Data::new(self.types[2], std::iter::repeat_n(f32::NAN, c)),
            Accum::Add => Data::random(self.types[2], c, 3),
        };
        [
            Data::random(self.types[0], a, 1),
            Data::random(self.types[1], b, 2),
            old,
            Data::random(self.types[1], self.n, 4),
        ]
    }

    fn matrix<'a>(&self, data: &'a Data, rows: usize, cols: usize, which: usize) -> Matrix<'a> {
        let (far, near) = (
            if self.transposed[which] { rows } else { cols } + self.gap,
            1,
        );
        let (row_stride, col_stride) = if self.transposed[which] {
            (near, far)
        } else {
            (far, near)
        };
        let lines = if self.transposed[which] { cols } else { rows };
        Matrix {
            data: data.slice(),
            rows,
            cols,
            row_stride,
            col_stride,
            batch_stride: if which == 1 && self.shared_b {
                0
            } else {
                lines * far
            },
        }
    }

    fn c_row(&self) -> usize {
        self.n + self.gap
    }

    fn compute(&self) -> Computed {
        let [a, b, mut c, bias] = self.operands();
        let mut kept = self.preactivation.then(|| {
            Data::new(
                self.types[0],
                std::iter::repeat_n(f32::NAN, self.batch * self.m * self.n),
            )
        });
        let (row_stride, batch_stride) = (self.c_row(), self.m * self.c_row());
        matmul(
            self.batch,
            self.matrix(&a, self.m, self.k, 0),
            self.matrix(&b, self.k, self.n, 1),
            MatrixMut {
                data: c.slice_mut(),
                rows: self.m,
                cols: self.n,
                row_stride,
                batch_stride,
            },
            self.accum,
            Epilogue {
                bias: self.bias.then(|| bias.slice()),
                activation: self.activation,
                preactivation: kept.as_mut().map(Data::slice_mut),
            },
        );
        Computed {
            c,
            preactivation: kept,
        }
    }

    /// Each element of c: (index in memory, exact sum with bias, sum of |a| |b|).
    fn exact(&self) -> Vec<(usize, f64, f64)> {
        let [a, b, c, bias] = self.operands();
        let (x, y) = (
            self.matrix(&a, self.m, self.k, 0),
            self.matrix(&b, self.k, self.n, 1),
        );
        let mut all = Vec::new();
        for (t, i, j) in (0..self.batch)
            .flat_map(|t| (0..self.m).map(move |i| (t, i)))
            .flat_map(|(t, i)| (0..self.n).map(move |j| (t, i, j)))
        {
            let at = (t * self.m + i) * self.c_row() + j;
            let old = if self.accum == Accum::Add {
                c.get(at) as f64
            } else {
                0.0
            };
            let added = if self.bias { bias.get(j) as f64 } else { 0.0 };
            let (mut sum, mut size) = (old + added, old.abs() + added.abs());
            for p in 0..self.k {
                let u = a.get(t * x.batch_stride + i * x.row_stride + p * x.col_stride) as f64;
                let v = b.get(t * y.batch_stride + p * y.row_stride + j * y.col_stride) as f64;
                sum += u * v;
                size += (u * v).abs();
            }
            all.push((at, sum, size));
        }
        all
    }

    /// Within gamma(k + 2) of the exact sums plus one rounding to c's type, and nothing else touched.
    fn check(&self) {
        let Computed { c, preactivation } = self.compute();
        let [_, _, old, _] = self.operands();
        let u = DType::F32.roundoff();
        let gamma = (self.k + 2) as f64 * u / (1.0 - (self.k + 2) as f64 * u);
        let mut written = vec![false; c.slice().len()];
        for (e, (at, sum, size)) in self.exact().into_iter().enumerate() {
            written[at] = true;
            let (mut want, mut bound) = (sum, gamma * size);
            if let Some(kept) = &preactivation {
                let slack = sum.abs() * self.types[0].roundoff() * 1.01 + 1e-7;
                let error = (kept.get(e) as f64 - sum).abs();
                assert!(error <= bound + slack, "preactivation {e} of {self:?}");
            }
            if let Some(activation) = self.activation {
                want = activate(activation, sum);
                // No activation here is steeper than 1.13, but the square: 2 |x|.
                bound = bound * (1.13 + 2.0 * sum.abs()) + 4.0 * u * sum.abs();
            }
            bound += want.abs() * self.types[2].roundoff() * 1.01 + 1e-7;
            let error = (c.get(at) as f64 - want).abs();
            assert!(
                error <= bound,
                "{at}: {} is not {want} +- {bound} in {self:?}",
                c.get(at)
            );
        }
        for (at, _) in written.iter().enumerate().filter(|(_, w)| !**w) {
            assert_eq!(
                c.get(at).to_bits(),
                old.get(at).to_bits(),
                "{at} was touched by {self:?}"
            );
        }
    }

    /// The bits of c and of the preactivation on every instruction set and on 1 and 2 threads.
    fn same_everywhere(&self) {
        let run = |isa, threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let Computed { c, preactivation } = pool.install(|| with_isa(isa, || self.compute()));
            (c.bits(), preactivation.map(|x| x.bits()))
        };
        let want = run(Isa::available()[0], 1);
        for isa in Isa::available() {
            for threads in [1, 2, 3] {
                assert!(
                    run(isa, threads) == want,
                    "{isa:?} with {threads} threads: {self:?}"
                );
            }
        }
    }
}

fn activate(a: Activation, x: f64) -> f64 {
    match a {
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            x / 2.0 * (1.0 + inner.tanh())
        }
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Relu2 => x.max(0.0).powi(2),
        Activation::GeluErf => unreachable!("its value is tested beside its polynomial"),
    }
}

const EDGES: [usize; 18] = [
    0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 15, 16, 17, 31, 32, 33, 61,
];

#[test]
fn every_edge_of_a_tile_in_every_layout() {
    for m in EDGES {
        for n in EDGES {
            for (k, gap) in [(0, 0), (1, 2), (5, 0), (17, 1)] {
                let layout = m + n + k;
                Case {
                    transposed: [layout % 2 == 1, layout / 2 % 2 == 1],
                    gap,
                    ..case(m, n, k)
                }
                .check();
            }
        }
    }
}

#[test]
fn blocks_of_k_m_and_n() {
    for (m, n, k) in [
        (5, 33, 255),
        (7, 40, 256),
        (13, 70, 257),
        (3, 1100, 513),
        (260, 37, 300),
        (30, 2100, 5),
    ] {
        for transposed in [[false, false], [true, false], [false, true], [true, true]] {
            Case {
                transposed,
                ..case(m, n, k)
            }
            .check();
        }
    }
}

#[test]
fn every_combination_of_types() {
    let types = [DType::F32, DType::Bf16, DType::F16];
    for a in types {
        for b in types {
            for c in types {
                for (m, n, k) in [(2, 37, 300), (9, 21, 300), (27, 35, 31)] {
                    for accum in [Accum::Replace, Accum::Add] {
                        let transposed = [m == 9, n == 35];
                        let types = [a, b, c];
                        Case {
                            types,
                            accum,
                            transposed,
                            gap: 1,
                            ..case(m, n, k)
                        }
                        .check();
                    }
                }
            }
        }
    }
}

#[test]
fn batches_with_their_own_and_with_shared_operands() {
    for m in [1, 3, 20] {
        for shared_b in [false, true] {
            for gap in [0, 2] {
                Case {
                    batch: 3,
                    shared_b,
                    gap,
                    ..case(m, 19, 23)
                }
                .check();
            }
        }
    }
}

#[test]
fn epilogues_follow_the_sum() {
    use Activation::*;
    for (m, n, k) in [(1, 40, 300), (7, 37, 20), (14, 64, 300)] {
        for types in [
            [DType::F32; 3],
            [DType::Bf16; 3],
            [DType::F16, DType::F32, DType::Bf16],
        ] {
            for activation in [None, Some(GeluTanh), Some(Relu2), Some(Silu)] {
                for accum in [Accum::Replace, Accum::Add] {
                    let (bias, preactivation) = (true, activation.is_some());
                    Case {
                        types,
                        activation,
                        bias,
                        preactivation,
                        accum,
                        ..case(m, n, k)
                    }
                    .check();
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_instructions_or_threads() {
    let bf16 = [DType::Bf16; 3];
    for c in [
        case(1, 1200, 900),
        case(3, 1200, 300),
        case(16, 300, 260),
        case(130, 131, 67),
        Case {
            transposed: [true, true],
            ..case(121, 97, 300)
        },
        Case {
            types: bf16,
            accum: Accum::Add,
            ..case(121, 97, 300)
        },
        Case {
            types: bf16,
            transposed: [false, true],
            ..case(70, 520, 300)
        },
        Case {
            batch: 5,
            gap: 1,
            ..case(50, 51, 90)
        },
        Case {
            bias: true,
            activation: Some(Activation::GeluErf),
            preactivation: true,
            ..case(128, 130, 64)
        },
    ] {
        c.same_everywhere();
    }
}

/// The chain itself, written out: every path must give these bits.
#[test]
fn an_element_is_one_chain_in_ascending_order() {
    for (m, n, k) in [
        (1, 9, 600),
        (4, 9, 300),
        (5, 40, 300),
        (30, 100, 310),
        (100, 101, 103),
    ] {
        let one = case(m, n, k);
        let [a, b, ..] = one.operands();
        let c = one.compute().c;
        for i in 0..m {
            for j in 0..n {
                let chain = (0..k).fold(0f32, |sum, p| {
                    a.get(i * k + p).mul_add(b.get(p * n + j), sum)
                });
                assert_eq!(
                    c.get(i * n + j).to_bits(),
                    chain.to_bits(),
                    "({i}, {j}) of {one:?}"
                );
            }
        }
    }
}

#[test]
fn adding_resumes_the_chain() {
    for (m, n, k, cut) in [(2, 33, 40, 13), (30, 40, 500, 100), (130, 70, 120, 60)] {
        let (a, b) = (
            Data::random(DType::F32, m * k, 1),
            Data::random(DType::F32, k * n, 2),
        );
        let product = |c: &mut Vec<f32>, from: usize, to: usize, accum| {
            let part = |x: &Data, skip: usize| {
                Slice::F32(match x {
                    Data::F32(x) => &x[skip..],
                    _ => unreachable!(),
                })
                .typed::<f32>()
                .to_vec()
            };
            let (a, b) = (part(&a, from), part(&b, from * n));
            let a = Matrix {
                data: Slice::F32(&a),
                rows: m,
                cols: to - from,
                row_stride: k,
                col_stride: 1,
                batch_stride: 0,
            };
            let b = Matrix {
                data: Slice::F32(&b),
                rows: to - from,
                cols: n,
                row_stride: n,
                col_stride: 1,
                batch_stride: 0,
            };
            let c = MatrixMut {
                data: SliceMut::F32(c),
                rows: m,
                cols: n,
                row_stride: n,
                batch_stride: 0,
            };
            matmul(1, a, b, c, accum, Epilogue::default());
        };
        let (mut once, mut twice) = (vec![f32::NAN; m * n], vec![f32::NAN; m * n]);
        product(&mut once, 0, k, Accum::Replace);
        product(&mut twice, 0, cut, Accum::Replace);
        product(&mut twice, cut, k, Accum::Add);
        assert!(
            once.iter()
                .zip(&twice)
                .all(|(x, y)| x.to_bits() == y.to_bits())
        );
    }
}

#[test]
fn rows_of_matrices_interleave() {
    // Heads side by side: c[t, h, d] with the heads as the batch.
    let (heads, m, n, k) = (3, 10, 5, 7);
    let (a, b) = (
        Data::random(DType::F32, heads * m * k, 1),
        Data::random(DType::F32, heads * k * n, 2),
    );
    let product = |c: &mut [f32], row_stride, batch_stride| {
        matmul(
            heads,
            Matrix {
                data: a.slice(),
                rows: m,
                cols: k,
                row_stride: k,
                col_stride: 1,
                batch_stride: m * k,
            },
            Matrix {
                data: b.slice(),
                rows: k,
                cols: n,
                row_stride: n,
                col_stride: 1,
                batch_stride: k * n,
            },
            MatrixMut {
                data: SliceMut::F32(c),
                rows: m,
                cols: n,
                row_stride,
                batch_stride,
            },
            Accum::Replace,
            Epilogue::default(),
        );
    };
    let (mut apart, mut woven) = (vec![f32::NAN; heads * m * n], vec![f32::NAN; heads * m * n]);
    product(&mut apart, n, m * n);
    product(&mut woven, heads * n, n);
    for (h, i, j) in
        (0..heads).flat_map(|h| (0..m).flat_map(move |i| (0..n).map(move |j| (h, i, j))))
    {
        assert_eq!(apart[(h * m + i) * n + j], woven[(i * heads + h) * n + j]);
    }
}

#[test]
fn mistakes_panic_with_both_sides() {
    let x = [0f32; 100];
    let ids = [0u32; 100];
    let matrix = |rows, cols| Matrix {
        data: Slice::F32(&x),
        rows,
        cols,
        row_stride: cols,
        col_stride: 1,
        batch_stride: 0,
    };
    let message = |a: Matrix, b: Matrix, rows: usize, row_stride: usize, bias: &[f32]| {
        let mut c = [0f32; 100];
        let c = MatrixMut {
            data: SliceMut::F32(&mut c),
            rows,
            cols: 4,
            row_stride,
            batch_stride: 0,
        };
        let epilogue = Epilogue {
            bias: Some(Slice::F32(bias)),
            ..Epilogue::default()
        };
        let run = std::panic::AssertUnwindSafe(|| matmul(1, a, b, c, Accum::Replace, epilogue));
        let panic = std::panic::catch_unwind(run).expect_err("must panic");
        panic
            .downcast_ref::<String>()
            .cloned()
            .unwrap_or_else(|| panic.downcast_ref::<&str>().unwrap().to_string())
    };
    let four = [0f32; 4];
    assert!(message(matrix(3, 5), matrix(6, 4), 3, 4, &four).contains("[3, 5] x [6, 4]"));
    assert!(message(matrix(30, 5), matrix(5, 4), 30, 4, &four).contains("100 elements"));
    assert!(message(matrix(3, 5), matrix(5, 4), 3, 3, &four).contains("overlap"));
    assert!(message(matrix(3, 5), matrix(5, 4), 3, 4, &x).contains("bias"));
    let indices = Matrix {
        data: Slice::U32(&ids),
        ..matrix(3, 5)
    };
    assert!(message(indices, matrix(5, 4), 3, 4, &four).contains("u32"));
}

#[test]
fn regions_cover_c_once() {
    for (m, n) in [(1, 1), (1, 4096), (100, 100), (37, 1000), (513, 7)] {
        for threads in [1, 2, 3, 4, 7] {
            for batch in [1, 3] {
                let (a, b) = (vec![0f32; m], vec![0f32; n]);
                let mut c = vec![0f32; batch * m * n];
                let a = Matrix {
                    data: Slice::F32(&a),
                    rows: m,
                    cols: 1,
                    row_stride: 1,
                    col_stride: 1,
                    batch_stride: 0,
                };
                let b = Matrix {
                    data: Slice::F32(&b),
                    rows: 1,
                    cols: n,
                    row_stride: n,
                    col_stride: 1,
                    batch_stride: 0,
                };
                let c = MatrixMut {
                    data: SliceMut::F32(&mut c),
                    rows: m,
                    cols: n,
                    row_stride: n,
                    batch_stride: m * n,
                };
                let product =
                    Product::new(batch, a, b, c, Accum::Replace, Epilogue::default()).unwrap();
                let grid = Grid::new(&product, threads);
                let mut seen = vec![0; product.batch * product.c.rows * n];
                for task in 0..grid.tasks() {
                    let (batch, rows, cols) = grid.region(task);
                    for t in batch {
                        for i in rows.clone() {
                            for j in cols.clone() {
                                seen[(t * product.c.rows + i) * n + j] += 1;
                            }
                        }
                    }
                }
                assert!(seen.iter().all(|&x| x == 1), "{grid:?}");
            }
        }
    }
}

#[test]
fn scratch_follows_shape_and_type_only() {
    let of = |m, n, k, c| scratch(1, m, n, k, f32::DTYPE, f32::DTYPE, c);
    assert_eq!(of(0, 5, 5, DType::F32), 0);
    assert_eq!(
        of(4096, 4096, 4096, DType::F32),
        of(8192, 8192, 8192, DType::F32)
    );
    assert!(of(600, 600, 600, DType::Bf16) > of(600, 600, 600, DType::F32));
}
