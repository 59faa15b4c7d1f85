//! Matmul on a grid of chips: 1-D, 2-D (SUMMA) and 2.5-D, chosen by what they send.
//!
//! Along each axis of the mesh a product [m, k] by [k, n] can be cut by its rows m, its columns n, or its inner dimension k.
//! Cut by m or n, the other operand has to be there whole; cut by k, partial results are added up. One axis cut by one of them
//! is a 1-D algorithm, m and n on two axes are SUMMA's grid (van de Geijn and Watts 1997; panels travel as one all-gather per
//! operand), and an axis over k beside these two is the copies of 2.5-D (Solomonik and Demmel 2011). All are the same three
//! steps: move the operands, multiply, move the result. So the choice is a search over 3^axes cuts, by the bytes of
//! `placement::plan`.
//!
//! Where operands and result lie so that the grid suits them, the volume is the floor of Al Daas et al. (2022,
//! arXiv:2205.13407); the tests hold one and two dimensions against it.

use super::{Chip, Sharded};
use crate::mesh::Mesh;
use crate::placement::Placement::{Partial, Replicate, Shard};
use crate::placement::{Placements, plan_volume};
use std::panic::Location;

/// How a product [.., m, k] by [k, n] is cut along one axis of a mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cut {
    /// By rows of the first operand and of the result.
    M,
    /// By columns of the second operand and of the result.
    N,
    /// By the inner dimension: the result is a sum over chips.
    K,
}

/// A way to multiply on a mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grid {
    /// One cut per axis of the mesh; of an axis of one chip it means nothing.
    pub cuts: Vec<Cut>,
    /// Elements that all chips send together, at the floors of the collectives.
    pub sent: u128,
}

impl Grid {
    /// The cuts that send the fewest elements to multiply `a`, of these lengths and placements, by `b`, with the result
    /// placed as `to`. Of those that send as many the first in the order m, n, k, outer axes first.
    ///
    /// # Errors
    /// A sentence if the shapes do not fit, or no cut leads to `to`.
    pub fn choose(
        (a, a_placed): (&[usize], &Placements),
        (b, b_placed): (&[usize], &Placements),
        to: &Placements,
        mesh: &Mesh,
    ) -> Result<Self, String> {
        if a.len() < 2 || b.len() != 2 || a[a.len() - 1] != b[0] {
            return Err(format!(
                "{a:?} by {b:?}: the first needs two or more dimensions, the second two, and both the same k"
            ));
        }
        let mut result = a.to_vec();
        result[a.len() - 1] = b[1];
        let axes = mesh.axes().len();
        let (mut best, mut refused): (Option<Grid>, _) = (None, String::new());
        for number in 0..3usize.pow(axes as u32) {
            let digit = |axis: usize| number / 3usize.pow((axes - 1 - axis) as u32) % 3;
            // An axis of one chip is cut in one way only.
            if (0..axes).any(|axis| mesh.axes()[axis].size() == 1 && digit(axis) > 0) {
                continue;
            }
            let cuts: Vec<Cut> = (0..axes)
                .map(|x| [Cut::M, Cut::N, Cut::K][digit(x)])
                .collect();
            let [a_cut, b_cut, c_cut] = placements(&cuts, a.len(), mesh);
            let sent = [
                plan_volume(a_placed, &a_cut, a, mesh),
                plan_volume(b_placed, &b_cut, b, mesh),
                plan_volume(&c_cut, to, &result, mesh),
            ];
            match sent.into_iter().sum::<Result<u128, String>>() {
                Ok(sent) if best.as_ref().is_none_or(|g| sent < g.sent) => {
                    best = Some(Grid { cuts, sent });
                }
                Ok(_) => {}
                Err(why) => refused = why,
            }
        }
        best.ok_or(refused)
    }
}

