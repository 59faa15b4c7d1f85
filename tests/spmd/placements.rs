//! Every transition between placements gives what one chip has.
//!
//! Contents are small integers: sums over chips are exact in every element type, so nothing here has a tolerance.

use supernode::dtype::{Element, Float};
use supernode::mesh::Mesh;
use supernode::placement::Placement::{self, Partial, Replicate, Shard};
use supernode::placement::{Placements, local_range, local_shape};
use supernode::spmd::{Chip, Device, FromIndex, Sharded, World};
use supernode::{bf16, f16};

/// Element `i` of the tensor that is moved about: an integer that every element type holds.
pub(crate) fn element(i: u64) -> i64 {
    (i * 37 + 11) as i64 % 101
}

/// What chip number `part` of `parts` contributes to element `i` where the tensor is a partial sum.
fn summand(i: u64, part: usize, parts: usize) -> i64 {
    let other = |p: usize| ((i as usize * 7 + p * 13) % 5) as i64 - 2;
    match part {
        0 => element(i) - (1..parts).map(other).sum::<i64>(),
        p => other(p),
    }
}

/// A tensor whose global value is [`element`], placed as said; along partial axes the chips hold different summands.
pub(crate) fn tensor<T: Element>(
    chip: &Chip,
    shape: &[usize],
    from: &Placements,
    number: impl Fn(i64) -> T,
) -> Sharded {
    let axes = chip.mesh().axes().to_vec();
    let partial = axes.iter().zip(from.iter()).filter(|(_, p)| **p == Partial);
    let (part, parts) = partial.fold((0, 1), |(part, parts), (axis, _)| {
        (
            part * axis.size() + chip.coordinate(axis.name()),
            parts * axis.size(),
        )
    });
    chip.input(
        "x",
        shape,
        from,
        &FromIndex(move |i| number(summand(i, part, parts))),
    )
}

/// All lists of `axes` placements of a tensor with `rank` dimensions.
pub(crate) fn all_placements(axes: usize, rank: usize) -> Vec<Placements> {
    let words: Vec<Placement> = (0..rank).map(Shard).chain([Replicate, Partial]).collect();
    let mut lists = vec![Vec::new()];
    for _ in 0..axes {
        let longer = |list: &Vec<Placement>| {
            let list = list.clone();
            words
                .iter()
                .map(move |w| [&list[..], &[*w]].concat())
                .collect::<Vec<_>>()
        };
        lists = lists.iter().flat_map(longer).collect();
    }
    lists.into_iter().map(Placements::from).collect()
}

/// True if every axis that ends as a partial sum began as one.
pub(crate) fn possible(from: &Placements, to: &Placements) -> bool {
    from.iter()
        .zip(to.iter())
        .all(|(a, b)| *b != Partial || *a == Partial)
}

/// What a chip's share of the tensor with elements `value(i)` holds, as numbers.
pub(crate) fn share(
    shape: &[usize],
    placements: &Placements,
    mesh: &Mesh,
    rank: usize,
    value: impl Fn(u64) -> f32,
) -> Vec<f32> {
    let at = mesh.coordinates(rank);
    let ranges: Vec<_> = (0..shape.len())
        .map(|d| local_range(shape, d, placements, mesh, &at))
        .collect();
    let mut indices = vec![0u64];
    for (range, len) in ranges.iter().zip(shape) {
        let next = |i: &u64| {
            range
                .clone()
                .map(|j| i * *len as u64 + j as u64)
                .collect::<Vec<_>>()
        };
        indices = indices.iter().flat_map(next).collect();
    }
    indices.into_iter().map(value).collect()
}

