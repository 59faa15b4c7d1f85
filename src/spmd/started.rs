//! Transfers that are started and waited for later: they run in order on a thread beside the chip's program.

use super::apply::Told;
use super::exchange::{Header, Stopped};
use super::execute::Call;
use super::payload::Piece;
use super::redistribute::{Request, Site};
use super::{Chip, Sharded};
use crate::dtype::TensorType;
use crate::ops::Cost;
use crate::placement::{Placements, Transition, plan};
use crate::tensor::Tensor;
use crate::trace::{EventKind, Stream, Time, Value};
use std::panic::Location;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, mpsc};

/// Where a transfer that was started delivers: the results, and when it ran.
type Slot = Arc<Mutex<Option<(Vec<Tensor>, Time)>>>;

type Job = Box<dyn FnOnce() + Send>;

/// The thread that runs a chip's started transfers, in order.
pub(super) struct Beside {
    jobs: mpsc::Sender<Job>,
}

/// A transfer that was started and not yet waited for.
#[must_use = "a started transfer has to be waited for"]
pub struct Pending {
    value: Sharded,
    moving: Moving,
}

/// A tensor on its way to another placement.
pub(super) struct Moving {
    request: Request,
    ticket: u64,
    transition: Transition,
    global: Vec<usize>,
    input: Tensor,
    running: Running,
}

/// A collective of a share by itself, under way: no placement changes and no tape knows of it.
#[must_use = "a started transfer has to be waited for"]
pub(super) struct Passing {
    ticket: u64,
    /// What comes, as one tensor.
    value: Value,
    site: Site,
    input: Vec<Piece>,
    running: Running,
}

struct Running {
    done: Arc<AtomicBool>,
    slot: Slot,
    header: Arc<Header>,
}

impl Chip {
    #[track_caller]
    pub(super) fn start_redistribute(&self, x: &Sharded, to: &Placements) -> Pending {
        let site = Location::caller();
        let to = self.normalize(to);
        self.arrive("redistribute", site);
        let steps = plan(&x.placements, &to, &x.global, self.mesh())
            .unwrap_or_else(|why| panic!("start_redistribute of {x:?}: {why} (called at {site})"));
        let [(axis, transition)] = steps[..] else {
            panic!(
                "start_redistribute of {x:?} to {to} takes {} transitions; start one at a time (called at {site})",
                steps.len()
            )
        };
        assert!(
            transition.communicates(),
            "{transition} of {x:?} sends nothing; use redistribute (called at {site})"
        );
        Pending {
            value: x.clone(),
            moving: self.start_transition(
                &x.tensor,
                &x.global,
                axis,
                transition,
                (&x.placements, &to),
                site,
            ),
        }
    }

    /// Starts to move a tensor outside of the tape; none if it takes several transitions, or sends nothing.
    pub(super) fn start_move(
        &self,
        tensor: &Tensor,
        global: &[usize],
        from: &Placements,
        to: &Placements,
        site: Site,
    ) -> Option<Moving> {
        let steps = plan(from, to, global, self.mesh()).ok()?;
        match steps[..] {
            [(axis, transition)] if transition.communicates() => {
                self.arrive("start", site);
                Some(self.start_transition(tensor, global, axis, transition, (from, to), site))
            }
            _ => None,
        }
    }

    fn start_transition(
        &self,
        tensor: &Tensor,
        global: &[usize],
        axis: usize,
        transition: Transition,
        (from, to): (&Placements, &Placements),
        site: Site,
    ) -> Moving {
        let (input, request) = self.prepare(tensor, global, axis, transition, from, to, site);
        let (alone, result) = ([Piece::whole(&input)], [request.result.clone()]);
        let (ticket, running) = self.launch(&alone, input.ty(), &result, &request);
        Moving {
            request,
            ticket,
            transition,
            global: global.to_vec(),
            input,
            running,
        }
    }

    /// Starts a collective of a share by itself.
    pub(super) fn start_collective(&self, input: Tensor, request: Request) -> Passing {
        let (ty, result) = (input.ty().clone(), request.result.clone());
        self.start_over(vec![Piece::whole(&input)], &ty, &[result], request)
    }

    /// Starts a collective over pieces that are a tensor of type `ty` when they lie one behind the other; so are the results, of
    /// the types `results`.
    pub(super) fn start_over(
        &self,
        input: Vec<Piece>,
        ty: &TensorType,
        results: &[TensorType],
        request: Request,
    ) -> Passing {
        let (ticket, running) = self.launch(&input, ty, results, &request);
        Passing {
            ticket,
            value: Value {
                ty: request.result,
                placement: request.after,
            },
            site: request.site,
            input,
            running,
        }
    }

    /// Starts a collective and writes its event.
    fn launch(
        &self,
        input: &[Piece],
        ty: &TensorType,
        results: &[TensorType],
        request: &Request,
    ) -> (u64, Running) {
        let output = results.iter().map(|ty| self.allocate(ty)).collect();
        let ticket = self.open_ticket();
        self.start_downloads(input.iter().map(|piece| &piece.tensor), request);
        let running = match self.call(ty, request) {
            Some(call) => self.start(call, input.to_vec(), output),
            // A ghost's results are allocated and wait for nothing.
            None => Running::finished(output),
        };
        let (stream, began) = (Stream::Communication, self.now());
        self.tell_collective(ty, request, stream, Some(ticket), began);
        (ticket, running)
    }

