//! Messages from one chip to another along a mesh axis. Peers are named by axis and distance, so that a ghost's classes hold.
//!
//! Messages between two chips keep their order. Those that carry a tag are found by it, in any order: a pipeline's stages
//! send values and gradients of several chunks to each other, and each receives what it needs next.

use super::apply::Told;
use super::exchange::{Channel, Header, Sent, Stopped};
use super::payload::{Payload, Piece};
use super::redistribute::Site;
use super::{Chip, Sharded};
use crate::dtype::{DType, TensorType};
use crate::ops::Cost;
use crate::placement::Placements;
use crate::tensor::Tensor;
use crate::trace::{EventKind, Stream, Time, Traffic, Value};
use std::panic::Location;
use std::sync::Arc;
use std::time::Instant;

/// Where a message goes or comes from: along an axis, so far, under a tag if it has one.
#[derive(Clone, Copy)]
struct Route<'a> {
    axis: &'a str,
    offset: isize,
    tag: Option<u64>,
}

/// A message that was started and not yet waited for.
#[must_use = "a started message has to be waited for"]
pub struct Sending {
    chip: Chip,
    value: Tensor,
    sent: Option<Sent>,
    began: Option<Instant>,
    ticket: u64,
}

impl Chip {
    /// Sends this chip's share to the chip `offset` further along `axis` (cyclic), and returns when it was received.
    ///
    /// # Panics
    /// If the mesh has no such axis.
    #[track_caller]
    pub fn send(&self, x: &Sharded, axis: &str, offset: isize) {
        let site = Location::caller();
        let route = Route {
            axis,
            offset,
            tag: None,
        };
        self.arrive("send", site);
        let began = self.now();
        if let (Some(sent), Some(lane)) = (self.post(x, route, site), &self.inner().lane) {
            lane.wait_sent(sent)
                .unwrap_or_else(|Stopped| std::panic::resume_unwind(Box::new(Stopped)));
        }
        self.tell_message(x.traced(), EventKind::Send, route, site, None, began);
    }

    /// Starts to send this chip's share to the chip `offset` further along `axis` (cyclic), under a tag by which
    /// [`Chip::receive_tagged`] finds it. The program goes on; it must not end before [`Sending::wait`].
    ///
    /// # Panics
    /// If the mesh has no such axis.
    #[track_caller]
    pub fn start_send(&self, x: &Sharded, axis: &str, offset: isize, tag: u64) -> Sending {
        let site = Location::caller();
        let route = Route {
            axis,
            offset,
            tag: Some(tag),
        };
        self.arrive("send", site);
        let (began, clock) = (self.now(), Instant::now());
        let sent = self.post(x, route, site);
        let ticket = self.open_ticket();
        self.tell_message(
            x.traced(),
            EventKind::Send,
            route,
            site,
            Some(ticket),
            began,
        );
        Sending {
            chip: self.clone(),
            value: x.tensor.clone(),
            began: sent.is_some().then_some(clock),
            sent,
            ticket,
        }
    }

    /// Receives a share of known type from the chip `offset` further along `axis` (cyclic).
    ///
    /// # Panics
    /// If the mesh has no such axis.
    #[track_caller]
    pub fn receive(&self, ty: &TensorType, axis: &str, offset: isize) -> Sharded {
        let route = Route {
            axis,
            offset,
            tag: None,
        };
        let tensor = self.take_message(ty, route, Location::caller(), &self.replicated());
        Sharded::unrecorded(self, tensor, ty.shape.clone(), self.replicated())
    }

    /// Receives what the chip `offset` further along `axis` (cyclic) sends under `tag`: its share of a tensor of the whole
    /// `shape`, which lies on both as `placements` say.
    ///
    /// # Panics
    /// If the mesh has no such axis, or the placements do not fit the shape.
    #[track_caller]
    pub fn receive_tagged(
        &self,
        (shape, dtype, placements): (&[usize], DType, &Placements),
        axis: &str,
        offset: isize,
        tag: u64,
    ) -> Sharded {
        let site = Location::caller();
        let placements = self.normalize(placements);
        let route = Route {
            axis,
            offset,
            tag: Some(tag),
        };
        let ty = self.local(shape, dtype, &placements, site).ty;
        let tensor = self.take_message(&ty, route, site, &placements);
        Sharded::unrecorded(self, tensor, shape.to_vec(), placements)
    }

