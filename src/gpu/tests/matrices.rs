//! Products through cooperative matrices, where an adapter lists them (Mesa 26's software one does: `.ci/mesa26`).

use crate::dtype::DType;
use crate::gpu::matrices::{FORMS, Form};
use crate::gpu::{Chip, Matrix, Operand, table};
use crate::random::Stream;
use half::f16;

/// Elements of size 1, rounded to the form's type.
fn elements(form: &Form, name: &str, n: usize) -> Vec<f32> {
    let stream = Stream::new(3, name);
    let narrow = |x: f32| match form.operands {
        DType::F16 => f16::from_f32(x).to_f32(),
        _ => x,
    };
    (0..n as u64)
        .map(|i| narrow(2.0 * stream.uniform(i) - 1.0))
        .collect()
}

fn put(chip: &Chip, form: &Form, x: &[f32]) -> Operand {
    match form.operands {
        DType::F16 => {
            let halves: Vec<f16> = x.iter().map(|&x| f16::from_f32(x)).collect();
            table(chip, DType::F16, &halves)
        }
        _ => table(chip, DType::F32, x),
    }
}

/// One product with both operands lying by rows or by columns, against f64.
fn one(
    chip: &Chip,
    form: Form,
    subgroup: u32,
    batch: usize,
    [m, n, k]: [usize; 3],
    turned: [bool; 2],
) {
    let a = elements(&form, "a", batch * m * k);
    let b = elements(&form, "b", batch * k * n);
    let of = |data, turned: bool, rows: usize, columns: usize| Matrix {
        data,
        row: if turned { 1 } else { columns },
        column: if turned { rows } else { 1 },
        batch: rows * columns,
    };
    let left = of(put(chip, &form, &a), turned[0], m, k);
    let right = of(put(chip, &form, &b), turned[1], k, n);
    assert!(form.fits([m, n, k], &left, &right), "{m} {n} {k}");
    let block = chip.allocate(4 * (batch * m * n) as u64).expect("memory");
    let mut got = vec![f32::NAN; batch * m * n];
    chip.write(&block, bytemuck::cast_slice(&got));
    let sums = Operand::new(chip, &block, DType::F32, batch * m * n);
    crate::gpu::matrices::product(form, batch, [m, n, k], left, right, sums, subgroup);
    chip.read(&block, bytemuck::cast_slice_mut(&mut got))
        .expect("it is read");
    let at = |turned: bool, rows: usize, columns: usize, i: usize, j: usize| match turned {
        false => i * columns + j,
        true => j * rows + i,
    };
    for (i, got) in got.iter().enumerate() {
        let (s, i, j) = (i / (m * n), i / n % m, i % n);
        let (mut sum, mut size) = (0.0, 0.0);
        for p in 0..k {
            let x = f64::from(a[s * m * k + at(turned[0], m, k, i, p)]);
            let y = f64::from(b[s * k * n + at(turned[1], k, n, p, j)]);
            (sum, size) = (sum + x * y, size + (x * y).abs());
        }
        // Products of f16 are exact in f32; a device sums them in any order.
        let bound = (k + 2) as f64 * f64::from(f32::EPSILON) * size;
        let error = (f64::from(*got) - sum).abs();
        assert!(
            error <= bound,
            "{form:?} {turned:?} [{s}, {i}, {j}]: {got}, not {sum}"
        );
    }
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn products_of_every_layout_edge_and_batch() {
    let Ok(chip) = Chip::open_alone(0) else {
        return;
    };
    let mut forms = 0;
    for form in FORMS {
        let Some(subgroup) = chip.device().matrices(&form) else {
            continue;
        };
        forms += 1;
        let covers = form.covers();
        let side = covers / 8;
        for turned in [[false, false], [false, true], [true, false], [true, true]] {
            for (batch, shape) in [
                (1, [covers, covers, side]),
                (1, [covers, 2 * covers, 3 * side]),
                (3, [2 * covers, covers, 5 * side]),
                (2, [covers, covers, 16 * side]),
            ] {
                one(&chip, form, subgroup, batch, shape, turned);
            }
        }
    }
    let listed = &chip.device().about.matrices;
    println!("{forms} form(s) of cooperative matrices ran, of {listed:?}");
    assert!(
        forms > 0 || std::env::var_os("SUPERNODE_REQUIRE_MATRICES").is_none(),
        "SUPERNODE_REQUIRE_MATRICES is set, and {} has none of {FORMS:?}: {listed:?}",
        chip.device().about
    );
}
