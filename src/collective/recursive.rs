//! Lists of about `log2 n` rounds: halving and doubling, for latency.
//!
//! Reductions halve (Rabenseifner, "Optimization of collective reduction operations", 2004), which needs a power of
//! two: with `p` the largest one up to `n`, the first `2 (n - p)` chips fold in pairs, the even one handing its whole
//! input to the odd one and getting its result back. Halving starts with the farthest partner, since that keeps every
//! message one run of elements; starting with the nearest would give the order of the fixed tree, at the price of
//! up to `p / 2` runs per message. Gathers and all-to-all need no power of two (Bruck, Ho, Kipnis, Upfal and
//! Weathersby, "Efficient algorithms for all-to-all communications", 1997).

use super::{Place, Schedule, Transfer, bounds, even_bounds, input, output, to};
use std::ops::Range;

/// The members of a halving: `members`, a power of two, of which the first `pairs` stand for two chips each.
pub(super) struct Fold {
    pub(super) members: usize,
    pub(super) pairs: usize,
}

impl Fold {
    pub(super) fn of(n: usize) -> Self {
        let members = 1 << n.ilog2();
        Fold {
            members,
            pairs: n - members,
        }
    }

    /// The chips that `member` stands for, one or two; the last of them takes part in the halving.
    pub(super) fn chips(&self, member: usize) -> Range<usize> {
        let first = member + member.min(self.pairs);
        first..first + if member < self.pairs { 2 } else { 1 }
    }

    fn member(&self, chip: usize) -> usize {
        if chip < 2 * self.pairs {
            chip / 2
        } else {
            chip - self.pairs
        }
    }

    fn speaker(&self, member: usize) -> usize {
        self.chips(member).end - 1
    }
}

/// All-reduce of `len` elements over `n` chips: fold, halve, double, unfold.
///
/// `2 log2 p` rounds, 2 more if `n` is no power of two; `2 len (p-1)/p` elements sent per member, `len` more by each
/// chip of a pair.
pub fn recursive_all_reduce(n: usize, index: usize, len: usize) -> Schedule {
    let mut list = Schedule::default();
    let fold = Fold::of(n);
    let at = even_bounds(len, fold.members);
    let member = fold.member(index);
    fold_and_halve(
        &mut list,
        &fold,
        index,
        &at,
        output(at[member]..at[member + 1]),
    );
    if index != fold.speaker(member) {
        list.round(vec![], vec![to(index + 1, output(0..len))]);
        return list;
    }
    let mut distance = 1;
    while distance < fold.members {
        let have = member / distance * distance;
        let lack = have ^ distance;
        let peer = fold.speaker(member ^ distance);
        list.round(
            vec![to(peer, output(at[have]..at[have + distance]))],
            vec![to(peer, output(at[lack]..at[lack + distance]))],
        );
        distance *= 2;
    }
    if member < fold.pairs {
        list.round(vec![to(index - 1, output(0..len))], vec![]);
    }
    list
}

/// Reduce-scatter by folding and halving: chip `c` gets chunk `c`, of `counts[c]` elements.
///
/// `log2 p` rounds, 2 more if `n` is no power of two.
pub fn recursive_reduce_scatter(index: usize, counts: &[usize]) -> Schedule {
    let mut list = Schedule::default();
    let fold = Fold::of(counts.len());
    let chunks = bounds(counts.iter().copied());
    // A member answers for the chunks of all its chips; they are neighbours, so this is one run.
    let ends = (0..fold.members).map(|member| chunks[fold.chips(member).end]);
    let at: Vec<usize> = std::iter::once(0).chain(ends).collect();
    let member = fold.member(index);
    let own = output(0..counts[index]);
    if member >= fold.pairs {
        fold_and_halve(&mut list, &fold, index, &at, own);
    } else if index != fold.speaker(member) {
        fold_and_halve(&mut list, &fold, index, &at, own);
        list.round(vec![], vec![to(index + 1, own)]);
    } else {
        let both = list.claim(at[member + 1] - at[member]);
        fold_and_halve(&mut list, &fold, index, &at, both);
        let (mut first, mut second) = (both, both);
        first.len = counts[index - 1];
        (second.start, second.len) = (both.start + first.len, counts[index]);
        list.round(vec![to(index - 1, first)], vec![]);
        list.copy(second, own);
    }
    list
}

/// All-gather by doubling: chip `c` brings `counts[c]` elements, everyone gets all. `ceil(log2 n)` rounds, any `n`.
pub fn recursive_all_gather(index: usize, counts: &[usize]) -> Schedule {
    let mut list = Schedule::default();
    let at = bounds(counts.iter().copied());
    list.copy(input(0..counts[index]), output(at[index]..at[index + 1]));
    double(&mut list, index, &at, |place| place, None);
    list
}

/// All-to-all in `ceil(log2 n)` rounds (Bruck): a block travels the binary digits of its distance, through chips that
/// it is not meant for. Fewer, larger messages, about `log2(n) / 2` times the elements.
///
/// `count(s, d)` is the number of elements from chip `s` to chip `d`.
pub fn recursive_all_to_all(
    n: usize,
    index: usize,
    count: impl Fn(usize, usize) -> usize,
) -> Schedule {
    let mut list = Schedule::default();
    let out = bounds((0..n).map(|chip| count(index, chip)));
    let come = bounds((0..n).map(|chip| count(chip, index)));
    let mine = |chip: usize| input(out[chip]..out[chip + 1]);
    let theirs = |chip: usize| output(come[chip]..come[chip + 1]);
    list.copy(mine(index), theirs(index));
    // Where the block that this chip passes on next for each distance waits.
    let mut waiting: Vec<Place> = (0..n).map(|far| mine((index + far) % n)).collect();
    let mut digit = 1;
    while digit < n {
        let (ahead, behind) = ((index + digit) % n, (index + n - digit) % n);
        let (mut sends, mut receives) = (Vec::new(), Vec::new());
        for far in (1..n).filter(|far| far & digit != 0) {
            sends.push(to(ahead, waiting[far]));
            let travelled = far & (2 * digit - 1);
            let source = (index + n - travelled) % n;
            let place = if travelled == far {
                theirs(source)
            } else {
                waiting[far] = list.claim(count(source, (source + far) % n));
                waiting[far]
            };
            receives.push(to(behind, place));
        }
        list.round(sends, receives);
        digit *= 2;
    }
    list
}

