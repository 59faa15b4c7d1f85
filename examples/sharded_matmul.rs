//! A sharded product, run on four chips of this machine, then traced on 1024 chips that nobody has.
//!
//! `cargo run --release --example sharded_matmul` prints
//!
//! ```text
//! dp=2,tp=2: [512, 3072], bit for bit what one chip gives: true
//! 4 chips (dp=2,tp=2), world threads:
//!   all-gather over tp: each chip sends 1572864 bytes
//!   all-gather over dp: each chip sends 3145728 bytes
//!   peak memory of a chip: 16515072 bytes
//! 1024 chips (dp=64,tp=16), world ghost:
//!   all-gather over tp: each chip sends 92160 bytes
//!   all-gather over dp: each chip sends 6193152 bytes
//!   peak memory of a chip: 7010304 bytes
//! ```

use std::fmt::Write;
use supernode::Result;
use supernode::mesh::Mesh;
use supernode::placement::Placement::{Replicate, Shard};
use supernode::random::Stream;
use supernode::spmd::{Chip, Device, FromIndex, Init, Sharded, World};

/// The program: what each chip of a mesh of `dp` and `tp` does.
pub fn program(chip: &Chip) -> Sharded {
    let numbers = Stream::new(0, "batch");
    let batch = FromIndex(|i| numbers.normal(i));
    let x = chip.input("x", [512, 768], [Shard(0), Replicate], &batch); // one placement per mesh axis
    let w = chip.parameter("w", [768, 3072], [Replicate, Shard(1)], Init::normal(0.02));
    let y = x.matmul(&w); // [Shard(0), Shard(1)]: nothing sent
    y.gather() // an all-gather per axis, seen in the trace
}

/// Runs the program for real: the product that the first chip holds at the end, and the trace.
pub fn run(mesh: &Mesh) -> Result<(ndarray::ArrayD<f32>, supernode::trace::Trace)> {
    let world = World::threads(mesh, Device::cpu())?;
    let run = world.run(|chip| program(chip).read().expect("real chips have contents"))?;
    let trace = run.trace().clone();
    Ok((run.into_outputs().swap_remove(0), trace))
}

/// What `main` prints.
pub fn report() -> Result<String> {
    let mut out = String::new();
    let mesh = Mesh::new([("dp", 2), ("tp", 2)]);
    let (four, trace) = run(&mesh)?;
    let (one, _) = run(&Mesh::new([("dp", 1), ("tp", 1)]))?;
    let _ = writeln!(
        out,
        "{mesh}: {:?}, bit for bit what one chip gives: {}",
        four.shape(),
        four == one
    );

    let large = Mesh::new([("dp", 64), ("tp", 16)]);
    let ghost = World::ghost(&large).trace(program)?;
    for trace in [&trace, &ghost] {
        let _ = writeln!(
            out,
            "{} chips ({}), world {}:",
            trace.mesh.chips(),
            trace.mesh,
            trace.world
        );
        for c in trace.collectives() {
            let _ = writeln!(
                out,
                "  {} over {}: each chip sends {} bytes",
                c.op, c.axis, c.bytes
            );
        }
        let _ = writeln!(
            out,
            "  peak memory of a chip: {} bytes",
            trace.peak_bytes()[0]
        );
    }
    Ok(out)
}

fn main() -> Result<()> {
    print!("{}", report()?);
    Ok(())
}
