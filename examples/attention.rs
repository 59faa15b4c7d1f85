//! Attention: straight on ndarray, and with its heads split over two chips, where nothing has to be sent.
//!
//! `cargo run --release --example attention` prints
//!
//! ```text
//! ```

use ndarray::{Array4, ArrayD, s};
use std::fmt::Write;
use supernode::mesh::Mesh;
use supernode::ops::Attention;
use supernode::placement::Placement::Shard;
use supernode::random::Stream;
use supernode::spmd::{Chip, Device, World};
use supernode::{Mask, Result};

/// One sequence of six tokens: four query heads of eight elements share two key heads. [b, t, h, d]
pub fn operand(name: &str) -> Array4<f32> {
    let (t, h, d) = (6, if name == "q" { 4 } else { 2 }, 8);
    let stream = Stream::new(0, name);
    Array4::from_shape_fn((1, t, h, d), |(_, t, i, j)| {
        stream.normal(((t * h + i) * d + j) as u64)
    })
}

/// Causal attention, heads split over tp: this chip's heads of the result, and all of them.
pub fn program(chip: &Chip) -> Option<(ArrayD<f32>, ArrayD<f32>)> {
    let heads = chip.placed(&[("tp", Shard(2))]);
    let input = |name| {
        let contents = operand(name);
        chip.input(name, contents.shape(), &heads, &contents)
    };
    let (q, k, v) = (input("q"), input("k"), input("v"));
    let op = Attention {
        causal: true,
        ..Default::default()
    };
    let o = chip.apply_one(op, &[&q, &k, &v]);
    let mine = o.read();
    Some((mine?, o.gather().read()?))
}

/// What `main` prints.
pub fn report() -> Result<String> {
    let mut out = String::new();
    // Kernels on ndarray take [b, h, t, d]; a permuted view is read where it lies.
    let [q, k, v] = ["q", "k", "v"].map(operand);
    let by_heads = |x: &Array4<f32>| x.clone().permuted_axes([0, 2, 1, 3]);
    let (q, k, v) = (by_heads(&q), by_heads(&k), by_heads(&v));
    let o = supernode::attention(&q, &k, &v, Mask::Causal);
    let _ = writeln!(
        out,
        "q {:?}, k and v {:?}, o {:?}",
        q.shape(),
        k.shape(),
        o.shape()
    );
    let first = o.slice(s![0, 3, 0, ..]) == v.slice(s![0, 1, 0, ..]);
    let _ = writeln!(
        out,
        "the first token sees itself alone, so its o is its v: {first}"
    );
    for mask in [Mask::Full, Mask::Causal, Mask::Window(2)] {
        let o = supernode::attention(&q, &k, &v, mask);
        let _ = writeln!(
            out,
            "{mask:?}: o of the last token starts {:.4}",
            o.slice(s![0, 0, 5, ..4])
        );
    }

    let mesh = Mesh::new([("tp", 2)]);
    let run = World::threads(&mesh, Device::cpu())?.run(program)?;
    let (mine, all) = run.outputs()[0].as_ref().expect("real chips have contents");
    let same = all.view().permuted_axes(vec![0, 2, 1, 3]) == o.view().into_dyn();
    let _ = writeln!(
        out,
        "each chip holds {:?} of {:?}; gathered, bit for bit the same: {same}",
        mine.shape(),
        all.shape()
    );
    for c in run.trace().collectives() {
        let _ = writeln!(
            out,
            "sent: {} over {}, {} bytes by each chip",
            c.op, c.axis, c.bytes
        );
    }
    Ok(out)
}

fn main() -> Result<()> {
    print!("{}", report()?);
    Ok(())
}
