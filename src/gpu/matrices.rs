//! Products of f16 through cooperative matrices, where an adapter has them and gets a first product right.
//!
//! One generation of cards was seen elsewhere to lose sums that cross a loop: the first use on a device multiplies small whole
//! numbers, whose sums are exact, and a device that is wrong by anything multiplies as if it had none. No such device was at hand
//! when this was written: naga holds the shader valid, and nothing more is known of it.

use super::chip::Chip;
use super::launch::{Launch, Operand};
use super::library as k;
use super::products::Matrix;
use crate::dtype::DType;
use half::f16;

/// Rows and columns of a matrix.
const SIDE: usize = 16;
/// Matrices of sums that a subgroup holds, down and across.
const HELD: usize = 4;
/// Rows and columns of sums of a group of four subgroups.
const COVERS: usize = 2 * HELD * SIDE;
/// What an adapter must list.
pub(super) const LISTED: &str = "16x16x16 F16*F16+F32";

/// True if the kernel takes such a product.
pub(super) fn fit([m, n, k]: [usize; 3], a: &Matrix, b: &Matrix) -> bool {
    let halves = |x: &Matrix| {
        let stride = x.row.max(x.column);
        x.data.dtype == DType::F16
            && x.row.min(x.column) == 1
            && stride.is_multiple_of(8)
            && x.batch.is_multiple_of(8)
    };
    let whole = m.is_multiple_of(COVERS) && n.is_multiple_of(COVERS) && k.is_multiple_of(SIDE);
    whole && k > 0 && halves(a) && halves(b)
}

/// The kernel's name in a trace.
pub(super) fn described() -> String {
    format!("cooperative matrices {COVERS}x{COVERS} of {LISTED}")
}

/// sums = a b, in f32.
pub(super) fn product(
    batch: usize,
    [m, n, k]: [usize; 3],
    a: Matrix,
    b: Matrix,
    sums: Operand,
    subgroup: u32,
) {
    let (a_columns, b_columns) = (a.column != 1, b.column != 1);
    Launch::new(&k::MATMUL_MATRICES)
        .number("m", m)
        .number("n", n)
        .number("k", k)
        .number("a_stride", a.row.max(a.column))
        .number("a_batch", a.batch)
        .number("b_stride", b.row.max(b.column))
        .number("b_batch", b.batch)
        .operand("a", a.data)
        .operand("b", b.data)
        .operand("c", sums)
        .constant("SIDE", SIDE as u32)
        .constant("DOWN", HELD as u32)
        .constant("ACROSS", HELD as u32)
        .constant("A_COLUMNS", a_columns as u32)
        .constant("B_COLUMNS", b_columns as u32)
        .run_tiles(4 * subgroup, [n / COVERS, m / COVERS, batch]);
}

/// True if a product of small whole numbers comes out exactly, for every layout of the operands.
pub(super) fn are_right(chip: &Chip, subgroup: u32) -> bool {
    const K: usize = 4 * SIDE;
    let a = |i: usize, p: usize| ((i * 7 + p * 3) % 11) as f32 - 5.0;
    let b = |p: usize, j: usize| ((p * 5 + j * 2) % 9) as f32 - 4.0;
    let put = |rows: usize, columns: usize, f: &dyn Fn(usize, usize) -> f32| {
        let all = (0..rows * columns).map(|x| f16::from_f32(f(x / columns, x % columns)));
        super::table(chip, DType::F16, &all.collect::<Vec<_>>())
    };
    let exact: Vec<f32> = (0..COVERS * COVERS)
        .map(|x| (0..K).map(|p| a(x / COVERS, p) * b(p, x % COVERS)).sum())
        .collect();
    [(false, false), (false, true), (true, false), (true, true)]
        .into_iter()
        .all(|(a_turned, b_turned)| {
            let left = match a_turned {
                false => put(COVERS, K, &a),
                true => put(K, COVERS, &|p, i| a(i, p)),
            };
            let right = match b_turned {
                false => put(K, COVERS, &b),
                true => put(COVERS, K, &|j, p| b(p, j)),
            };
            let matrix = |data, turned: bool, rows: usize, columns: usize| Matrix {
                data,
                row: if turned { 1 } else { columns },
                column: if turned { rows } else { 1 },
                batch: 0,
            };
            let left = matrix(left, a_turned, COVERS, K);
            let right = matrix(right, b_turned, K, COVERS);
            let Ok(block) = chip.allocate(4 * (COVERS * COVERS) as u64) else {
                return false;
            };
            let sums = Operand::new(chip, &block, DType::F32, COVERS * COVERS);
            product(1, [COVERS, COVERS, K], left, right, sums, subgroup);
            let mut got = vec![f32::NAN; COVERS * COVERS];
            chip.read(&block, bytemuck::cast_slice_mut(&mut got))
                .is_ok()
                && got == exact
        })
}
