//! Products through cooperative matrices, of the size and type that an adapter lists, where it gets a first product right.
//!
//! One generation of cards was seen elsewhere to lose sums that cross a loop: the first use on a device multiplies small whole
//! numbers, whose sums are exact, and a device that is wrong by anything multiplies as if it had none.
//!
//! Those of 8 by 8 ran on Mesa 26's software adapter, which lists f16 (`.ci/mesa26`); every form is written as SPIR-V, those of 8 by 8 as
//! Metal's language too (tests/shaders). No card was at hand when this was written.

use super::chip::Chip;
use super::launch::{Launch, Operand};
use super::library as k;
use super::products::Matrix;
use super::shader::Bound;
use crate::dtype::{DType, Element};
use half::f16;

/// Matrices of sums that a subgroup holds, down and across.
const HELD: usize = 4;

/// A size and types of cooperative matrices; sums are in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    /// As an adapter lists it.
    pub(super) listed: &'static str,
    /// Rows and columns of a matrix.
    side: usize,
    /// Type of the operands.
    pub(super) operands: DType,
}

/// What there are kernels for; of several for one type the first that an adapter lists.
pub(super) const FORMS: [Form; 3] = [
    Form {
        listed: "16x16x16 F16*F16+F32",
        side: 16,
        operands: DType::F16,
    },
    // Metal's, on Apple's processors from the M1 and A14 on.
    Form {
        listed: "8x8x8 F16*F16+F32",
        side: 8,
        operands: DType::F16,
    },
    Form {
        listed: "8x8x8 F32*F32+F32",
        side: 8,
        operands: DType::F32,
    },
];

/// Constants of the kernel.
const CONSTANTS: [&str; 6] = ["SIDE", "LOADS", "DOWN", "ACROSS", "A_COLUMNS", "B_COLUMNS"];

impl Form {
    /// Rows and columns of sums of a group of four subgroups.
    pub(super) fn covers(&self) -> usize {
        2 * HELD * self.side
    }

    /// True if sums begin as what is in the result: Metal does not say what a matrix is that nobody wrote.
    fn loads_sums(&self) -> bool {
        self.side == 8
    }

    /// True if the kernel takes such a product.
    pub(super) fn fits(&self, [m, n, k]: [usize; 3], a: &Matrix, b: &Matrix) -> bool {
        let straight = |x: &Matrix| {
            let stride = x.row.max(x.column);
            x.data.dtype == self.operands
                && x.row.min(x.column) == 1
                && stride.is_multiple_of(8)
                && x.batch.is_multiple_of(8)
        };
        let covers = self.covers();
        let whole = m.is_multiple_of(covers) && n.is_multiple_of(covers);
        whole && k > 0 && k.is_multiple_of(self.side) && straight(a) && straight(b)
    }

    /// The kernel's name in a trace.
    pub(super) fn described(&self) -> String {
        let covers = self.covers();
        format!("cooperative matrices {covers}x{covers} of {}", self.listed)
    }
}

impl Form {
    /// What stands in an operand's slot.
    pub(super) fn bound(&self) -> Bound {
        match self.operands {
            DType::F16 => Bound::Halves,
            dtype => Bound::Own(dtype),
        }
    }

    /// The kernel's constant of this name, for operands whose columns, not rows, are consecutive in memory where it says 1.
    pub(super) fn constant(&self, name: &str, columns: [u32; 2]) -> u32 {
        match name {
            "SIDE" => self.side as u32,
            "LOADS" => self.loads_sums() as u32,
            "DOWN" | "ACROSS" => HELD as u32,
            "A_COLUMNS" => columns[0],
            "B_COLUMNS" => columns[1],
            other => panic!("no constant {other} is known here"),
        }
    }
}

/// sums = a b, in f32.
pub(super) fn product(
    form: Form,
    batch: usize,
    [m, n, k]: [usize; 3],
    a: Matrix,
    b: Matrix,
    sums: Operand,
    subgroup: u32,
) {
    let (a_columns, b_columns) = (a.column != 1, b.column != 1);
    if form.loads_sums() {
        super::fill(0.0, None, sums.clone());
    }
    let covers = form.covers();
    let launch = Launch::new(&k::MATMUL_MATRICES)
        .number("m", m)
        .number("n", n)
        .number("k", k)
        .number("a_stride", a.row.max(a.column))
        .number("a_batch", a.batch)
        .number("b_stride", b.row.max(b.column))
        .number("b_batch", b.batch)
        .operand("a", a.data)
        .operand("b", b.data)
        .operand("c", sums);
    let columns = [a_columns as u32, b_columns as u32];
    CONSTANTS
        .iter()
        .fold(launch, |launch, name| {
            launch.constant(name, form.constant(name, columns))
        })
        .run_tiles(4 * subgroup, [n / covers, m / covers, batch]);
}

/// True if a product of small whole numbers comes out exactly, for every layout of the operands.
pub(super) fn are_right(form: Form, chip: &Chip, subgroup: u32) -> bool {
    match form.operands {
        DType::F16 => come_out(form, chip, subgroup, f16::from_f32),
        _ => come_out(form, chip, subgroup, |x| x),
    }
}

fn come_out<T: Element>(form: Form, chip: &Chip, subgroup: u32, number: fn(f32) -> T) -> bool {
    let (k, covers) = (4 * form.side, form.covers());
    let a = |i: usize, p: usize| ((i * 7 + p * 3) % 11) as f32 - 5.0;
    let b = |p: usize, j: usize| ((p * 5 + j * 2) % 9) as f32 - 4.0;
    let put = |rows: usize, columns: usize, f: &dyn Fn(usize, usize) -> f32| {
        let all = (0..rows * columns).map(|x| number(f(x / columns, x % columns)));
        super::table(chip, form.operands, &all.collect::<Vec<_>>())
    };
    let exact: Vec<f32> = (0..covers * covers)
        .map(|x| (0..k).map(|p| a(x / covers, p) * b(p, x % covers)).sum())
        .collect();
    [(false, false), (false, true), (true, false), (true, true)]
        .into_iter()
        .all(|(a_turned, b_turned)| {
            let left = match a_turned {
                false => put(covers, k, &a),
                true => put(k, covers, &|p, i| a(i, p)),
            };
            let right = match b_turned {
                false => put(k, covers, &b),
                true => put(covers, k, &|j, p| b(p, j)),
            };
            let matrix = |data, turned: bool, rows: usize, columns: usize| Matrix {
                data,
                row: if turned { 1 } else { columns },
                column: if turned { rows } else { 1 },
                batch: 0,
            };
            let left = matrix(left, a_turned, covers, k);
            let right = matrix(right, b_turned, k, covers);
            let Ok(block) = chip.allocate(4 * (covers * covers) as u64) else {
                return false;
            };
            let mut got = vec![f32::NAN; covers * covers];
            // Of a product before this one, in the same memory, nothing may be left.
            chip.write(&block, bytemuck::cast_slice(&got));
            let sums = Operand::new(chip, &block, DType::F32, covers * covers);
            let sizes = [covers, covers, k];
            product(form, 1, sizes, left, right, sums, subgroup);
            chip.read(&block, bytemuck::cast_slice_mut(&mut got))
                .is_ok()
                && got == exact
        })
}
