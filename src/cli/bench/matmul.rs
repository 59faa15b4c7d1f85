//! Matrix products, with either operand stored transposed, in batches or alone.

use super::cases::one;
use super::measure::{Demand, Measured, measure};
use super::operands::{Call, U, normal, numbers, some_of, stored};
use serde::Deserialize;
use std::fmt;
use std::num::NonZeroUsize;
use std::time::Duration;
use supernode::DType;
use supernode::dtype::Slice;
use supernode::ops::Matmul;
use supernode::random::Stream;
use supernode::reference::{assert_product, assert_within, matmul, product_bound};
use supernode::spmd::Chip;
use supernode::tensor::Tensor;

/// How the operands are stored: each as it is (n) or transposed (t).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Layout {
    #[default]
    Nn,
    Nt,
    Tn,
    Tt,
}

impl Layout {
    fn transposed(self) -> [bool; 2] {
        [
            matches!(self, Layout::Tn | Layout::Tt),
            matches!(self, Layout::Nt | Layout::Tt),
        ]
    }
}

/// `batch` products of [m, k] by [k, n], which give [m, n] in the operands' type.
#[derive(Debug, Deserialize)]
pub(super) struct Product {
    m: NonZeroUsize,
    k: NonZeroUsize,
    n: NonZeroUsize,
    #[serde(default = "one")]
    batch: NonZeroUsize,
    #[serde(default)]
    layout: Layout,
}

impl fmt::Display for Product {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let layout = format!("{:?}", self.layout).to_lowercase();
        let sizes = format!("{}x{}x{} {layout}", self.m, self.k, self.n);
        match self.batch.get() {
            1 => write!(f, "{sizes}"),
            batch => write!(f, "{batch} of {sizes}"),
        }
    }
}

impl Product {
    fn sizes(&self) -> [usize; 4] {
        [self.batch, self.m, self.k, self.n].map(NonZeroUsize::get)
    }

    /// A sentence if the case cannot be run.
    pub(super) fn check(&self) -> Result<(), String> {
        let [batch, m, k, n] = self.sizes();
        let most = isize::MAX as usize / 8;
        let fits = |rows: usize, cols: usize| {
            let elements = rows.checked_mul(cols).and_then(|e| e.checked_mul(batch));
            elements.is_some_and(|e| e <= most)
        };
        match fits(m, k) && fits(k, n) && fits(m, n) {
            true => Ok(()),
            false => Err(format!("{self} is too large for this machine's addresses")),
        }
    }

    pub(super) fn run(&self, chip: &Chip, dtype: DType) -> Measured {
        let [batch, m, k, n] = self.sizes();
        let [transpose_a, transpose_b] = self.layout.transposed();
        let op = Matmul {
            transpose_a,
            transpose_b,
            ..Matmul::default()
        };
        let operand = |name: &str, rows: usize, cols: usize, transposed: bool| {
            let matrix = if transposed {
                [cols, rows]
            } else {
                [rows, cols]
            };
            let shape = [&[batch][..], &matrix].concat();
            normal(chip, name, &shape[(batch == 1) as usize..], dtype)
        };
        let a = operand("a", m, k, transpose_a);
        let b = operand("b", k, n, transpose_b);
        let mut call = Call::new(chip, &op, vec![&a, &b]);
        call.forward();
        self.verify(&a, &b, &call.outputs[0]);
        let [reads, writes] = call.bytes();
        let demand = Demand {
            flops: 2.0 * [batch, m, k, n].map(|x| x as f64).iter().product::<f64>(),
            reads,
            writes,
            dtype,
            budget: Duration::from_secs(1),
        };
        measure(chip, &demand, || call.forward())
    }