/// Broadcast of `len` elements from `root`: a binomial tree scatters chunks, then doubling gathers them (van de Geijn).
///
/// `2 ceil(log2 n)` rounds; no chip sends `len` elements `log2 n` times, as the root of a binomial tree does.
pub fn recursive_broadcast(n: usize, index: usize, len: usize, root: usize) -> Schedule {
    let mut list = Schedule::default();
    // Places are distances from the root; the chip at place p ends the scatter with the chunks that its subtree holds.
    let place = (index + n - root) % n;
    let chip = |place: usize| (place + root) % n;
    let at = even_bounds(len, n);
    if place == 0 {
        list.copy(input(0..len), output(0..len));
    }
    let mut distance = n.next_power_of_two() / 2;
    while distance > 0 {
        let chunks = |from: usize| output(at[from]..at[n.min(from + distance)]);
        if place % (2 * distance) == distance {
            let receive = to(chip(place - distance), chunks(place));
            list.round(vec![], vec![receive]);
        } else if place.is_multiple_of(2 * distance) && place + distance < n {
            let send = to(chip(place + distance), chunks(place + distance));
            list.round(vec![send], vec![]);
        }
        distance /= 2;
    }
    double(&mut list, place, &at, chip, Some(0));
    list
}

/// Folds `index`'s input into its member, then halves over the members, whose elements begin `at`; the member's own
/// ones end in `finish`. A chip whose member speaks through another one only hands over its input.
fn fold_and_halve(list: &mut Schedule, fold: &Fold, index: usize, at: &[usize], finish: Place) {
    let member = fold.member(index);
    let len = at[fold.members];
    if index != fold.speaker(member) {
        list.round(vec![to(index + 1, input(0..len))], vec![]);
        return;
    }
    // Each meeting: whom, what is given away, what is kept and added, and whether the peer's summand comes first.
    let mut meetings = Vec::new();
    if member < fold.pairs {
        meetings.push((index - 1, 0..0, 0..len, true));
    }
    let mut first = 0;
    let mut distance = fold.members / 2;
    while distance > 0 {
        let (low, high) = (
            at[first]..at[first + distance],
            at[first + distance]..at[first + 2 * distance],
        );
        let peer = fold.speaker(member ^ distance);
        if member & distance == 0 {
            meetings.push((peer, high, low, false));
        } else {
            meetings.push((peer, low, high, true));
            first += distance;
        }
        distance /= 2;
    }
    let last = meetings.len();
    if last == 0 {
        list.copy(input(0..len), finish);
        return;
    }
    // What is kept only shrinks, so the first uses of the two working areas and of the arrivals are the largest.
    let kept = |i: usize| meetings.get(i).map_or(0, |meeting| meeting.2.len());
    let mut claim = |wanted: bool, len: usize| list.claim(if wanted { len } else { 0 });
    let areas = [claim(last > 1, kept(0)), claim(last > 2, kept(1))];
    let arrivals = claim(true, kept(0));
    let (mut held, mut begin) = (input(0..len), 0);
    for (i, (peer, give, keep, peer_first)) in meetings.into_iter().enumerate() {
        let part = |range: &Range<usize>| Place {
            start: held.start + range.start.saturating_sub(begin),
            len: range.len(),
            ..held
        };
        let (mut arrived, mut sum) = (arrivals, areas[i % 2]);
        (arrived.len, sum.len) = (keep.len(), keep.len());
        if i + 1 == last {
            sum = finish;
        }
        list.round(vec![to(peer, part(&give))], vec![to(peer, arrived)]);
        let sources = match peer_first {
            true => vec![arrived, part(&keep)],
            false => vec![part(&keep), arrived],
        };
        list.reduce(sources, sum);
        (held, begin) = (sum, keep.start);
    }
}

/// Bruck's all-gather over places: who has `w` chunks from its own on sends them to the place `w` before it. Chunks begin
/// `at`; `full` has all of them and receives nothing.
fn double(
    list: &mut Schedule,
    place: usize,
    at: &[usize],
    chip: impl Fn(usize) -> usize,
    full: Option<usize>,
) {
    let n = at.len() - 1;
    let mut have = 1;
    while have < n {
        let more = have.min(n - have);
        let (before, after) = ((place + n - have) % n, (place + have) % n);
        let mut sends = runs(at, place, more, chip(before));
        let mut receives = runs(at, after, more, chip(after));
        if full == Some(before) {
            sends.clear();
        }
        if full == Some(place) {
            receives.clear();
        }
        list.round(sends, receives);
        have += more;
    }
}

/// `count` chunks of the output from chunk `first` on, cyclic: one run of elements, or two around the end.
fn runs(at: &[usize], first: usize, count: usize, peer: usize) -> Vec<Transfer> {
    let n = at.len() - 1;
    let beyond = (first + count).saturating_sub(n);
    vec![
        to(peer, output(at[first]..at[first + count - beyond])),
        to(peer, output(at[0]..at[beyond])),
    ]
}
