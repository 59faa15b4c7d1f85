//! Messages from one chip to another along a mesh axis. Peers are named by axis and distance, so that a ghost's classes hold.

use super::apply::Told;
use super::exchange::{Channel, Header, Payload, Stopped};
use super::redistribute::Site;
use super::{Chip, Sharded};
use crate::dtype::TensorType;
use crate::ops::Cost;
use crate::trace::{EventKind, Stream, Traffic, Value};
use std::panic::Location;
use std::sync::Arc;

impl Chip {
    /// Sends this chip's share to the chip `offset` further along `axis` (cyclic), and returns when it was received.
    ///
    /// # Panics
    /// If the mesh has no such axis.
    #[track_caller]
    pub fn send(&self, x: &Sharded, axis: &str, offset: isize) {
        let site = Location::caller();
        self.mesh().axis_index(axis);
        self.arrive("send", site);
        let began = self.now();
        if let Some(lane) = &self.inner().lane {
            let to = self.mesh().peer(self.rank(), axis, offset);
            let channel = Channel {
                from: self.rank(),
                to,
                call: (self.mesh().axes().len(), 0),
            };
            let header = Arc::new(self.message_header(axis, x.tensor.ty(), site));
            let bytes = 0..x.tensor.ty().bytes() as usize;
            let sent = lane.start_send(channel, &header, Payload::Shared(x.tensor.clone(), bytes));
            sent.and_then(|s| lane.wait_sent(s))
                .unwrap_or_else(|Stopped| std::panic::resume_unwind(Box::new(Stopped)));
        }
        self.tell_message(EventKind::Send, &x.traced(), axis, offset, site, began);
    }

    /// Receives a share of known type from the chip `offset` further along `axis` (cyclic).
    ///
    /// # Panics
    /// If the mesh has no such axis.
    #[track_caller]
    pub fn receive(&self, ty: &TensorType, axis: &str, offset: isize) -> Sharded {
        let site = Location::caller();
        self.mesh().axis_index(axis);
        self.arrive("receive", site);
        let mut tensor = self.allocate(ty);
        let began = self.now();
        if let Some(lane) = &self.inner().lane {
            let from = self.mesh().peer(self.rank(), axis, offset);
            let channel = Channel {
                from,
                to: self.rank(),
                call: (self.mesh().axes().len(), 0),
            };
            let header = Arc::new(self.message_header(axis, ty, site));
            lane.receive(channel, &header, |bytes| {
                tensor.bytes_mut().copy_from_slice(bytes);
                Ok(())
            })
            .unwrap_or_else(|Stopped| std::panic::resume_unwind(Box::new(Stopped)));
        }
        let value = Sharded::unrecorded(self, tensor, ty.shape.clone(), self.replicated());
        self.tell_message(
            EventKind::Receive,
            &value.traced(),
            axis,
            offset,
            site,
            began,
        );
        value
    }

    fn message_header(&self, axis: &str, ty: &TensorType, site: Site) -> Header {
        Header {
            signature: format!("message over {axis} of {ty}"),
            scope: self.recorder().scope_name(),
            site,
        }
    }

    fn tell_message(
        &self,
        kind: EventKind,
        value: &Value,
        axis: &str,
        offset: isize,
        site: Site,
        began: Option<u64>,
    ) {
        let bytes = if kind == EventKind::Send {
            value.ty.bytes()
        } else {
            0
        };
        let values = vec![value.clone()];
        let (inputs, outputs) = if kind == EventKind::Send {
            (values, vec![])
        } else {
            (vec![], values)
        };
        self.tell(Told {
            kind,
            op: if kind == EventKind::Send {
                "send"
            } else {
                "receive"
            }
            .into(),
            site,
            inputs,
            outputs,
            cost: Cost::default(),
            traffic: Some(Traffic {
                axis: axis.to_string(),
                chips: self.size_of(axis),
                collective: None,
                offset: Some(offset),
                bytes,
                floor_bytes: bytes,
            }),
            stream: Stream::Compute,
            ticket: None,
            began,
        });
    }
}
