//! Copies of blocks to the host: started with what was recorded before them, and waited for when somebody reads.
//!
//! A copy that is started runs on the device ahead of what is recorded after it. Whoever waits for it waits for that much and no more,
//! while the program records and submits what comes next.

use super::chip::{Block, Chip, Held, Hidden};
use crate::error::Result;

/// A copy on its way to the host.
pub(crate) struct Download(Box<dyn Hidden<Flight>>);

pub(super) struct Flight {
    staging: Held,
    submission: wgpu::SubmissionIndex,
}

impl Hidden<Flight> for Flight {
    fn seen(&self) -> &Flight {
        self
    }
}

impl Chip {
    /// Starts to copy the first `bytes` of a block to the host, after all that was recorded before, which is submitted with it.
    pub(crate) fn start_read(&self, block: &Block, bytes: u64) -> Download {
        self.start_download(block.buffer.seen(), bytes)
    }

    /// Waits for a copy that was started, and puts it into `bytes`, which are as many or fewer.
    ///
    /// # Errors
    /// As [`Chip::finish`].
    pub(crate) fn finish_read(&self, download: Download, bytes: &mut [u8]) -> Result<()> {
        let Flight {
            staging,
            submission,
        } = download.0.seen();
        self.device().wait(submission.clone())?;
        let view = staging
            .seen()
            .get_mapped_range(..)
            .map_err(|e| self.refused("a download", &e))?;
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
        let download = self.start_download(buffer, bytes.len() as u64);
        self.finish_read(download, bytes)
    }

    fn start_download(&self, buffer: &wgpu::Buffer, bytes: u64) -> Download {
        let size = bytes.next_multiple_of(4);
        let staging = self.device().device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("download"),
            size,
            usage: wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ,
            mapped_at_creation: false,
        });
        self.record(|encoder, _| {
            encoder.copy_buffer_to_buffer(buffer, 0, &staging, 0, size);
        });
        self.note("copy to the host");
        let submission = self.submit_recorded().expect("a copy was submitted");
        staging.map_async(wgpu::MapMode::Read, .., |_| {});
        self.note("map");
        Download(Box::new(Flight {
            staging: std::sync::Arc::new(staging),
            submission,
        }))
    }
}
