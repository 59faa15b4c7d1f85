//! How much a collective sends, without building its lists: what a pricer asks for half a million chips.

use super::{Algorithm, Counts, Kind, recursive::Fold, tree::sends_whole};
use crate::placement::split;

/// Elements that all `n` chips together send, in closed form. Equal to the sum over the lists; [`prove`](super::prove)
/// checks it.
///
/// With `S` elements in all chunks together:
///
/// | kind | tree | ring | recursive |
/// |---|---|---|---|
/// | all-reduce | `2 (n-1) S`; small ones `n (n-1) S` | `2 (n-1) S` | `2 (n-1) S` |
/// | reduce-scatter | `(n-1) S` | `(n-1) S` | `(n-1) S` + chunks of the `n-p` folded chips |
/// | all-gather | `(n-1) S` | `(n-1) S` | `(n-1) S` |
/// | all-to-all | blocks off the diagonal | the same | each times the binary ones of its distance |
/// | broadcast | `(n-1) S` | `(n-1) S` | `(n-2) S` + chunk 0 + chunk `c` times the binary ones of `c` |
/// | shift | `S`; nothing if `n` is 1 | the same | the same |
///
/// Panics if the counts do not fit the kind, or the result exceeds 64 bits.
#[track_caller]
pub fn sent_elements(kind: Kind, algorithm: Algorithm, counts: &Counts, n: usize) -> u64 {
    counts.check(kind, n);
    let total = || counts.total(n) as u128;
    let others = n as u128 - 1;
    narrow(match (kind, algorithm) {
        (Kind::AllReduce, Algorithm::Tree) if sends_whole(n, counts.total(n)) => {
            others * n as u128 * total()
        }
        (Kind::ReduceScatter, Algorithm::Recursive) => {
            let folded = (0..Fold::of(n).pairs).map(|pair| counts.chunk(n, 2 * pair) as u128);
            others * total() + folded.sum::<u128>()
        }
        (Kind::AllToAll, Algorithm::Recursive) => pairs(n)
            .map(|(s, d)| {
                counts.block(n, s, d) as u128 * u128::from(((d + n - s) % n).count_ones())
            })
            .sum(),
        (Kind::Broadcast { .. }, Algorithm::Recursive) => {
            let Counts::Len(len) = *counts else {
                unreachable!("checked above")
            };
            let chunk = |c: usize| split(len, n, c).len() as u128;
            let scattered: u128 = (1..n).map(|c| chunk(c) * u128::from(c.count_ones())).sum();
            scattered + others * total() - (total() - chunk(0))
        }
        _ => floor(kind, counts, n),
    })
}

/// Elements of scratch of the chip that needs most: [`Schedule::scratch`](super::Schedule::scratch) without building
/// lists for the tree; the largest of all lists for the others.
///
/// Panics if the counts do not fit the kind.
#[track_caller]
pub fn scratch_elements(kind: Kind, algorithm: Algorithm, counts: &Counts, n: usize) -> u64 {
    counts.check(kind, n);
    let summands = |each: usize| (n - 1) as u64 * each as u64;
    match (kind, algorithm, counts) {
        (Kind::AllReduce, Algorithm::Tree, Counts::Len(len)) if sends_whole(n, *len) => {
            summands(*len)
        }
        (_, Algorithm::Tree, Counts::Len(len)) if kind.reduces() => summands(len.div_ceil(n)),
        (Kind::ReduceScatter, Algorithm::Tree, Counts::Each(each)) => {
            summands(each.iter().copied().max().unwrap_or(0))
        }
        (_, Algorithm::Tree, _) => 0,
        _ => (0..n)
            .map(|index| super::schedule(kind, algorithm, counts, n, index).scratch as u64)
            .max()
            .unwrap_or(0),
    }
}

/// The least that all `n` chips together must send if only chips add, whatever the algorithm: `2 (n-1) S` for an
/// all-reduce, what is not already in place for the others. Switches that reduce on the way can do with less.
///
/// Panics as [`sent_elements`] does.
#[track_caller]
pub fn floor_elements(kind: Kind, counts: &Counts, n: usize) -> u64 {
    counts.check(kind, n);
    narrow(floor(kind, counts, n))
}