    /// Waits for a started transfer.
    fn take(&self, ticket: u64, running: Running) -> Vec<Tensor> {
        if let Some(lane) = &self.inner().lane {
            self.submit_recorded();
            lane.wait_done(&running.done, &running.header)
                .unwrap_or_else(|Stopped| std::panic::resume_unwind(Box::new(Stopped)));
        }
        let delivered = running
            .slot
            .lock()
            .unwrap_or_else(|broken| broken.into_inner())
            .take();
        let (results, time) = delivered.expect("a transfer that is done has delivered");
        self.close_ticket(ticket);
        results.iter().for_each(Tensor::has_arrived);
        if results.len() > 1 {
            // A bucket: kernels read all of it, and one copy brings it back.
            Tensor::upload_all(&results);
        }
        if !self.is_ghost() {
            self.recorder().complete(ticket, time);
        }
        results
    }

    /// Writes the event of a wait that began at `began` and brought `value`.
    fn tell_wait(&self, ticket: u64, value: Value, site: Site, began: Option<u64>) {
        self.tell(Told {
            kind: EventKind::Wait,
            op: "wait".into(),
            site,
            inputs: vec![],
            outputs: vec![value],
            cost: Cost::default(),
            traffic: None,
            stream: Stream::Compute,
            ticket: Some(ticket),
            began,
        });
    }

    /// Waits for a tensor that is on its way.
    pub(super) fn finish_move(&self, moving: Moving, site: Site) -> Tensor {
        self.arrive("wait", site);
        let began = self.now();
        let result = only(self.take(moving.ticket, moving.running));
        drop(moving.input);
        let (axis, after) = (moving.request.axis, moving.request.after);
        let tensor = self.unpack(
            result,
            &moving.global,
            axis,
            moving.transition,
            &after,
            site,
        );
        let value = Value {
            ty: tensor.ty().clone(),
            placement: after,
        };
        self.tell_wait(moving.ticket, value, site, began);
        tensor
    }

    fn start(&self, call: Call, input: Vec<Piece>, output: Vec<Tensor>) -> Running {
        let done = Arc::new(AtomicBool::new(false));
        let slot: Slot = Arc::default();
        let header = call.header.clone();
        let began = self.now().unwrap_or(0);
        let clock = std::time::Instant::now();
        let (flag, delivery) = (done.clone(), slot.clone());
        let lane = call.lane.beside();
        lane.begin_job();
        let call = Call {
            lane: lane.clone(),
            ..call
        };
        let job = move || {
            let start_ns = began + clock.elapsed().as_nanos() as u64;
            let mut output = output;
            let finished = call.run(&input, &mut output);
            let end = began + clock.elapsed().as_nanos() as u64;
            // The program's handle must be the last one, so that memory is freed in program order.
            drop(input);
            if finished.is_ok() {
                let time = Time {
                    start_ns,
                    duration_ns: end - start_ns,
                };
                *delivery.lock().unwrap_or_else(|broken| broken.into_inner()) =
                    Some((output, time));
                lane.set_done(&flag);
            }
            lane.end_job();
        };
        self.beside(Box::new(job));
        Running { done, slot, header }
    }

    /// Hands a job to the thread for started transfers, which lives as long as the chip.
    fn beside(&self, job: Job) {
        let mut beside = self.inner().beside.borrow_mut();
        let beside = beside.get_or_insert_with(|| {
            let (jobs, queue) = mpsc::channel::<Job>();
            let name = format!("transfers of rank {}", self.rank());
            let work = move || queue.into_iter().for_each(|job| job());
            let started = std::thread::Builder::new().name(name).spawn(work);
            started.unwrap_or_else(|e| {
                let what = format!("cannot start a thread for transfers: {e}");
                self.fail(crate::Error::new(crate::ErrorKind::Io, what))
            });
            Beside { jobs }
        });
        beside
            .jobs
            .send(job)
            .expect("the thread ends only when this sender is dropped");
    }
}

impl Running {
    /// What a ghost waits for.
    fn finished(output: Vec<Tensor>) -> Self {
        let time = Time {
            start_ns: 0,
            duration_ns: 0,
        };
        let header = Header {
            signature: String::new(),
            scope: "".into(),
            site: Location::caller(),
        };
        Running {
            done: Arc::new(AtomicBool::new(true)),
            slot: Arc::new(Mutex::new(Some((output, time)))),
            header: Arc::new(header),
        }
    }
}

impl Passing {
    /// Where it was started.
    pub(super) fn site(&self) -> Site {
        self.site
    }

    /// Waits for the transfer and returns what arrived.
    pub(super) fn wait(self, chip: &Chip) -> Tensor {
        only(self.wait_all(chip))
    }

    /// Waits for the transfer and returns the tensors that it brought.
    pub(super) fn wait_all(self, chip: &Chip) -> Vec<Tensor> {
        chip.arrive("wait", self.site);
        let began = chip.now();
        let results = chip.take(self.ticket, self.running);
        drop(self.input);
        chip.tell_wait(self.ticket, self.value, self.site, began);
        results
    }
}

fn only(mut results: Vec<Tensor>) -> Tensor {
    let result = results.pop();
    result.expect("a transfer of one tensor brings one")
}

impl Pending {
    /// Waits for the transfer and returns the moved tensor.
    #[track_caller]
    pub fn wait(self) -> Sharded {
        let site = Location::caller();
        let chip = self.value.chip.clone();
        let after = self.moving.request.after.clone();
        let tensor = chip.finish_move(self.moving, site);
        let mut moved = Sharded::unrecorded(&chip, tensor, self.value.global.clone(), after);
        chip.record_passage(&self.value, &mut moved, |p, t| (p, t), site);
        moved
    }
}
