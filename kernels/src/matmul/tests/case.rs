//! One product as a table's row: its operands, the textbook in f64, and what must hold of the result.

use super::super::super::simd::{Isa, with_isa};
use super::super::*;
use crate::dtype::Float;
use half::{bf16, f16};

/// Elements of any float type that own their memory.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Data {
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
    pub(super) fn random(dtype: DType, len: usize, seed: u32) -> Self {
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
    pub(super) fn slice(&self) -> Slice<'_> {
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
    pub(super) fn get(&self, i: usize) -> f32 {
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
pub(super) struct Case {
    pub(super) batch: usize,
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) types: [DType; 3],
    /// Whether a and b lie transposed in memory.
    pub(super) transposed: [bool; 2],
    /// Elements between rows, columns left unused.
    pub(super) gap: usize,
    pub(super) shared_b: bool,
    pub(super) accum: Accum,
    pub(super) bias: bool,
    pub(super) activation: Option<Activation>,
    pub(super) preactivation: bool,
}

pub(super) fn case(m: usize, n: usize, k: usize) -> Case {
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
pub(super) struct Computed {
    pub(super) c: Data,
    pub(super) preactivation: Option<Data>,
}

impl Case {
    pub(super) fn operands(&self) -> [Data; 4] {
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

    pub(super) fn compute(&self) -> Computed {
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
    pub(super) fn check(&self) {
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

    /// The bits of c and of the preactivation on every instruction set and on 1 to 3 threads.
    pub(super) fn same_everywhere(&self) {
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
