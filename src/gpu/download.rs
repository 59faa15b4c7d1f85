//! Copies of blocks to the host: started with what was recorded before them, and waited for when somebody reads.
//!
//! A copy that is started runs on the device ahead of what is recorded after it. Whoever waits for it waits for that much and no more,
//! while the program records and submits what comes next. Blocks that are sent together come in one piece of host memory, by one
//! submission.

use super::chip::{Block, Chip, Held, Hidden};
use super::clock::{ROOM, STAMPS};
use crate::error::Result;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// A block on its way to the host.
pub(crate) struct Download {
    flight: Arc<dyn Hidden<Flight>>,
    /// Where it begins in the flight.
    at: u64,
}

/// What goes to the host by one submission.
pub(super) struct Flight {
    staging: Held,
    submission: wgpu::SubmissionIndex,
    /// Numbers of copies whose stamps lie behind `bytes`, until they are read.
    stamped: Mutex<Vec<u64>>,
    bytes: u64,
}

impl Hidden<Flight> for Flight {
    fn seen(&self) -> &Flight {
        self
    }
}

impl Flight {
    /// Waits until all of it is on the host.
    pub(super) fn wait(flight: &Arc<dyn Hidden<Flight>>, chip: &Chip) -> Result<()> {
        let flight = flight.seen();
        chip.device().wait(flight.submission.clone())?;
        let stamped = flight.stamped.lock();
        let stamped = std::mem::take(&mut *stamped.unwrap_or_else(PoisonError::into_inner));
        if !stamped.is_empty() {
            let end = flight.bytes + STAMPS * stamped.len() as u64;
            let stamps = flight.view(chip, flight.bytes..end)?;
            if let Some(clock) = &mut *chip.clock() {
                clock.arrived(&stamped, &stamps);
            }
        }
        Ok(())
    }

    fn view(&self, chip: &Chip, range: Range<u64>) -> Result<wgpu::BufferView> {
        let view = self.staging.seen().get_mapped_range(range);
        view.map_err(|e| chip.refused("a download", &e))
    }
}

impl Chip {
    /// Starts to copy the first bytes of blocks to the host, after all that was recorded before, which is submitted with them: one
    /// copy with this number, if it has one.
    pub(crate) fn start_reads(
        &self,
        blocks: &[(&Block, u64)],
        number: Option<u64>,
    ) -> Vec<Download> {
        let most = self.device().limits.max_buffer_size - ALL_STAMPS;
        let mut downloads = Vec::new();
        let mut rest = blocks;
        while !rest.is_empty() {
            // As many as fit into one buffer of the host.
            let mut sum = 0;
            let fitting = rest.iter().take_while(|(_, bytes)| {
                sum += bytes.next_multiple_of(ALIGNED);
                sum <= most
            });
            let (now, later) = rest.split_at(fitting.count().max(1));
            let mut end = 0;
            let places: Vec<u64> = now
                .iter()
                .map(|(_, bytes)| {
                    end += bytes.next_multiple_of(ALIGNED);
                    end - bytes.next_multiple_of(ALIGNED)
                })
                .collect();
            let flight = self.start_flight(end, |encoder, staging| {
                self.stamped(encoder, number, |encoder| {
                    for ((block, bytes), at) in now.iter().zip(&places) {
                        let (from, size) = (block.buffer.seen(), bytes.next_multiple_of(4));
                        encoder.copy_buffer_to_buffer(from, 0, staging, *at, size);
                    }
                });
            });
            downloads.extend(places.into_iter().map(|at| Download {
                flight: flight.clone(),
                at,
            }));
            rest = later;
        }
        downloads
    }

    /// Waits for a copy that was started, and puts it into `bytes`, which are as many or fewer.
    ///
    /// # Errors
    /// As [`Chip::finish`].
    pub(crate) fn finish_read(&self, download: Download, bytes: &mut [u8]) -> Result<()> {
        Flight::wait(&download.flight, self)?;
        let end = download.at + (bytes.len() as u64).next_multiple_of(4);
        let view = download.flight.seen().view(self, download.at..end)?;
        bytes.copy_from_slice(&view[..bytes.len()]);
        Ok(())
    }

    /// Copies the block's first bytes to `bytes`, after all that was recorded before.
    ///
    /// # Errors
    /// As [`Chip::finish`].
    pub(crate) fn read(&self, block: &Block, bytes: &mut [u8]) -> Result<()> {
        self.download(block.buffer.seen(), bytes)
    }

    pub(super) fn download(&self, buffer: &wgpu::Buffer, bytes: &mut [u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let size = (bytes.len() as u64).next_multiple_of(4);
        let flight = self.start_flight(size.next_multiple_of(ALIGNED), |encoder, staging| {
            encoder.copy_buffer_to_buffer(buffer, 0, staging, 0, size);
        });
        self.finish_read(Download { flight, at: 0 }, bytes)
    }

    /// Records copies to `bytes` of host memory, and submits them with all that was recorded before.
    pub(super) fn start_flight(
        &self,
        bytes: u64,
        record: impl FnOnce(&mut wgpu::CommandEncoder, &wgpu::Buffer),
    ) -> Arc<dyn Hidden<Flight>> {
        let stamps = if self.clock().is_some() {
            ALL_STAMPS
        } else {
            0
        };
        let staging = self.device().device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("download"),
            size: bytes + stamps,
            usage: wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ,
            mapped_at_creation: false,
        });
        let stamped = self.record(|encoder, _| {
            record(encoder, &staging);
            let clock = &mut *self.clock();
            clock
                .as_mut()
                .map_or_else(Vec::new, |c| c.send(encoder, &staging, bytes))
        });
        self.note("copy to the host");
        let submission = self.submit_recorded().expect("a copy was submitted");
        staging.map_async(wgpu::MapMode::Read, .., |_| {});
        self.note("map");
        Arc::new(Flight {
            staging: Arc::new(staging),
            submission,
            stamped: Mutex::new(stamped),
            bytes,
        })
    }
}

/// Bytes of all stamps that a download may bring.
const ALL_STAMPS: u64 = STAMPS * ROOM as u64;

/// Bytes to which places in a mapped buffer are aligned.
const ALIGNED: u64 = wgpu::MAP_ALIGNMENT;
