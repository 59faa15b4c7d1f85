//! Attention: straight on ndarray, and with its heads split over two chips, where nothing has to be sent.
//!
//! `cargo run --release --example attention` prints
//!
//! ```text
//! the first token sees only itself, its o is its v: true
//! Full, third token: [0.2686, 0.2677, -0.9678, 0.1833]
//! Causal, third token: [0.6210, -0.1147, -0.6136, 0.6046]
//! Window(2), third token: [0.5612, -0.1805, -0.6314, 0.6375]
//! each of two chips computes [1, 6, 2, 8] of [1, 6, 4, 8]
//! gathered, they are the kernel's bits: true
//! all-gather over tp: 384 bytes sent by a chip
//! ```

use ndarray::{Array4, ArrayD, s};
use std::fmt::Write;
use supernode::mesh::Mesh;
use supernode::ops::Attention;
use supernode::placement::Placement::Shard;
use supernode::random::Stream;
use supernode::spmd::{Chip, Device, World};
use supernode::{Mask, Result};

/// One sequence of six tokens [b, t, h, d]; four query heads share two key heads.
pub fn operand(name: &str, heads: usize) -> Array4<f32> {
    let numbers = Stream::new(0, name);
    let index = |t, h, d| ((t * heads + h) * 8 + d) as u64;
    Array4::from_shape_fn((1, 6, heads, 8), |(_, t, h, d)| {
        numbers.normal(index(t, h, d))
    })
}

/// Causal attention, heads split over tp: this chip's heads of the result, and all of them.
pub fn program(chip: &Chip) -> Option<[ArrayD<f32>; 2]> {
    let input = |name, heads| {
        let placement = chip.placed(&[("tp", Shard(2))]);
        chip.input(name, [1, 6, heads, 8], placement, &operand(name, heads))
    };
    let (q, k, v) = (input("q", 4), input("k", 2), input("v", 2));
    let (causal, others) = (true, Attention::default());
    let o = chip.apply_one(Attention { causal, ..others }, &[&q, &k, &v]);
    let all = o.gather();
    Some([o.read()?, all.read()?])
}

/// What `main` prints.
pub fn report() -> Result<String> {
    let mut out = String::new();
    // The kernel takes [b, h, t, d]; a permuted array is read where it lies.
    let by_heads = |name, heads| operand(name, heads).permuted_axes([0, 2, 1, 3]);
    let (q, k, v) = (by_heads("q", 4), by_heads("k", 2), by_heads("v", 2));
    let o = supernode::attention(&q, &k, &v, Mask::Causal);
    let first = o.slice(s![0, 3, 0, ..]) == v.slice(s![0, 1, 0, ..]);
    let _ = writeln!(
        out,
        "the first token sees only itself, its o is its v: {first}"
    );
    for mask in [Mask::Full, Mask::Causal, Mask::Window(2)] {
        let o = supernode::attention(&q, &k, &v, mask);
        let _ = writeln!(
            out,
            "{mask:?}, third token: {:.4}",
            o.slice(s![0, 0, 2, ..4])
        );
    }

    let run = World::threads(&Mesh::new([("tp", 2)]), Device::cpu())?.run(program)?;
    let [mine, all] = run.outputs()[0].as_ref().expect("real chips have contents");
    let same = all.view().permuted_axes(vec![0, 2, 1, 3]) == o.view().into_dyn();
    let _ = writeln!(
        out,
        "each of two chips computes {:?} of {:?}",
        mine.shape(),
        all.shape()
    );
    let _ = writeln!(out, "gathered, they are the kernel's bits: {same}");
    for c in run.trace().collectives() {
        let _ = writeln!(
            out,
            "{} over {}: {} bytes sent by a chip",
            c.op, c.axis, c.bytes
        );
    }
    Ok(out)
}

fn main() -> Result<()> {
    print!("{}", report()?);
    Ok(())
}
