//! What is wrong with a run in which chips wait: for one that has returned, for each other, or for too long.

use super::{Exchange, Lane, LaneState, State, Until};
use crate::error::{Error, ErrorKind};

impl Exchange {
    /// Stops the run if nothing can move any more.
    pub(super) fn diagnose(&self, state: &mut State) {
        if state.error.is_some() {
            return;
        }
        // Someone waits for a chip that has returned: no need to let the others run on. This comes first, so that the
        // error is the same whether or not the others wait by now.
        for (number, lane) in state.lanes.iter().enumerate() {
            let Some(waiting) = &lane.waiting else {
                continue;
            };
            if state.satisfied(&waiting.until) {
                continue;
            }
            let peer = match &waiting.until {
                Until::Message(channel) => channel.from,
                Until::Received(_, to) => *to,
                Until::Done(_) => continue,
            };
            if state.ended[peer] {
                let error = Error::new(
                    ErrorKind::Chip,
                    format!(
                        "{} waits in {} for {}, whose program has returned without taking part; every chip must make \
                         the same calls in the same order",
                        self.name(number / 2),
                        waiting.header,
                        self.name(peer)
                    ),
                );
                self.poison(state, error);
                return;
            }
        }
        let stuck = |lane: &LaneState| {
            lane.jobs == 0
                || lane
                    .waiting
                    .as_ref()
                    .is_some_and(|w| !state.satisfied(&w.until))
        };
        let waits = |lane: &LaneState| lane.jobs > 0 && lane.waiting.is_some();
        if state.lanes.iter().any(waits) && state.lanes.iter().all(stuck) {
            let report = self.report(state);
            self.poison(state, Error::new(ErrorKind::Deadlock, report));
        }
    }

    fn report(&self, state: &State) -> String {
        let mut lines = vec!["every chip waits for another one".to_string()];
        for (number, lane) in state.lanes.iter().enumerate() {
            let Some(waiting) = lane.waiting.as_ref().filter(|_| lane.jobs > 0) else {
                continue;
            };
            let whom = match &waiting.until {
                Until::Message(channel) => {
                    format!("for a message from {}", self.name(channel.from))
                }
                Until::Received(_, to) => format!("for {} to receive", self.name(*to)),
                Until::Done(_) => "for its own started transfer".to_string(),
            };
            lines.push(format!(
                "{} waits in {} {whom}",
                self.name(number / 2),
                waiting.header
            ));
        }
        for (rank, _) in state.ended.iter().enumerate().filter(|(_, ended)| **ended) {
            lines.push(format!("{} has returned", self.name(rank)));
        }
        lines.join("; ")
    }
}

impl Lane {
    /// The error of a wait that outlasted the deadline: who computes all the while, and where it was last seen.
    pub(super) fn overdue(&self, state: &State) -> Error {
        let computing = |rank: &usize| {
            !state.ended[*rank] && state.lanes[2 * rank].waiting.is_none() && *rank != self.rank
        };
        let ranks = (0..state.ended.len()).filter(computing);
        let seen: Vec<String> = ranks
            .map(|rank| match &state.last_seen[rank] {
                Some(at) => format!("{} computes at or after {at}", self.exchange.name(rank)),
                None => format!("{} computes", self.exchange.name(rank)),
            })
            .collect();
        let waiting = state.lanes[self.number]
            .waiting
            .as_ref()
            .expect("this lane waits");
        Error::new(
            ErrorKind::Deadline,
            format!(
                "{} has waited in {} for more than the deadline of {} s while {}; raise the deadline if the program is \
                 only slow",
                self.exchange.name(self.rank),
                waiting.header,
                self.exchange.deadline.as_secs_f64(),
                seen.join(" and ")
            ),
        )
    }
}
