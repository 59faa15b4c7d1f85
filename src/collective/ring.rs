//! Lists that talk to neighbours only: `n - 1` rounds around a ring, every link busy in every round.
//!
//! The sum of chunk `c` starts at chip `c + 1` and collects one summand per hop until it is complete at chip `c`
//! (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009). Its order is
//! therefore a chain that begins elsewhere for every chunk, and narrow types are rounded at every hop.

use super::{Schedule, bounds, even_bounds, input, output, to};
use std::ops::Range;

/// Shift by one place: chip `c`, which brings `counts[c]` elements, gets those of chip `c - 1`, and the first those of the last.
///
/// One round; each chip sends what it brings.
pub fn shift(index: usize, counts: &[usize]) -> Schedule {
    let mut list = Schedule::default();
    let n = counts.len();
    let (next, before) = ((index + 1) % n, (index + n - 1) % n);
    let (gone, come) = (input(0..counts[index]), output(0..counts[before]));
    if n == 1 {
        list.copy(gone, come);
    } else {
        list.round(vec![to(next, gone)], vec![to(before, come)]);
    }
    list
}

/// All-reduce of `len` elements over `n` chips: reduce-scatter, then all-gather, both around the ring.
///
/// `2 (n-1)` rounds; each chip sends about `2 len (n-1)/n`.
pub fn ring_all_reduce(n: usize, index: usize, len: usize) -> Schedule {
    let mut list = Schedule::default();
    let at = even_bounds(len, n);
    let chunk = |chip: usize| at[chip]..at[chip + 1];
    if n == 1 {
        list.copy(input(0..len), output(0..len));
    }
    let arrived = list.claim(longest(n, chunk));
    for hop in 1..n {
        let (gone, come) = (
            chunk((index + n - hop) % n),
            chunk((index + 2 * n - hop - 1) % n),
        );
        // Partial sums wait in the output: the all-gather overwrites them after they were sent on.
        let send = if hop == 1 { input(gone) } else { output(gone) };
        let mut arrived = arrived;
        arrived.len = come.len();
        list.round(
            vec![to((index + 1) % n, send)],
            vec![to((index + n - 1) % n, arrived)],
        );
        list.reduce(vec![arrived, input(come.clone())], output(come));
    }
    pass_on(&mut list, n, index, |place| place, chunk, None);
    list
}

/// Reduce-scatter around the ring: chip `c` gets chunk `c`, of `counts[c]` elements.
///
/// `n - 1` rounds; each chip sends all but one chunk.
pub fn ring_reduce_scatter(index: usize, counts: &[usize]) -> Schedule {
    let mut list = Schedule::default();
    let n = counts.len();
    let at = bounds(counts.iter().copied());
    let chunk = |chip: usize| at[chip]..at[chip + 1];
    if n == 1 {
        list.copy(input(0..counts[0]), output(0..counts[0]));
        return list;
    }
    let longest = longest(n, chunk);
    let arrived = list.claim(longest);
    let partial = list.claim(if n > 2 { longest } else { 0 });
    for hop in 1..n {
        let (gone, come) = (
            chunk((index + n - hop) % n),
            chunk((index + 2 * n - hop - 1) % n),
        );
        let (mut arrived, mut send, mut sum) = (arrived, partial, partial);
        (arrived.len, send.len, sum.len) = (come.len(), gone.len(), come.len());
        if hop == 1 {
            send = input(gone);
        }
        if hop == n - 1 {
            sum = output(0..counts[index]);
        }
        list.round(
            vec![to((index + 1) % n, send)],
            vec![to((index + n - 1) % n, arrived)],
        );
        list.reduce(vec![arrived, input(come)], sum);
    }
    list
}

/// All-gather around the ring: chip `c` brings `counts[c]` elements, everyone gets all. `n - 1` rounds.
pub fn ring_all_gather(index: usize, counts: &[usize]) -> Schedule {
    let mut list = Schedule::default();
    let at = bounds(counts.iter().copied());
    let chunk = |chip: usize| at[chip]..at[chip + 1];
    list.copy(input(0..counts[index]), output(chunk(index)));
    pass_on(&mut list, counts.len(), index, |place| place, chunk, None);
    list
}

/// All-to-all in `n - 1` rounds: in round `k` everyone sends to the chip `k` further on. Blocks go straight to their
/// destination; only the rounds are ordered, so that no chip hears from two at once.
pub fn ring_all_to_all(index: usize, sent: &[usize], received: &[usize]) -> Schedule {
    let mut list = Schedule::default();
    let (n, out, come) = (
        sent.len(),
        bounds(sent.iter().copied()),
        bounds(received.iter().copied()),
    );
    let mine = |chip: usize| input(out[chip]..out[chip + 1]);
    let theirs = |chip: usize| output(come[chip]..come[chip + 1]);
    list.copy(mine(index), theirs(index));
    for distance in 1..n {
        let (ahead, behind) = ((index + distance) % n, (index + n - distance) % n);
        list.round(
            vec![to(ahead, mine(ahead))],
            vec![to(behind, theirs(behind))],
        );
    }
    list
}

/// Broadcast of `len` elements from `root`: it scatters chunks, which then travel around the ring.
///
/// `n` rounds; every chip but the root receives `len` elements, the root none.
pub fn ring_broadcast(n: usize, index: usize, len: usize, root: usize) -> Schedule {
    let mut list = Schedule::default();
    // Places are distances from the root; the chip at place p starts with chunk p.
    let place = (index + n - root) % n;
    let chip = |place: usize| (place + root) % n;
    let at = even_bounds(len, n);
    let chunk = |place: usize| at[place]..at[place + 1];
    if place == 0 {
        let sends = (1..n).map(|place| to(chip(place), input(chunk(place))));
        list.round(sends.collect(), vec![]);
        list.copy(input(0..len), output(0..len));
    } else {
        list.round(vec![], vec![to(root, output(chunk(place)))]);
    }
    pass_on(&mut list, n, place, chip, chunk, Some(0));
    list
}

/// All chunks travel once around the ring through the outputs; `full` has all of them and receives nothing.
fn pass_on(
    list: &mut Schedule,
    n: usize,
    place: usize,
    chip: impl Fn(usize) -> usize,
    chunk: impl Fn(usize) -> Range<usize>,
    full: Option<usize>,
) {
    let (ahead, behind) = ((place + 1) % n, (place + n - 1) % n);
    for hop in 0..n - 1 {
        let send = to(chip(ahead), output(chunk((place + n - hop) % n)));
        let receive = to(chip(behind), output(chunk((behind + n - hop) % n)));
        let sends = if full == Some(ahead) {
            vec![]
        } else {
            vec![send]
        };
        let receives = if full == Some(place) {
            vec![]
        } else {
            vec![receive]
        };
        list.round(sends, receives);
    }
}

fn longest(n: usize, chunk: impl Fn(usize) -> Range<usize>) -> usize {
    (0..n).map(|chip| chunk(chip).len()).max().unwrap_or(0)
}