/// Moves tensors of `shape` between all placements on threads, compares shares and traces with the single chip's and
/// the ghost's. Every `stride`-th pair is tried.
fn every_transition<T: Element>(
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
    let adds = T::DTYPE.is_float();
    let pairs = pairs.filter(|(from, to)| possible(from, to) && (adds || !from.contains(&Partial)));
    let pairs: Vec<_> = pairs.step_by(stride).collect();
    assert!(!pairs.is_empty());
    let program = |chip: &Chip| {
        let rank = (0..chip.mesh().chips()).find(|&r| {
            let at = chip.mesh().coordinates(r);
            chip.mesh()
                .axes()
                .iter()
                .zip(at.iter())
                .all(|(axis, c)| chip.coordinate(axis.name()) == *c)
        });
        let rank = rank.expect("a chip has coordinates");
        for (from, to) in &pairs {
            let x = tensor(chip, shape, from, number);
            let y = x.redistribute(*to);
            let sizes = chip.mesh().axes().iter().map(|axis| axis.size());
            let shown = to
                .iter()
                .zip(sizes)
                .map(|(p, n)| if n == 1 { Replicate } else { *p });
            assert_eq!(*y.placements(), shown.collect::<Placements>());
            let here = local_shape(shape, to, chip.mesh(), &chip.mesh().coordinates(rank));
            assert_eq!(y.tensor().shape(), here, "{from} to {to}");
            let whole = y.gather();
            let (Some(y), Some(whole)) = (y.read(), whole.read()) else {
                continue;
            };
            let expect = |i: u64| element(i) as f32;
            if !to.contains(&Partial) {
                let want = share(shape, to, chip.mesh(), rank, expect);
                assert_eq!(
                    y.into_raw_vec_and_offset().0,
                    want,
                    "{from} to {to} on rank {rank} of {}",
                    chip.mesh()
                );
            }
            let want: Vec<f32> = (0..whole.len() as u64).map(expect).collect();
            assert_eq!(
                whole.into_raw_vec_and_offset().0,
                want,
                "{from} to {to} and gathered"
            );
        }
    };
    let run = World::threads(&mesh, Device::cpu())
        .unwrap()
        .with_threads(1)
        .run(program);
    let run = run.unwrap_or_else(|e| panic!("{} {shape:?} on {mesh}: {e}", T::DTYPE));
    let ghost = World::ghost(&mesh)
        .trace(program)
        .expect("a ghost that fits");
    assert_eq!(run.trace().difference(&ghost), None);
    assert_eq!(run.pool_peaks(), ghost.peak_bytes());
}

#[test]
fn one_axis_moves_every_element_type() {
    for mesh in ["x=1", "x=2", "x=3", "x=4"] {
        for shape in [&[5, 7, 3][..], &[8, 4], &[2, 3, 1, 5], &[9]] {
            every_transition(mesh, shape, 1, |x| x as f32);
        }
        every_transition(mesh, &[5, 7, 3], 1, |x| bf16::from_f32(x as f32));
        every_transition(mesh, &[5, 7, 3], 1, |x| <f16 as Float>::from_f32(x as f32));
        every_transition(mesh, &[5, 7, 3], 1, |x| x as u32);
    }
}

#[test]
fn lengths_shorter_than_the_axis_leave_chips_with_nothing() {
    every_transition("x=5", &[2, 3], 1, |x| x as f32);
    every_transition("x=4", &[1, 0, 6], 1, |x| x as f32);
}

#[test]
fn two_axes_move_even_and_uneven_lengths() {
    every_transition("x=2,y=2", &[4, 6, 2], 1, |x| x as f32);
    every_transition("x=2,y=3", &[5, 7, 3], 3, |x| x as f32);
    every_transition("x=3,y=2", &[7, 5], 1, |x| bf16::from_f32(x as f32));
}

#[test]
fn uneven_shares_move_every_length() {
    for mesh in ["x=3:1", "x=1:2:1"] {
        for shape in [&[8, 4, 3][..], &[5, 7], &[2, 3], &[1, 0, 6]] {
            every_transition(mesh, shape, 1, |x| x as f32);
        }
    }
    every_transition("x=3:1,y=2", &[8, 5, 3], 3, |x| x as f32);
    every_transition("x=2,y=1:4", &[10, 7], 1, |x| bf16::from_f32(x as f32));
}

#[test]
fn three_axes_move_even_and_uneven_lengths() {
    every_transition("x=2,y=2,z=2", &[8, 8], 3, |x| x as f32);
    every_transition("x=2,y=2,z=2", &[5, 7, 3], 41, |x| x as f32);
}
