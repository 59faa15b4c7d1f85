//! Matmul on grids of chips: the same numbers from wherever operands lie to wherever the result shall, forward and backward,
//! and as many elements sent as were foreseen.

use crate::tiny;
use supernode::mesh::Mesh;
use supernode::placement::Placement::{Replicate, Shard};
use supernode::placement::Placements;
use supernode::spmd::{Chip, FromIndex, Grid, World};

const M: usize = 12;
const N: usize = 10;
const K: usize = 14;

/// All placements without partial sums on a mesh of so many axes.
fn all(axes: usize) -> Vec<Placements> {
    let choices = [Replicate, Shard(0), Shard(1)];
    let digits = |i: usize| (0..axes).map(move |x| choices[i / 3usize.pow(x as u32) % 3]);
    (0..3usize.pow(axes as u32))
        .map(|i| digits(i).collect())
        .collect()
}

/// The product and both gradients, whole. Small integers: every order of sums is exact.
fn product(chip: &Chip, placed: [&Placements; 3]) -> Vec<Option<Vec<f32>>> {
    let small = |seed: u64| FromIndex(move |i| ((i * 7 + seed) % 5) as f32 - 2.0);
    let a = chip.input("a", [M, K], placed[0], &small(1)).variable();
    let b = chip.input("b", [K, N], placed[1], &small(2)).variable();
    let weight = chip.input("weight", [M, N], placed[2], &small(3));
    let mut product = None;
    let loss = chip.record(|| {
        let c = a.matmul_to(&b, placed[2]);
        assert_eq!(c.placements(), placed[2]);
        product = Some(c.detach());
        c.multiply(&weight).sum().gather()
    });
    loss.backward();
    let gradients = [&a, &b].map(|x| chip.take_gradient(x).expect("a gradient"));
    let whole = [
        product.expect("a product"),
        gradients[0].clone(),
        gradients[1].clone(),
    ];
    let read = whole.map(|x| x.gather().read().map(|x| x.iter().copied().collect()));
    read.into()
}

#[test]
fn every_placement_gives_the_same_product_and_gradients() {
    let single = tiny::world(&Mesh::single()).run(|chip| {
        let p = chip.replicated();
        product(chip, [&p, &p, &p])
    });
    let single = single.expect("one chip").outputs()[0].clone();
    for mesh in ["x=2", "x=3", "x=2,y=2"] {
        let mesh = Mesh::parse(mesh).expect("a mesh");
        let placed = all(mesh.axes().len());
        // Every pair of operands' placements, each with one of the result's.
        for (i, a) in placed.iter().enumerate() {
            for (j, b) in placed.iter().enumerate() {
                let to = &placed[(i + 2 * j) % placed.len()];
                let program = |chip: &Chip| product(chip, [a, b, to]);
                let what = format!("{a} by {b} to {to} on {mesh}");
                let run = tiny::world(&mesh).run(program);
                let run = run.unwrap_or_else(|e| panic!("{what}: {e}"));
                assert!(run.outputs().iter().all(|o| *o == single), "{what}");
                let ghost = World::ghost(&mesh)
                    .trace(program)
                    .expect("a program that runs");
                assert_eq!(run.trace().difference(&ghost), None, "{what}");
            }
        }
    }
}

#[test]
fn what_is_sent_is_what_was_foreseen() {
    let mesh = Mesh::new([("x", 2), ("y", 2)]);
    let p = Placements::from([Shard(0), Shard(1)]);
    let grid = Grid::choose((&[M, 2 * K], &p), (&[2 * K, N], &p), &p, &mesh).expect("a grid");
    let trace = World::ghost(&mesh).trace(|chip| {
        let ones = FromIndex(|_| 1.0f32);
        let a = chip.input("a", [M, 2 * K], &p, &ones);
        a.matmul_to(&chip.input("b", [2 * K, N], &p, &ones), &p);
    });
    let trace = trace.expect("a program that runs");
    let sent = |rank| {
        trace
            .chip(rank)
            .collectives
            .iter()
            .map(|c| c.bytes)
            .sum::<u64>()
    };
    assert_eq!((0..4).map(sent).sum::<u64>() as u128, 4 * grid.sent);
}
