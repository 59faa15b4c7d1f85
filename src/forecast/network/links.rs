//! What a level's wiring leaves of a chip's bandwidth for a group of `n` members, `stride` chips apart.
//!
//! | wiring | a group has |
//! |---|---|
//! | switch, Clos | all of it |
//! | full mesh of N, or of `shape` a x b x .. with links to all others along each dimension | the links among its members: (n-1)/(N-1) |
//! | torus of `shape` | the rings along the dimensions that it spans; rings that lie between each other on one dimension share its links |
//!
//! An all-to-all over several dimensions passes chips on its way: the mean number of hops divides the bandwidth. A level without a
//! shape has one dimension.

use crate::cluster::{Level, Wiring};
use crate::collective::Kind;

/// Bytes a second between two chips that are far from each other.
pub(super) fn pair(level: &Level) -> f64 {
    match level.wiring {
        Wiring::FullMesh => level.bandwidth / mesh_links(&level.shape),
        // One direction of one dimension.
        Wiring::Torus => level.bandwidth / (2 * level.shape.len()) as f64,
        _ => level.bandwidth,
    }
}

/// Bytes a second of a member of a group.
pub(super) fn group(level: &Level, kind: Kind, n: usize, stride: usize) -> f64 {
    let (dimensions, between) = spanned(&level.shape, n, stride);
    match level.wiring {
        Wiring::FullMesh => {
            let used: usize = dimensions.iter().map(|d| d - 1).sum();
            let share = used as f64 / mesh_links(&level.shape);
            let hops: f64 = dimensions.iter().map(|d| 1.0 - 1.0 / *d as f64).sum();
            level.bandwidth * share / passing(kind, hops)
        }
        Wiring::Torus => {
            let share = dimensions.len() as f64 / level.shape.len() as f64;
            let hops: f64 = dimensions.iter().map(|d| (*d as f64 / 4.0).max(1.0)).sum();
            level.bandwidth * share / between as f64 / passing(kind, hops)
        }
        _ => level.bandwidth,
    }
}

/// Only an all-to-all passes through chips that it is not meant for.
fn passing(kind: Kind, hops: f64) -> f64 {
    match kind {
        Kind::AllToAll => hops.max(1.0),
        _ => 1.0,
    }
}

fn mesh_links(shape: &[usize]) -> f64 {
    shape.iter().map(|d| d - 1).sum::<usize>().max(1) as f64
}

/// Members along each dimension that a group spans, and how many such groups lie between each other on one dimension.
fn spanned(shape: &[usize], n: usize, stride: usize) -> (Vec<usize>, usize) {
    let (mut left, mut skip) = (n, stride);
    let (mut dimensions, mut between) = (Vec::new(), 1);
    for d in shape {
        if skip >= *d {
            skip = skip.div_ceil(*d);
            continue;
        }
        let along = (d / skip).min(left).max(1);
        if along > 1 {
            dimensions.push(along);
            between = between.max(skip);
        }
        left = left.div_ceil(along);
        skip = 1;
    }
    if dimensions.is_empty() {
        dimensions.push(n.max(2));
    }
    (dimensions, between)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn level(wiring: Wiring, shape: &[usize]) -> Level {
        Level {
            name: "node".into(),
            wiring,
            chips: shape.iter().product(),
            bandwidth: 12.0,
            latency: 1e-6,
            shape: shape.to_vec(),
            reduces: false,
            shared: false,
        }
    }

    #[test]
    fn a_full_mesh_gives_the_links_among_members() {
        let mesh = level(Wiring::FullMesh, &[4]);
        assert_eq!(group(&mesh, Kind::AllReduce, 4, 1), 12.0);
        assert_eq!(group(&mesh, Kind::AllReduce, 2, 2), 4.0);
        assert_eq!(pair(&mesh), 4.0);
        // Two dimensions of 4: half of the links lead along each.
        let mesh = level(Wiring::FullMesh, &[4, 4]);
        assert_eq!(group(&mesh, Kind::AllReduce, 16, 1), 12.0);
        assert_eq!(group(&mesh, Kind::AllReduce, 4, 4), 6.0);
        assert_eq!(group(&mesh, Kind::AllToAll, 16, 1), 12.0 / 1.5);
    }

    #[test]
    fn rings_share_the_links_of_a_torus() {
        let torus = level(Wiring::Torus, &[16, 4, 4]);
        assert_eq!(group(&torus, Kind::AllReduce, 16, 1), 4.0);
        // Four rings of four members lie between each other on the dimension of 16.
        assert_eq!(group(&torus, Kind::AllReduce, 4, 4), 1.0);
        assert_eq!(group(&torus, Kind::AllReduce, 256, 1), 12.0);
        assert_eq!(group(&torus, Kind::AllToAll, 16, 1), 1.0);
        assert_eq!(pair(&torus), 2.0);
    }
}