/// Placements of the operands and of the result under these cuts.
fn placements(cuts: &[Cut], rank: usize, mesh: &Mesh) -> [Placements; 3] {
    let lie = |cut: Cut| match cut {
        Cut::M => [Shard(rank - 2), Replicate, Shard(rank - 2)],
        Cut::N => [Replicate, Shard(1), Shard(rank - 1)],
        Cut::K => [Shard(rank - 1), Shard(0), Partial],
    };
    [0, 1, 2].map(|which| {
        let axes = mesh.axes().iter().zip(cuts);
        let one = |(axis, cut): (&crate::mesh::Axis, &Cut)| match axis.size() {
            1 => Replicate,
            _ => lie(*cut)[which],
        };
        axes.map(one).collect()
    })
}

impl Chip {
    #[track_caller]
    pub(super) fn matmul_to(&self, a: &Sharded, b: &Sharded, to: &Placements) -> Sharded {
        let site = Location::caller();
        let to = self.normalize(to);
        let (left, right) = (
            (&a.global[..], &a.placements),
            (&b.global[..], &b.placements),
        );
        let grid = Grid::choose(left, right, &to, self.mesh()).unwrap_or_else(|why| {
            panic!(
                "matmul on a grid of {}: {why} (called at {site})",
                self.mesh()
            )
        });
        let [a_cut, b_cut, _] = placements(&grid.cuts, a.global.len(), self.mesh());
        let (a, b) = (self.redistribute(a, &a_cut), self.redistribute(b, &b_cut));
        self.redistribute(&a.matmul(&b), &to)
    }
}

#[cfg(test)]
mod tests {
    use super::Cut::{K, M, N};
    use super::*;

    fn chosen(
        mesh: &str,
        (m, n, k): (usize, usize, usize),
        placed: [Placements; 3],
    ) -> (Vec<Cut>, u128) {
        let mesh = Mesh::parse(mesh).expect("a mesh");
        let [a, b, to] = placed;
        let grid = Grid::choose((&[m, k], &a), (&[k, n], &b), &to, &mesh).expect("a grid");
        (grid.cuts, grid.sent)
    }

    #[test]
    fn one_dimension_sends_the_smallest_matrix() {
        // P <= m / n: the floor is (mn + mk) / P + nk - (mn + mk + nk) / P = nk (1 - 1/P) a chip.
        let rows = || Placements::from([Shard(0)]);
        let (cuts, sent) = chosen("x=4", (256, 16, 16), [rows(), rows(), rows()]);
        assert_eq!((cuts, sent), (vec![M], 4 * 16 * 16 * 3 / 4));
        // The same with the long dimension inside: the result is the smallest.
        let columns = || Placements::from([Shard(1)]);
        let (cuts, sent) = chosen("x=4", (16, 16, 256), [columns(), rows(), rows()]);
        assert_eq!((cuts, sent), (vec![K], 4 * 16 * 16 * 3 / 4));
    }

    #[test]
    fn a_square_grid_attains_the_floor_of_two_dimensions() {
        // P <= mn / k^2: 2 sqrt(m n k^2 / P) + mn / P - (mn + mk + nk) / P.
        let grid = || Placements::from([Shard(0), Shard(1)]);
        for (mesh, p) in [("x=2,y=2", 4.0), ("x=4,y=4", 16.0)] {
            let (m, n, k) = (64, 64, 16);
            let (cuts, sent) = chosen(mesh, (m, n, k), [grid(), grid(), grid()]);
            assert_eq!(cuts, [M, N], "{mesh}");
            let [m, n, k] = [m, n, k].map(|x| x as f64);
            let owned = (m * n + m * k + n * k) / p;
            let floor = 2.0 * (m * n * k * k / p).sqrt() + m * n / p - owned;
            assert_eq!(sent as f64 / p, floor, "{mesh}");
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let (mesh, p) = (
            Mesh::parse("x=2").expect("a mesh"),
            Placements::from([Replicate]),
        );
        let error = Grid::choose((&[4, 5], &p), (&[6, 4], &p), &p, &mesh).expect_err("refused");
        assert!(
            error.contains("[4, 5]") && error.contains("[6, 4]"),
            "{error}"
        );
    }
}
