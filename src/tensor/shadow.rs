//! A ghost of contents: where those on a graphics processor would be, and what would be copied.

use super::copies::Copies;
use super::memory::Charge;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes charged, and where the contents would be if the ghost stands for a graphics processor.
pub(super) struct Shadow {
    charge: Charge,
    place: Option<Mutex<Where>>,
}

/// As `Mirrored` has it of real contents.
#[derive(Clone, Copy)]
struct Where {
    on_host: bool,
    /// The device lacks what the host has.
    stale: bool,
    /// Bytes that came from another chip and that the device lacks.
    arrived: u64,
}

impl Shadow {
    /// Contents are first of all written by the host, unless a kernel writes them.
    pub(super) fn new(charge: Charge, mirrored: bool) -> Self {
        let begin = Where {
            on_host: true,
            stale: true,
            arrived: 0,
        };
        Shadow {
            charge,
            place: mirrored.then(|| Mutex::new(begin)),
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.charge.bytes
    }

    pub(super) fn copies(&self) -> &Copies {
        &self.charge.memory.0.copies
    }

    fn place(&self) -> Option<MutexGuard<'_, Where>> {
        self.place
            .as_ref()
            .map(|p| p.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn is_on_host(&self) -> bool {
        self.place().is_none_or(|p| p.on_host)
    }

    pub(super) fn is_stale(&self) -> bool {
        self.place().is_none_or(|p| p.stale)
    }

    pub(super) fn arrived(&self) -> u64 {
        self.place().map_or(0, |p| p.arrived)
    }

    /// The contents go to the host; true if they were not there.
    pub(super) fn download(&self) -> bool {
        self.place()
            .is_some_and(|mut p| !std::mem::replace(&mut p.on_host, true))
    }

    pub(super) fn has_arrived(&self, bytes: u64) {
        if let Some(mut p) = self.place() {
            *p = Where {
                on_host: true,
                stale: true,
                arrived: bytes,
            };
        }
    }

    /// The contents go to the device, with how many bytes of another chip's; none if they are there.
    pub(super) fn leaves_the_host(&self) -> Option<u64> {
        let mut p = self.place()?;
        let stale = std::mem::replace(&mut p.stale, false);
        stale.then(|| std::mem::take(&mut p.arrived))
    }

    pub(super) fn overwrite(&self) {
        if let Some(mut p) = self.place() {
            p.on_host = false;
        }
    }
}
