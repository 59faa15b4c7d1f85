//! Turns at the cores, for meshes with more chips than the machine has cores for: as many programs compute at a time as the
//! cores can carry, each until it waits for another chip, or the others have waited too long ([`ROUND`]).
//!
//! Left alone, the operating system hands the cores round every few milliseconds, and each program finds the second cache full of
//! another's numbers, and the third cache has all of theirs to hold. (`char-6x384` on dp=4 and two cores, against one chip: 0.95
//! without turns, 1.00 to 1.02 with them, 0.95 where they end after 20 ms; dp=2 1.02 to 1.03 beside.)
//!
//! A program may wait for something that the wire knows nothing of, such as a lock of its own. So nobody waits for a turn while
//! those who have one stand still: after [`PATIENCE`] without an op of theirs a turn is made up, and given back like any other.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// In what time each program has its turn, if none of them waits for another chip; so long may a panic wait to be seen.
const ROUND: Duration = Duration::from_millis(400);

/// How long those who compute may take over one op before another chip goes on beside them.
pub(super) const PATIENCE: Duration = Duration::from_millis(50);

pub(super) struct Turns {
    /// Those that nobody has; negative after some were made up.
    free: isize,
    /// Since when each chip has had one.
    since: Vec<Option<Instant>>,
    /// Who waits for one, in order.
    queue: VecDeque<usize>,
    /// How long a turn is, if another chip waits for it.
    slice: Duration,
    /// Ops that each chip has come to.
    arrivals: Vec<u64>,
}

impl Turns {
    /// Turns for `chips` chips of which `at_once` may compute; none where all may, or where some cores would stand idle
    /// whenever the last few chips have their turns.
    pub(super) fn new(chips: usize, at_once: usize) -> Option<Self> {
        (at_once < chips && chips.is_multiple_of(at_once)).then(|| Turns {
            free: at_once as isize,
            since: vec![None; chips],
            queue: VecDeque::new(),
            slice: ROUND / (chips / at_once) as u32,
            arrivals: vec![0; chips],
        })
    }

    /// True if this chip may compute now. If not it stands in the queue, to be woken when it [got](Turns::give_back) a turn.
    pub(super) fn take(&mut self, rank: usize) -> bool {
        // A turn is free only while nobody waits for one.
        if self.since[rank].is_none() && self.free > 0 {
            self.hand_to(rank);
        }
        let has = self.since[rank].is_some();
        if !has && !self.queue.contains(&rank) {
            self.queue.push_back(rank);
        }
        has
    }

    /// Makes up a turn for this chip, which waits for one.
    pub(super) fn make_up(&mut self, rank: usize) {
        if self.since[rank].is_none() {
            self.queue.retain(|waiting| *waiting != rank);
            self.hand_to(rank);
        }
    }

    fn hand_to(&mut self, rank: usize) {
        self.free -= 1;
        self.since[rank] = Some(Instant::now());
    }

    /// This chip waits or has ended; its turn goes to who is returned.
    pub(super) fn give_back(&mut self, rank: usize) -> Option<usize> {
        self.queue.retain(|waiting| *waiting != rank);
        self.since[rank].take()?;
        self.free += 1;
        if self.free <= 0 {
            return None;
        }
        let next = self.queue.pop_front()?;
        self.hand_to(next);
        Some(next)
    }

    /// Notes that a chip came to an op; true if it is another one's turn.
    pub(super) fn arrive(&mut self, rank: usize) -> bool {
        self.arrivals[rank] += 1;
        let over = |since: Instant| since.elapsed() >= self.slice;
        !self.queue.is_empty() && self.since[rank].is_some_and(over)
    }

    /// A number that changes when a chip that has a turn comes to an op.
    pub(super) fn progress(&self) -> u64 {
        let holders = self.arrivals.iter().zip(&self.since);
        let holders = holders.filter(|(_, since)| since.is_some());
        holders.map(|(ops, _)| ops).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_go_round_in_order_and_no_more_are_out_than_there_are() {
        let mut turns = Turns::new(4, 2).unwrap();
        assert!(turns.take(0) && turns.take(1) && turns.take(0));
        assert!(!turns.take(3) && !turns.take(2) && !turns.take(3));
        assert_eq!(turns.give_back(1), Some(3));
        assert!(turns.take(3) && !turns.take(1));
        assert_eq!(turns.give_back(0), Some(2));
        assert_eq!(turns.give_back(0), None, "it had none");
        assert_eq!(turns.give_back(2), Some(1));
        // Who leaves the queue is not woken.
        assert!(!turns.take(2));
        assert_eq!(turns.give_back(2), None);
        assert_eq!(turns.give_back(1), None);
        assert_eq!(turns.give_back(3), None);
        assert_eq!(turns.free, 2);
    }

    #[test]
    fn a_slice_ends_where_another_chip_waits() {
        let mut turns = Turns::new(2, 1).unwrap();
        assert!(turns.take(0) && !turns.arrive(0));
        std::thread::sleep(turns.slice);
        assert!(!turns.arrive(0), "nobody waits");
        assert!(!turns.take(1) && turns.arrive(0));
        assert_eq!(turns.give_back(0), Some(1));
        assert!(!turns.take(0) && !turns.arrive(1), "its slice begins");
    }

    #[test]
    fn no_turns_where_all_may_compute_or_cores_would_stand_idle() {
        for (chips, at_once) in [(1, 1), (2, 2), (2, 4), (3, 2), (16, 3)] {
            assert!(Turns::new(chips, at_once).is_none(), "{chips}, {at_once}");
        }
    }

    #[test]
    fn a_turn_that_was_made_up_is_given_back_to_nobody() {
        let mut turns = Turns::new(3, 1).unwrap();
        assert!(turns.take(0) && !turns.take(1) && !turns.take(2));
        let before = turns.progress();
        turns.arrive(1);
        assert_eq!(turns.progress(), before, "who waits makes no progress");
        turns.arrive(0);
        assert_ne!(turns.progress(), before);
        turns.make_up(1);
        assert!(turns.take(1));
        assert_eq!(turns.give_back(0), None, "one chip still computes");
        assert_eq!(turns.give_back(1), Some(2));
        assert_eq!(turns.give_back(2), None);
        assert_eq!(turns.free, 1);
    }
}
