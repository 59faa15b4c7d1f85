//! The wire between chips that are threads: messages, waits, and what goes wrong with them.
//!
//! # Rendezvous
//! A send is complete only when it was received, as MPI allows its sends to be, so a program that would hang under MPI
//! is found here. Messages carry a [`Header`] that says which call they belong to: a receiver that is in another call
//! than the sender stops the run and names both call sites.
//!
//! # Nothing hangs
//! Every wait registers what it waits for. One mutex holds all of it: whoever is about to wait looks whether any chip
//! could still move, and if none can, reports who waits for whom. Whoever ends, by return or panic, looks whether
//! someone waits for it in vain. When a run fails its error is stored once, all waiters wake, and each leaves its
//! program by unwinding with [`Stopped`].
//!
//! A chip has two lanes: its program, and its transfers that run beside it. Both wait here, each on a bell of its own. Where
//! there are too few cores for all programs, one that waits leaves its [turn](super::turns) to another.

mod diagnosis;

use super::payload::Payload;
use super::turns::{PATIENCE, Turns};
use crate::error::{Error, ErrorKind};
use crate::mesh::Mesh;
use std::collections::{HashMap, VecDeque};
use std::panic::Location;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

/// The run was stopped by another chip's failure; carried by unwinding, never shown.
#[derive(Debug)]
pub(super) struct Stopped;

/// Which call a message or a wait belongs to.
#[derive(Debug)]
pub(super) struct Header {
    /// What both sides of a message must agree on: op, axis, shape, type.
    pub signature: String,
    /// The scope.
    pub scope: Arc<str>,
    /// The call site.
    pub site: &'static Location<'static>,
}

impl std::fmt::Display for Header {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.signature)?;
        if !self.scope.is_empty() {
            write!(f, " in {}", self.scope)?;
        }
        write!(f, " at {}:{}", self.site.file(), self.site.line())
    }
}

/// Where a chip's program is, for errors.
#[derive(Clone, Debug)]
pub(super) struct Whereabouts {
    pub op: Arc<str>,
    pub scope: Arc<str>,
    pub site: &'static Location<'static>,
}

impl std::fmt::Display for Whereabouts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.op)?;
        if !self.scope.is_empty() {
            write!(f, " in {}", self.scope)?;
        }
        write!(f, " at {}:{}", self.site.file(), self.site.line())
    }
}

struct Message {
    header: Arc<Header>,
    payload: Payload,
    received: Arc<OnceLock<Instant>>,
}

/// A queue between two ranks: one per collective call, one for plain messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Channel {
    pub from: usize,
    pub to: usize,
    /// The collective's axis and its number on that axis; for messages see `message`.
    pub call: (usize, u64),
}

enum Until {
    Message(Channel),
    Received(Arc<OnceLock<Instant>>, usize),
    Done(Arc<AtomicBool>),
}

struct Waiting {
    header: Arc<Header>,
    until: Until,
}

#[derive(Default)]
struct LaneState {
    /// Things to do; a program is one, each started transfer another.
    jobs: usize,
    waiting: Option<Waiting>,
}

#[derive(Default)]
struct State {
    queues: HashMap<Channel, VecDeque<Message>>,
    lanes: Vec<LaneState>,
    ended: Vec<bool>,
    last_seen: Vec<Option<Whereabouts>>,
    /// Absent where all programs may compute at once.
    turns: Option<Turns>,
    decisions: HashMap<u64, (bool, usize)>,
    error: Option<Error>,
}

/// The wire of one run.
pub(super) struct Exchange {
    mesh: Arc<Mesh>,
    state: Mutex<State>,
    bells: Vec<Condvar>,
    poisoned: AtomicBool,
    deadline: Duration,
}

/// One chip's end of the wire, for one of its lanes.
#[derive(Clone)]
pub(super) struct Lane {
    exchange: Arc<Exchange>,
    pub rank: usize,
    number: usize,
}

/// A message that is here and that its sender still waits for.
pub(super) struct Arrived {
    pub payload: Payload,
    received: Arc<OnceLock<Instant>>,
    from: usize,
}

