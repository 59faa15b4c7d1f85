//! Partial sums over four chips: an all-reduce, its two halves, one that runs beside computation, and the lists behind them.
//!
//! `cargo run --release --example all_reduce` prints
//!
//! ```text
//! sum of rows: [[1.394953, 0.865183, 0.673934, 0.569820, 0.501932, 0.452976]]
//! the same bits in 12 results: true
//! all-reduce over dp: 2 calls, 72 bytes sent by a chip (no algorithm sends less than 72), 36 beside computation
//! reduce-scatter over dp: 1 calls, 18 bytes sent by a chip (no algorithm sends less than 18), 0 beside computation
//! all-gather over dp: 1 calls, 18 bytes sent by a chip (no algorithm sends less than 18), 0 beside computation
//! an all-reduce of 6 elements over 4 chips, as chip 0 does it:
//!   tree: 2 rounds, 6 messages, 8 elements sent
//!   ring: 6 rounds, 6 messages, 9 elements sent
//!   recursive: 4 rounds, 4 messages, 9 elements sent
//! ```

use ndarray::ArrayD;
use std::fmt::Write;
use supernode::Result;
use supernode::collective::{Algorithm, Counts, Kind, schedule};
use supernode::mesh::Mesh;
use supernode::placement::Placement::{Replicate, Shard};
use supernode::spmd::{Chip, Device, FromIndex, World};

/// The sum of the rows of x [8, 6], of which each chip has two: in three ways, and three times the same bits.
pub fn program(chip: &Chip) -> Option<[ArrayD<f32>; 3]> {
    let x = chip.input(
        "x",
        [8, 6],
        [Shard(0)],
        &FromIndex(|i| 1.0 / (i + 1) as f32),
    );
    let ones = chip.input("ones", [1, 8], [Shard(1)], &FromIndex(|_| 1.0f32));
    let y = ones.matmul(&x); // k is split over the chips: y [1, 6] is Partial, a sum still to be made

    let at_once = y.redistribute([Replicate]); // all-reduce
    let in_halves = y.redistribute([Shard(1)]).gather(); // reduce-scatter, then all-gather

    let pending = y.start_redistribute([Replicate]); // on its way while the chip computes something else
    let double = ones.scale(2.0);
    let later = pending.wait();
    drop(double);
    Some([at_once.read()?, in_halves.read()?, later.read()?])
}

/// What `main` prints.
pub fn report() -> Result<String> {
    let mut out = String::new();
    let mesh = Mesh::new([("dp", 4)]);
    let run = World::threads(&mesh, Device::cpu())?.run(program)?;
    let sums: Vec<_> = run.outputs().iter().flatten().flatten().collect();
    let _ = writeln!(out, "sum of rows: {:.6}", sums[0]);
    let _ = writeln!(
        out,
        "the same bits in {} results: {}",
        sums.len(),
        sums.iter().all(|s| *s == sums[0])
    );
    for c in run.trace().collectives() {
        let _ = writeln!(
            out,
            "{} over {}: {} calls, {} bytes sent by a chip (no algorithm sends less than {}), {} beside computation",
            c.op, c.axis, c.calls, c.bytes, c.floor_bytes, c.overlapped_bytes
        );
    }
    let _ = writeln!(
        out,
        "an all-reduce of 6 elements over 4 chips, as chip 0 does it:"
    );
    for algorithm in [Algorithm::Tree, Algorithm::Ring, Algorithm::Recursive] {
        let list = schedule(Kind::AllReduce, algorithm, &Counts::Len(6), 4, 0);
        let (rounds, messages, elements) = (list.rounds(), list.messages(), list.sent_elements());
        let _ = writeln!(
            out,
            "  {algorithm}: {rounds} rounds, {messages} messages, {elements} elements sent"
        );
    }
    Ok(out)
}

fn main() -> Result<()> {
    print!("{}", report()?);
    Ok(())
}
