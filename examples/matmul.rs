//! Matrix products: straight on ndarray, and as an op on a chip, with gradients.
//!
//! `cargo run --release --example matmul` prints
//!
//! ```text
//! a b   = [[7, 10],
//!  [15, 22]]
//! a b^T = [[5, 11],
//!  [11, 25]]
//! [70, 300] by [300, 50]: every element is that chain: true
//! c[0, 0] is 3.3870866 in f32, 3.359375 in bf16
//! gradient of w:
//! [[-1.7783, -2.1365],
//!  [-2.2067, -2.4843],
//!  [0.6293, 1.3168]]
//! ```

use ndarray::{Array2, ArrayD, array};
use std::fmt::Write;
use supernode::mesh::Mesh;
use supernode::ops::Activation;
use supernode::random::Stream;
use supernode::spmd::{Chip, Device, Init, World};
use supernode::{Result, bf16};

/// An [m, n] matrix of normal numbers, the same on every machine.
pub fn normal(name: &str, shape: (usize, usize)) -> Array2<f32> {
    let stream = Stream::new(0, name);
    Array2::from_shape_fn(shape, |(i, j)| stream.normal((i * shape.1 + j) as u64))
}

/// The loss `sum of gelu(x w + bias)`: the gradient of w.
pub fn program(chip: &Chip) -> Option<ArrayD<f32>> {
    let x = chip.input("x", [5, 3], chip.replicated(), &normal("x", (5, 3)));
    let w = chip.parameter("w", [3, 2], chip.replicated(), Init::normal(1.0));
    let bias = chip.parameter("bias", [2], chip.replicated(), Init::zeros());
    let y = chip.record(|| x.linear(&w, Some(&bias), Some(Activation::GeluErf)));
    y.sum().backward();
    chip.take_gradients()[0].1.read()
}

/// What `main` prints.
pub fn report() -> Result<String> {
    let mut out = String::new();
    let a = array![[1.0f32, 2.0], [3.0, 4.0]];
    let _ = writeln!(out, "a b   = {}", supernode::matmul(&a, &a));
    let _ = writeln!(out, "a b^T = {}", supernode::matmul(&a, &a.t()));

    // An element is one chain of fused multiply-adds over k, whatever the threads and the instruction set.
    let (a, b) = (normal("a", (70, 300)), normal("b", (300, 50)));
    let c = supernode::matmul(&a, &b);
    let chain = |i: usize, j: usize| {
        let products = a.row(i).into_iter().zip(b.column(j));
        products.fold(0.0f32, |sum, (x, y)| x.mul_add(*y, sum))
    };
    let same = c.indexed_iter().all(|((i, j), &x)| x == chain(i, j));
    let _ = writeln!(
        out,
        "[70, 300] by [300, 50]: every element is that chain: {same}"
    );

    // Narrow types are added up in f32 and rounded once.
    let narrow = supernode::matmul(&a.mapv(bf16::from_f32), &b.mapv(bf16::from_f32));
    let _ = writeln!(
        out,
        "c[0, 0] is {} in f32, {} in bf16",
        c[[0, 0]],
        narrow[[0, 0]]
    );

    let run = World::threads(&Mesh::single(), Device::cpu())?.run(program)?;
    let dw = run.outputs()[0].as_ref().expect("a real chip has contents");
    let _ = writeln!(out, "gradient of w:\n{dw:.4}");
    Ok(out)
}

fn main() -> Result<()> {
    print!("{}", report()?);
    Ok(())
}