fn floor(kind: Kind, counts: &Counts, n: usize) -> u128 {
    let others = n as u128 - 1;
    match (kind, counts) {
        (Kind::Barrier, _) => 0,
        (Kind::Shift, _) if n == 1 => 0,
        (Kind::Shift, _) => counts.total(n) as u128,
        (Kind::AllReduce, _) => 2 * others * counts.total(n) as u128,
        (Kind::ReduceScatter | Kind::AllGather | Kind::Broadcast { .. }, _) => {
            others * counts.total(n) as u128
        }
        // Everyone keeps one chunk of its input, and over the chips that is every chunk once.
        (Kind::AllToAll, Counts::Len(len)) => others * *len as u128,
        (Kind::AllToAll, Counts::Product { rows, columns }) => {
            let sum = |counts: &[usize]| counts.iter().map(|&count| count as u128).sum::<u128>();
            let kept = rows.iter().zip(columns);
            sum(rows) * sum(columns) - kept.map(|(&r, &c)| r as u128 * c as u128).sum::<u128>()
        }
        (Kind::AllToAll, _) => pairs(n).map(|(s, d)| counts.block(n, s, d) as u128).sum(),
    }
}

/// Rounds between the first send and the last receive, over the whole group; fewer if chunks are empty.
///
/// | kind | tree | ring | recursive (`p` the largest power of two up to `n`) |
/// |---|---|---|---|
/// | all-reduce | 2; small ones 1 | `2 (n-1)` | `2 log2 p`, 2 more if `n > p` |
/// | reduce-scatter | 1 | `n-1` | `log2 p`, 2 more if `n > p` |
/// | all-gather, all-to-all | 1 | `n-1` | `ceil(log2 n)` |
/// | broadcast | `ceil(log2 n)` | `n` | `2 ceil(log2 n)` |
///
/// A barrier takes `ceil(log2 n)`, a shift 1; one chip alone takes none. A tree's rounds have `n - 1` messages in flight per
/// chip: on a wire that carries one at a time each counts as `n - 1`. Panics if the counts do not fit the kind.
#[track_caller]
pub fn rounds(kind: Kind, algorithm: Algorithm, counts: &Counts, n: usize) -> usize {
    counts.check(kind, n);
    if n == 1 {
        return 0;
    }
    let doublings = n.next_power_of_two().ilog2() as usize;
    let fold = Fold::of(n);
    let halvings = fold.members.ilog2() as usize;
    let folds = if fold.pairs > 0 { 2 } else { 0 };
    match (kind, algorithm) {
        (Kind::Barrier, _) | (Kind::Broadcast { .. }, Algorithm::Tree) => doublings,
        (Kind::Shift, _) => 1,
        (Kind::AllReduce, Algorithm::Tree) if !sends_whole(n, counts.total(n)) => 2,
        (_, Algorithm::Tree) => 1,
        (Kind::AllReduce, Algorithm::Ring) => 2 * (n - 1),
        (Kind::Broadcast { .. }, Algorithm::Ring) => n,
        (_, Algorithm::Ring) => n - 1,
        (Kind::AllReduce, Algorithm::Recursive) => 2 * halvings + folds,
        (Kind::ReduceScatter, Algorithm::Recursive) => halvings + folds,
        (Kind::Broadcast { .. }, Algorithm::Recursive) => 2 * doublings,
        (_, Algorithm::Recursive) => doublings,
    }
}

/// All (source, destination) of different chips.
fn pairs(n: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..n).flat_map(move |s| (0..n).filter(move |&d| d != s).map(move |d| (s, d)))
}

#[track_caller]
fn narrow(elements: u128) -> u64 {
    let fits = u64::try_from(elements);
    fits.unwrap_or_else(|_| panic!("{elements} elements sent: more than 64 bits count"))
}