/// A message on its way.
pub(super) struct Sent {
    received: Arc<OnceLock<Instant>>,
    to: usize,
    header: Arc<Header>,
}

impl Exchange {
    /// The wire of a mesh of which `at_once` programs may compute at a time.
    pub(super) fn new(mesh: Arc<Mesh>, deadline: Duration, at_once: usize) -> Arc<Self> {
        let chips = mesh.chips();
        let state = State {
            lanes: (0..2 * chips)
                .map(|n| LaneState {
                    jobs: (n + 1) % 2,
                    waiting: None,
                })
                .collect(),
            ended: vec![false; chips],
            last_seen: vec![None; chips],
            turns: Turns::new(chips, at_once),
            ..State::default()
        };
        Arc::new(Exchange {
            bells: (0..2 * chips).map(|_| Condvar::new()).collect(),
            state: Mutex::new(state),
            poisoned: AtomicBool::new(false),
            mesh,
            deadline,
        })
    }

    pub(super) fn lane(self: &Arc<Self>, rank: usize) -> Lane {
        Lane {
            exchange: self.clone(),
            rank,
            number: 2 * rank,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock is held is a defect of this file; the state is still the best that can be reported.
        self.state
            .lock()
            .unwrap_or_else(|broken| broken.into_inner())
    }

    /// The run's error, if it has failed.
    pub(super) fn error(&self) -> Option<Error> {
        self.lock().error.clone()
    }

    /// `rank 3 (dp=1,tp=1)`.
    pub(super) fn name(&self, rank: usize) -> String {
        match self.mesh.axes().len() {
            0 => "the only chip".to_string(),
            _ => format!("rank {rank} ({})", self.mesh.coordinates(rank)),
        }
    }

    fn poison(&self, state: &mut State, error: Error) {
        state.error.get_or_insert(error);
        self.poisoned.store(true, SeqCst);
        self.bells.iter().for_each(Condvar::notify_all);
    }

    /// Stops the run because `rank` failed; the error gets the chip's name and its last place in the program.
    pub(super) fn fail(&self, rank: usize, error: Error) {
        let mut state = self.lock();
        // What concerns the whole run (a loss, a file) is no clearer for the chip that happened to say it.
        let local = matches!(error.kind(), ErrorKind::Chip | ErrorKind::Memory);
        let error = match &state.last_seen[rank] {
            Some(at) if local => error.within(format!("{}, at or after {at}", self.name(rank))),
            None if local => error.within(self.name(rank)),
            _ => error,
        };
        self.poison(&mut state, error);
        state.ended[rank] = true;
        self.leave_turn(&mut state, rank);
    }

    /// Notes that the program of `rank` returned.
    pub(super) fn end(&self, rank: usize) {
        let mut state = self.lock();
        state.ended[rank] = true;
        state.lanes[2 * rank].jobs = 0;
        self.leave_turn(&mut state, rank);
        self.diagnose(&mut state);
    }

    /// Lets another program compute in place of this one.
    fn leave_turn(&self, state: &mut State, rank: usize) {
        let next = state.turns.as_mut().and_then(|t| t.give_back(rank));
        if let Some(next) = next {
            self.bells[2 * next].notify_all();
        }
    }
}

impl State {
    fn satisfied(&self, until: &Until) -> bool {
        match until {
            Until::Message(channel) => self.queues.get(channel).is_some_and(|q| !q.is_empty()),
            Until::Received(when, _) => when.get().is_some(),
            Until::Done(flag) => flag.load(SeqCst),
        }
    }
}

impl Lane {
    /// The lane of this chip's transfers beside the program.
    pub(super) fn beside(&self) -> Lane {
        Lane {
            number: 2 * self.rank + 1,
            ..self.clone()
        }
    }

    /// Notes that this lane got something to do; a lane without is no reason for others to hope.
    pub(super) fn begin_job(&self) {
        self.exchange.lock().lanes[self.number].jobs += 1;
    }

