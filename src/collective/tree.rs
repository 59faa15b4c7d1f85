//! The default lists: everyone exchanges with everyone, and adds at home in the order of the fixed binary tree.
//!
//! A ring or a halving adds on the way, so its order follows the algorithm. Here each element's summands first meet on
//! one chip and are then added by [`Step::Reduce`](super::Step::Reduce), so the order is the fixed tree for any number of chips
//! and narrow types are rounded once. The bytes are those of a ring. The price is scratch for the summands, about
//! one input per chip, and `n - 1` messages per chip and phase, which may fly at once.

use super::{Place, Schedule, Transfer, bounds, even_bounds, input, output, to};
use std::ops::Range;

/// True if an all-reduce of `len` elements over `n` chips sends whole vectors.
///
/// Two chips send as many bytes either way, in one round instead of two, but add everything twice: beyond 16 KiB in f32
/// the second round is cheaper. More than two chips would send more than `2 len (n-1)/n` each. Both ways add in the same
/// order, so the choice changes no bit.
pub(super) fn sends_whole(n: usize, len: usize) -> bool {
    n <= 2 && len <= 4096
}

/// All-reduce of `len` elements over `n` chips. Every element is the fixed tree over the chips.
///
/// Small ones of two chips exchange whole vectors: 1 round. Others reduce-scatter, then all-gather: 2 rounds. Each chip
/// sends `2 len (n-1)/n` elements.
pub fn tree_all_reduce(n: usize, index: usize, len: usize) -> Schedule {
    let mut list = Schedule::default();
    if sends_whole(n, len) {
        exchange_and_add(&mut list, n, index, |_| 0..len, output(0..len));
        return list;
    }
    let at = even_bounds(len, n);
    let chunk = |chip: usize| at[chip]..at[chip + 1];
    let own = output(chunk(index));
    exchange_and_add(&mut list, n, index, chunk, own);
    spread(&mut list, n, index, chunk, own);
    list
}

/// Reduce-scatter: chip `c` gets chunk `c`, of `counts[c]` elements. Every element is the fixed tree over the chips.
///
/// 1 round; each chip sends all but its own chunk.
pub fn tree_reduce_scatter(index: usize, counts: &[usize]) -> Schedule {
    let mut list = Schedule::default();
    let at = bounds(counts.iter().copied());
    let chunk = |chip: usize| at[chip]..at[chip + 1];
    exchange_and_add(
        &mut list,
        counts.len(),
        index,
        chunk,
        output(0..counts[index]),
    );
    list
}

/// All-gather: chip `c` brings `counts[c]` elements, everyone gets all. 1 round.
pub fn tree_all_gather(index: usize, counts: &[usize]) -> Schedule {
    let mut list = Schedule::default();
    let at = bounds(counts.iter().copied());
    let chunk = |chip: usize| at[chip]..at[chip + 1];
    let own = input(0..counts[index]);
    list.copy(own, output(chunk(index)));
    spread(&mut list, counts.len(), index, chunk, own);
    list
}

/// All-to-all: chip `index` sends `sent[d]` elements to chip `d` and gets `received[s]` from chip `s`. 1 round.
pub fn tree_all_to_all(index: usize, sent: &[usize], received: &[usize]) -> Schedule {
    let mut list = Schedule::default();
    let (n, out, come) = (
        sent.len(),
        bounds(sent.iter().copied()),
        bounds(received.iter().copied()),
    );
    let mine = |chip: usize| input(out[chip]..out[chip + 1]);
    let theirs = |chip: usize| output(come[chip]..come[chip + 1]);
    list.copy(mine(index), theirs(index));
    let (sends, receives) = everyone(n, index, mine, theirs);
    list.round(sends, receives);
    list
}

/// Broadcast of `len` elements from `root` along a binomial tree: `ceil(log2 n)` rounds of `len` elements.
pub fn tree_broadcast(n: usize, index: usize, len: usize, root: usize) -> Schedule {
    let mut list = Schedule::default();
    // Distances from the root make every root the first; the chip at `place` hears from the one whose number lacks its
    // lowest bit, and so has everything to pass on to those beyond it.
    let place = (index + n - root) % n;
    let chip = |place: usize| (place + root) % n;
    let mut held = output(0..len);
    if place == 0 {
        held = input(0..len);
        list.copy(held, output(0..len));
    }
    let mut distance = n.next_power_of_two() / 2;
    while distance > 0 {
        if place % (2 * distance) == distance {
            list.round(vec![], vec![to(chip(place - distance), held)]);
        } else if place.is_multiple_of(2 * distance) && place + distance < n {
            list.round(vec![to(chip(place + distance), held)], vec![]);
        }
        distance /= 2;
    }
    list
}

/// Barrier by dissemination (Hensgen, Finkel, Manber, 1988): in round `k` everyone tells the chip `2^k` further on;
/// after `ceil(log2 n)` rounds everyone has heard of everyone. Messages are empty.
pub fn barrier(n: usize, index: usize) -> Schedule {
    let mut list = Schedule::default();
    let mut distance = 1;
    while distance < n {
        // Pushed straight: `Schedule::round` would drop the empty transfers.
        list.steps.push(super::Step::Round {
            sends: vec![to((index + distance) % n, output(0..0))],
            receives: vec![to((index + n - distance) % n, output(0..0))],
        });
        distance *= 2;
    }
    list
}

/// Transfers with all others: `mine(chip)` to each chip at distance 1, 2, ..., `theirs(chip)` from each before it.
fn everyone(
    n: usize,
    index: usize,
    mine: impl Fn(usize) -> Place,
    theirs: impl Fn(usize) -> Place,
) -> (Vec<Transfer>, Vec<Transfer>) {
    let ahead = (1..n).map(|distance| (index + distance) % n);
    let behind = (1..n).map(|distance| (index + n - distance) % n);
    (
        ahead.map(|chip| to(chip, mine(chip))).collect(),
        behind.map(|chip| to(chip, theirs(chip))).collect(),
    )
}

/// Sends `chunk(chip)` of the input to each chip, and adds up what arrives for `chunk(index)`.
fn exchange_and_add(
    list: &mut Schedule,
    n: usize,
    index: usize,
    chunk: impl Fn(usize) -> Range<usize>,
    into: Place,
) {
    let slots: Vec<Place> = (0..n)
        .map(|chip| match chip == index {
            true => input(chunk(index)),
            false => list.claim(into.len),
        })
        .collect();
    let (sends, receives) = everyone(n, index, |chip| input(chunk(chip)), |chip| slots[chip]);
    list.round(sends, receives);
    list.reduce(slots, into);
}

/// Sends `own` to everyone, and takes everyone's chunk into the output.
fn spread(
    list: &mut Schedule,
    n: usize,
    index: usize,
    chunk: impl Fn(usize) -> Range<usize>,
    own: Place,
) {
    let (sends, receives) = everyone(n, index, |_| own, |chip| output(chunk(chip)));
    list.round(sends, receives);
}
