//! The backward of every transition, through the tape: the gradient of a moved tensor is the single chip's, whether its
//! consumers agree (their gradients are the same) or differ by chip (their gradients are summands).
//!
//! As in `placements`, all numbers are small integers and nothing has a tolerance.

use super::placements::{all_placements, element, possible, share, tensor};
use supernode::bf16;
use supernode::dtype::{Element, Float};
use supernode::mesh::Mesh;
use supernode::placement::Placement::{self, Partial, Replicate, Shard};
use supernode::placement::Placements;
use supernode::spmd::{Chip, Device, FromIndex, World};

/// Columns of the matrix that the moved tensor is multiplied by.
const N: usize = 4;

fn w(i: u64) -> i64 {
    (i % 3) as i64 - 1
}

fn c(i: u64) -> i64 {
    (i * 5 % 7) as i64 % 3 - 1
}

/// d loss / d x of `loss = sum(c * (x w))`: element `i` of x is in row `i / k`.
fn gradient(i: u64, k: usize) -> f32 {
    let (row, at) = (i / k as u64, i % k as u64);
    let products = (0..N as u64).map(|n| c(row * N as u64 + n) * w(at * N as u64 + n));
    products.sum::<i64>() as f32
}

/// Where the matrix has to lie for a moved tensor placed `to`. If `differ`, chips that hold the same tensor take
/// different columns.
fn matrix_placement(to: &Placements, rank: usize, differ: bool) -> Placements {
    let one = |p: &Placement| match p {
        Shard(dim) if *dim + 1 == rank => Shard(0),
        Shard(_) | Partial => Replicate,
        Replicate if differ => Shard(1),
        Replicate => Replicate,
    };
    to.iter().map(one).collect()
}

fn every_transpose<T: Element>(
    mesh: &str,
    shape: &[usize],
    stride: usize,
    number: impl Fn(i64) -> T + Sync + Copy,
) {
    let mesh = Mesh::parse(mesh).expect("a mesh");
    let lists = all_placements(mesh.axes().len(), shape.len());
    let pairs = lists
        .iter()
        .flat_map(|from| lists.iter().map(move |to| (from, to)));
    let pairs: Vec<_> = pairs
        .filter(|(from, to)| possible(from, to))
        .step_by(stride)
        .collect();
    let k = *shape.last().expect("a matrix");
    let program = |chip: &Chip| {
        let mut gradients = Vec::new();
        for (from, to) in &pairs {
            for differ in [false, true] {
                let x = tensor(chip, shape, from, number).variable();
                let placed = matrix_placement(to, shape.len(), differ);
                let matrix = chip.input("w", [k, N], &placed, &FromIndex(|i| number(w(i))));
                let loss = chip.record(|| {
                    let y = x.redistribute(*to).matmul(&matrix);
                    let placed: Placements = y.placements().gradient();
                    let c = chip.input("c", y.shape(), &placed, &FromIndex(|i| number(c(i))));
                    y.multiply(&c).sum().gather()
                });
                loss.backward();
                let dx = chip.take_gradient(&x).expect("the loss depends on x");
                assert_eq!(*dx.placements(), x.placements().gradient());
                gradients.push((loss.read(), dx.placements().clone(), dx.read()));
            }
        }
        gradients
    };
    let run = World::threads(&mesh, Device::cpu())
        .unwrap()
        .with_threads(1)
        .run(program);
    let run = run.unwrap_or_else(|e| panic!("{} {shape:?} on {mesh}: {e}", T::DTYPE));
    let rows = shape.iter().product::<usize>() / k;
    let product = |i: u64| element(i) * gradient(i, k) as i64;
    let loss: i64 = (0..(rows * k) as u64).map(product).sum();
    for (rank, gradients) in run.outputs().iter().enumerate() {
        let cases = pairs.iter().flat_map(|pair| [(pair, false), (pair, true)]);
        for (((from, to), differ), (got_loss, placements, dx)) in cases.zip(gradients) {
            let what =
                format!("{from} to {to} (consumers differ: {differ}) on rank {rank} of {mesh}");
            assert_eq!(
                got_loss.as_ref().expect("real chips")[0],
                loss as f32,
                "loss of {what}"
            );
            let want = share(shape, placements, &mesh, rank, |i| gradient(i, k));
            let got = dx.clone().expect("real chips").into_raw_vec_and_offset().0;
            assert_eq!(got, want, "gradient of {what}");
        }
    }
    let ghost = World::ghost(&mesh)
        .trace(program)
        .expect("a ghost that fits");
    assert_eq!(run.trace().difference(&ghost), None);
    assert_eq!(run.pool_peaks(), ghost.peak_bytes());
}

#[test]
fn over_one_axis() {
    for mesh in ["x=1", "x=2", "x=3", "x=5"] {
        every_transpose(mesh, &[5, 7, 3], 1, |x| x as f32);
        every_transpose(mesh, &[4, 6], 1, |x| x as f32);
    }
    every_transpose("x=3", &[5, 7, 3], 1, |x| {
        <bf16 as Float>::from_f32(x as f32)
    });
}

#[test]
fn over_two_axes() {
    every_transpose("x=2,y=2", &[4, 6], 1, |x| x as f32);
    every_transpose("x=2,y=3", &[5, 7, 3], 5, |x| x as f32);
}

#[test]
fn over_three_axes() {
    every_transpose("x=2,y=2,z=2", &[5, 6], 13, |x| x as f32);
}
