//! Matrix products: straight on ndarray, and as an op on a chip, with gradients.
//!
//! `cargo run --release --example matmul` prints
//!
//! ```text
//! ```

use ndarray::{Array2, ArrayD, array};
use std::fmt::Write;
use supernode::mesh::Mesh;
use supernode::ops::{Activation, Matmul};
use supernode::random::Stream;
use supernode::spmd::{Chip, Device, Init, World};
use supernode::{Result, bf16};

/// An [m, n] matrix of normal numbers, the same on every machine.
pub fn normal(name: &str, shape: (usize, usize)) -> Array2<f32> {
    let stream = Stream::new(0, name);
    Array2::from_shape_fn(shape, |(i, j)| stream.normal((i * shape.1 + j) as u64))
}

/// `y = gelu(x w + bias)` with its loss `sum(y)`: y and the gradient of w.
pub fn program(chip: &Chip) -> Option<(ArrayD<f32>, ArrayD<f32>)> {
    let x = chip.input("x", [5, 3], chip.replicated(), &normal("x", (5, 3)));
    let y = chip.record(|| {
        let w = chip.parameter("w", [3, 2], chip.replicated(), Init::normal(1.0));
        let bias = chip.parameter("bias", [2], chip.replicated(), Init::zeros());
        let op = Matmul {
            bias: true,
            activation: Some(Activation::GeluErf),
            ..Default::default()
        };
        let y = chip.apply_one(op, &[&x, &w, &bias]);
        y.sum().backward();
        y
    });
    let (_, dw) = chip.take_gradients().swap_remove(0);
    Some((y.read()?, dw.read()?))
}

/// What `main` prints.
pub fn report() -> Result<String> {
    let mut out = String::new();
    let a = array![[1.0f32, 2.0], [3.0, 4.0]];
    let _ = writeln!(out, "a b   = {}", supernode::matmul(&a, &a));
    let _ = writeln!(out, "a b^T = {}", supernode::matmul(&a, &a.t()));

    // An element is one chain of fused multiply-adds over k, on any number of threads and any instruction set.
    let (a, b) = (normal("a", (70, 300)), normal("b", (300, 50)));
    let c = supernode::matmul(&a, &b);
    let chain = |i: usize, j: usize| {
        let products = a.row(i).into_iter().zip(b.column(j));
        products.fold(0.0f32, |sum, (x, y)| x.mul_add(*y, sum))
    };
    let same = c.indexed_iter().all(|((i, j), &x)| x == chain(i, j));
    let _ = writeln!(
        out,
        "every element of [70, 300] [300, 50] is that chain: {same}"
    );

    // Narrow types are added up in f32 and rounded once.
    let narrow = supernode::matmul(&a.mapv(bf16::from_f32), &b.mapv(bf16::from_f32));
    let _ = writeln!(
        out,
        "c[0, 0] = {} in f32, {} in bf16",
        c[[0, 0]],
        narrow[[0, 0]]
    );

    let run = World::threads(&Mesh::single(), Device::cpu())?.run(program)?;
    let (y, dw) = run
        .into_outputs()
        .swap_remove(0)
        .expect("a real chip has contents");
    let _ = writeln!(
        out,
        "gelu(x w) is {:?}, its first row {:.4}",
        y.shape(),
        y.index_axis(ndarray::Axis(0), 0)
    );
    let _ = writeln!(out, "gradient of w:\n{dw:.4}");
    Ok(out)
}

fn main() -> Result<()> {
    print!("{}", report()?);
    Ok(())
}