    /// Every row by Freivalds' check, which shows whatever is wrong by more than a row's rounding, and some elements against
    /// the textbook, each by its own bound.
    fn verify(&self, a: &Tensor, b: &Tensor, c: &Tensor) {
        let [batch, m, k, n] = self.sizes();
        let [transpose_a, transpose_b] = self.layout.transposed();
        let stream = Stream::new(2, "freivalds");
        for i in 0..batch {
            let a = by_rows(a, i, [m, k], transpose_a);
            let b = by_rows(b, i, [k, n], transpose_b);
            let at = i * m * n..(i + 1) * m * n;
            match c.slice() {
                Slice::F32(c) => assert_product([m, n, k], &a, &b, &c[at], U, &stream),
                Slice::Bf16(c) => assert_product([m, n, k], &a, &b, &c[at], U, &stream),
                Slice::F16(c) => assert_product([m, n, k], &a, &b, &c[at], U, &stream),
                Slice::U32(_) => unreachable!("cases compute on floats"),
            }
            if i == 0 || i == batch - 1 {
                self.verify_elements(&a, &b, c, i);
            }
        }
    }

    fn verify_elements(&self, a: &[f32], b: &[f32], c: &Tensor, i: usize) {
        let [_, m, k, n] = self.sizes();
        let (rows, cols) = (some_of(m, "rows"), some_of(n, "columns"));
        let sizes = [rows.len(), cols.len(), k];
        let a: Vec<f64> = rows
            .iter()
            .flat_map(|r| &a[r * k..(r + 1) * k])
            .map(|&x| x.into())
            .collect();
        let b: Vec<f64> = (0..k)
            .flat_map(|p| cols.iter().map(move |j| b[p * n + j].into()))
            .collect();
        let got: Vec<f64> = rows
            .iter()
            .flat_map(|r| cols.iter().map(move |j| (i * m + r) * n + j))
            .flat_map(|at| numbers(c, at, 1))
            .collect();
        let want = matmul(sizes, &a, &b);
        let bound = product_bound(sizes, &a, &b, U);
        assert_within("matmul", &got, &want, &stored(c.dtype(), &want, bound));
    }
}

/// Matrix i of `x`, rows by columns, however it is stored; widening changes no element.
fn by_rows(x: &Tensor, i: usize, [rows, cols]: [usize; 2], transposed: bool) -> Vec<f32> {
    let x = numbers(x, i * rows * cols, rows * cols);
    let element = |at: usize| match transposed {
        true => x[at % cols * rows + at / cols],
        false => x[at],
    };
    (0..rows * cols).map(|at| element(at) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use supernode::mesh::Mesh;
    use supernode::spmd::{Device, World};

    /// What verification says of a product of which one element was changed by `wrong`.
    fn verdict(layout: Layout, wrong: f32) -> Result<(), String> {
        let [m, k, n, batch] = [5, 9, 7, 2].map(|x| NonZeroUsize::new(x).unwrap());
        let product = Product {
            m,
            k,
            n,
            batch,
            layout,
        };
        let [transpose_a, transpose_b] = layout.transposed();
        let op = Matmul {
            transpose_a,
            transpose_b,
            ..Matmul::default()
        };
        let shape = |rows, cols, t| if t { [2, cols, rows] } else { [2, rows, cols] };
        let world = World::threads(&Mesh::single(), Device::cpu()).unwrap();
        let run = world.run(|chip| {
            let a = normal(chip, "a", &shape(5, 9, transpose_a), DType::F32);
            let b = normal(chip, "b", &shape(9, 7, transpose_b), DType::F32);
            let mut call = Call::new(chip, &op, vec![&a, &b]);
            call.forward();
            call.outputs[0].slice_mut().typed::<f32>()[50] += wrong;
            product.verify(&a, &b, &call.outputs[0]);
        });
        run.map(drop).map_err(|e| e.to_string())
    }

    #[test]
    fn wrong_products_are_found() {
        for layout in [Layout::Nn, Layout::Nt, Layout::Tn, Layout::Tt] {
            assert_eq!(verdict(layout, 0.0), Ok(()), "{layout:?}");
            for wrong in [1e-2, f32::NAN] {
                let why = verdict(layout, wrong).unwrap_err();
                assert!(why.contains("off by"), "{layout:?} {wrong}: {why}");
            }
        }
    }
}