    /// Puts the message on its way; nothing in a ghost.
    fn post(&self, x: &Sharded, route: Route, site: Site) -> Option<Sent> {
        self.mesh().axis_index(route.axis);
        Tensor::start_downloads([&x.tensor]);
        let lane = self.inner().lane.as_ref()?;
        let channel = Channel {
            from: self.rank(),
            to: self.mesh().peer(self.rank(), route.axis, route.offset),
            call: self.queue(route),
        };
        let header = Arc::new(self.message_header(route, x.tensor.ty(), site));
        let payload = Payload::Shared(vec![Piece::whole(&x.tensor)]);
        let sent = lane.start_send(channel, &header, payload);
        let sent = sent.unwrap_or_else(|Stopped| std::panic::resume_unwind(Box::new(Stopped)));
        Some(sent)
    }

    fn take_message(&self, ty: &TensorType, route: Route, site: Site, p: &Placements) -> Tensor {
        self.mesh().axis_index(route.axis);
        self.arrive("receive", site);
        let mut tensor = self.allocate(ty);
        let began = self.now();
        if let Some(lane) = &self.inner().lane {
            let channel = Channel {
                from: self.mesh().peer(self.rank(), route.axis, route.offset),
                to: self.rank(),
                call: self.queue(route),
            };
            let header = Arc::new(self.message_header(route, ty, site));
            self.submit_recorded();
            lane.receive(channel, &header, tensor.bytes_mut())
                .unwrap_or_else(|Stopped| std::panic::resume_unwind(Box::new(Stopped)));
        }
        tensor.has_arrived();
        let value = Value {
            ty: ty.clone(),
            placement: p.clone(),
        };
        self.tell_message(value, EventKind::Receive, route, site, None, began);
        tensor
    }

    /// The queue between two chips: the numbers of collectives' axes are below those of messages.
    fn queue(&self, route: Route) -> (usize, u64) {
        let axes = self.mesh().axes().len();
        match route.tag {
            None => (axes, 0),
            Some(tag) => (axes + 1 + self.mesh().axis_index(route.axis), tag),
        }
    }

    fn message_header(&self, route: Route, ty: &TensorType, site: Site) -> Header {
        let tag = route.tag.map_or_else(String::new, |tag| format!(" {tag}"));
        Header {
            signature: format!("message{tag} over {} of {ty}", route.axis),
            scope: self.recorder().scope_name(),
            site,
        }
    }

    fn tell_message(
        &self,
        value: Value,
        kind: EventKind,
        route: Route,
        site: Site,
        ticket: Option<u64>,
        began: Option<u64>,
    ) {
        let sends = kind == EventKind::Send;
        let bytes = if sends { value.ty.bytes() } else { 0 };
        let (inputs, outputs) = match sends {
            true => (vec![value], vec![]),
            false => (vec![], vec![value]),
        };
        self.tell(Told {
            kind,
            op: if sends { "send" } else { "receive" }.into(),
            site,
            inputs,
            outputs,
            cost: Cost::default(),
            traffic: Some(Traffic {
                axis: route.axis.to_string(),
                chips: self.size_of(route.axis),
                stride: None,
                collective: None,
                offset: Some(route.offset),
                bytes,
                floor_bytes: bytes,
            }),
            stream: match ticket {
                Some(_) => Stream::Communication,
                None => Stream::Compute,
            },
            ticket,
            began,
        });
    }
}

impl Sending {
    /// Waits until the message was received; the sent tensor may go then.
    #[track_caller]
    pub fn wait(self) {
        let (chip, site) = (self.chip, Location::caller());
        chip.arrive("wait", site);
        let began = chip.now();
        if let (Some(sent), Some(lane)) = (self.sent, &chip.inner().lane) {
            chip.submit_recorded();
            let received = lane
                .wait_sent(sent)
                .unwrap_or_else(|Stopped| std::panic::resume_unwind(Box::new(Stopped)));
            let start = self.began.expect("a message on its way began");
            let nanoseconds = |at: Instant| chip.since_began(at).as_nanos() as u64;
            let time = Time {
                start_ns: nanoseconds(start),
                duration_ns: received.saturating_duration_since(start).as_nanos() as u64,
            };
            chip.recorder().complete(self.ticket, time);
        }
        drop(self.value);
        chip.close_ticket(self.ticket);
        chip.tell(Told {
            kind: EventKind::Wait,
            op: "wait".into(),
            site,
            inputs: vec![],
            outputs: vec![],
            cost: Cost::default(),
            traffic: None,
            stream: Stream::Compute,
            ticket: Some(self.ticket),
            began,
        });
    }
}