    /// Notes that one thing is done.
    pub(super) fn end_job(&self) {
        let mut state = self.exchange.lock();
        state.lanes[self.number].jobs -= 1;
        self.exchange.diagnose(&mut state);
    }

    /// Notes where the program is.
    pub(super) fn arrive(&self, at: Whereabouts) -> Result<(), Stopped> {
        if self.exchange.poisoned.load(SeqCst) {
            return Err(Stopped);
        }
        let mut state = self.exchange.lock();
        state.last_seen[self.rank] = Some(at);
        if let Some(turns) = &mut state.turns
            && turns.arrive(self.rank)
        {
            self.exchange.leave_turn(&mut state, self.rank);
            drop(self.turn(state)?);
        }
        Ok(())
    }

    /// Waits until this chip's program may compute.
    pub(super) fn begin(&self) -> Result<(), Stopped> {
        self.turn(self.exchange.lock()).map(drop)
    }

    /// Waits for a turn, if this is a program's lane.
    fn turn<'a>(&self, mut state: MutexGuard<'a, State>) -> Result<MutexGuard<'a, State>, Stopped> {
        let bell = &self.exchange.bells[self.number];
        loop {
            if state.error.is_some() {
                return Err(Stopped);
            }
            let Some(turns) = state.turns.as_mut().filter(|_| self.is_program()) else {
                return Ok(state);
            };
            if turns.take(self.rank) {
                return Ok(state);
            }
            let before = turns.progress();
            let woken = bell.wait_timeout(state, PATIENCE);
            let (back, waited) = woken.unwrap_or_else(|broken| broken.into_inner());
            state = back;
            if let Some(turns) = &mut state.turns
                && waited.timed_out()
                && turns.progress() == before
            {
                turns.make_up(self.rank);
            }
        }
    }

    fn is_program(&self) -> bool {
        self.number == 2 * self.rank
    }

    /// The first rank to ask decides; see [`super::Chip::agree`].
    pub(super) fn agree(&self, key: u64, decide: impl FnOnce() -> bool) -> bool {
        let chips = self.exchange.mesh.chips();
        let mut state = self.exchange.lock();
        let entry = state.decisions.entry(key).or_insert_with(|| (decide(), 0));
        entry.1 += 1;
        let (decision, asked) = *entry;
        if asked == chips {
            state.decisions.remove(&key);
        }
        decision
    }

    /// Sends without waiting.
    pub(super) fn start_send(
        &self,
        channel: Channel,
        header: &Arc<Header>,
        payload: Payload,
    ) -> Result<Sent, Stopped> {
        let received = Arc::new(OnceLock::new());
        let message = Message {
            header: header.clone(),
            payload,
            received: received.clone(),
        };
        let mut state = self.exchange.lock();
        if state.error.is_some() {
            return Err(Stopped);
        }
        state.queues.entry(channel).or_default().push_back(message);
        for number in [2 * channel.to, 2 * channel.to + 1] {
            if let Some(Waiting {
                until: Until::Message(c),
                ..
            }) = &state.lanes[number].waiting
                && *c == channel
            {
                self.exchange.bells[number].notify_all();
            }
        }
        // A receiver that has returned will never take it: say so now, not when someone waits for it.
        Ok(Sent {
            received,
            to: channel.to,
            header: header.clone(),
        })
    }

    /// Waits until a message was received, and says when.
    pub(super) fn wait_sent(&self, sent: Sent) -> Result<Instant, Stopped> {
        let until = Until::Received(sent.received.clone(), sent.to);
        drop(self.wait(self.exchange.lock(), sent.header, until)?);
        let when = sent.received.get();
        Ok(*when.expect("the wait ended because it was received"))
    }

    /// Waits until `done` is set by [`Lane::set_done`].
    pub(super) fn wait_done(
        &self,
        done: &Arc<AtomicBool>,
        header: &Arc<Header>,
    ) -> Result<(), Stopped> {
        self.wait(
            self.exchange.lock(),
            header.clone(),
            Until::Done(done.clone()),
        )
        .map(|_| ())
    }

    /// Sets a flag that the program lane of this chip may wait for.
    pub(super) fn set_done(&self, done: &AtomicBool) {
        let _state = self.exchange.lock();
        done.store(true, SeqCst);
        self.exchange.bells[2 * self.rank].notify_all();
    }

    /// Waits for the next message on `channel`, of `len` bytes. Its sender counts it as received when it is
    /// [acknowledged](Lane::acknowledge).
    pub(super) fn take(
        &self,
        channel: Channel,
        header: &Arc<Header>,
        len: usize,
    ) -> Result<Arrived, Stopped> {
        let mut state = self.wait(
            self.exchange.lock(),
            header.clone(),
            Until::Message(channel),
        )?;
        let queue = state
            .queues
            .get_mut(&channel)
            .expect("the wait ended because a message is there");
        let message = queue
            .pop_front()
            .expect("the wait ended because a message is there");
        if queue.is_empty() {
            state.queues.remove(&channel);
        }
        let (here, there) = (channel.to, channel.from);
        let wrong = if message.header.signature != header.signature {
            format!(
                "{} is in {header} while {} is in {}; every chip must make the same calls in the same order",
                self.exchange.name(here),
                self.exchange.name(there),
                message.header
            )
        } else if message.payload.len() != len {
            format!(
                "{}: {header}: a message of {} bytes came from {} where {len} were expected",
                self.exchange.name(here),
                message.payload.len(),
                self.exchange.name(there),
            )
        } else {
            return Ok(Arrived {
                payload: message.payload,
                received: message.received,
                from: there,
            });
        };
        self.exchange
            .poison(&mut state, Error::new(ErrorKind::Chip, wrong));
        Err(Stopped)
    }

    /// Lets a message go: its sender counts it as received.
    pub(super) fn acknowledge(&self, arrived: Arrived) {
        // The payload goes before the sender hears of it, so that the sender is the last to hold the tensor.
        drop(arrived.payload);
        let state = self.exchange.lock();
        let first = arrived.received.set(Instant::now());
        first.expect("a message is received once");
        for number in [2 * arrived.from, 2 * arrived.from + 1] {
            let waiting = &state.lanes[number].waiting;
            if waiting.as_ref().is_some_and(|w| state.satisfied(&w.until)) {
                self.exchange.bells[number].notify_all();
            }
        }
    }

    /// Waits for the next message on `channel`, of as many bytes as `into` has, and copies it there.
    pub(super) fn receive(
        &self,
        channel: Channel,
        header: &Arc<Header>,
        into: &mut [u8],
    ) -> Result<(), Stopped> {
        let arrived = self.take(channel, header, into.len())?;
        let mut rest = into;
        for number in 0..arrived.payload.parts() {
            let part = arrived.payload.part(number);
            let (place, behind) = rest.split_at_mut(part.len());
            place.copy_from_slice(part);
            rest = behind;
        }
        self.acknowledge(arrived);
        Ok(())
    }

    fn wait<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        header: Arc<Header>,
        until: Until,
    ) -> Result<MutexGuard<'a, State>, Stopped> {
        let exchange = &*self.exchange;
        let began = Instant::now();
        state.lanes[self.number].waiting = Some(Waiting { header, until });
        loop {
            if state.error.is_some() {
                state.lanes[self.number].waiting = None;
                return Err(Stopped);
            }
            let waiting = state.lanes[self.number].waiting.as_ref();
            if state.satisfied(&waiting.expect("only this lane clears its wait").until) {
                let mut state = self.turn(state)?;
                state.lanes[self.number].waiting = None;
                return Ok(state);
            }
            if self.is_program() {
                exchange.leave_turn(&mut state, self.rank);
            }
            exchange.diagnose(&mut state);
            if state.error.is_some() {
                continue;
            }
            let left = exchange.deadline.saturating_sub(began.elapsed());
            if left.is_zero() {
                let error = self.overdue(&state);
                exchange.poison(&mut state, error);
                continue;
            }
            let woken = exchange.bells[self.number].wait_timeout(state, left);
            state = woken.unwrap_or_else(|broken| broken.into_inner()).0;
        }
    }
}
