//! What went through host memory: transfers of a graphics processor's chip lead through it.

use super::{ChipTrace, Event, Time};
use serde::{Deserialize, Serialize};

/// A copy between a graphics processor and host memory, through which goes what its chip sends to others and gets from them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCopy {
    /// Which of the chip's copies it is, from 0 on.
    pub number: u64,
    /// To the host, or else to the device.
    pub to_host: bool,
    /// Bytes.
    pub bytes: u64,
    /// When it ran, by the device's clock, set against the host's when the run began. None in a ghost, and where the device has no
    /// stamps between commands.
    pub time: Option<Time>,
}

/// All copies of a chip through host memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostTotal {
    /// Bytes copied to the host, to be sent or added there.
    pub to_host: u64,
    /// Bytes copied to the device that came from other chips.
    pub to_device: u64,
    /// Nanoseconds of the copies to the host, by the device's clock; 0 where it has none, and in a ghost.
    #[serde(default)]
    pub to_host_ns: u64,
    /// Nanoseconds of the copies to the device, likewise.
    #[serde(default)]
    pub to_device_ns: u64,
}

impl HostTotal {
    /// Adds the bytes of a copy.
    pub(super) fn add(&mut self, copy: &HostCopy) {
        match copy.to_host {
            true => self.to_host += copy.bytes,
            false => self.to_device += copy.bytes,
        }
    }

    /// Adds the time of a copy.
    pub(super) fn add_time(&mut self, to_host: bool, time: Time) {
        match to_host {
            true => self.to_host_ns += time.duration_ns,
            false => self.to_device_ns += time.duration_ns,
        }
    }
}

impl Event {
    /// Bytes copied to the host and to the device.
    pub fn host_bytes(&self) -> [u64; 2] {
        let mut total = HostTotal::default();
        self.host.iter().for_each(|copy| total.add(copy));
        [total.to_host, total.to_device]
    }
}

impl ChipTrace {
    /// What went through host memory at two events, if both chips count it and it differs.
    pub(super) fn difference_of_copies(
        &self,
        event: &Event,
        other: &ChipTrace,
        of_other: &Event,
    ) -> Option<String> {
        self.host.and(other.host)?;
        let (a, b) = (event.host_bytes(), of_other.host_bytes());
        (a != b).then(|| {
            format!(
                "{} at {} in '{}' copied {a:?} and {b:?} bytes to the host and to the device",
                event.op,
                self.site(event),
                self.scope(event)
            )
        })
    }
}
