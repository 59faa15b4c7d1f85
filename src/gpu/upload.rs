//! Copies of the host's bytes to blocks, in the order of the commands around them.

use super::chip::{Block, Chip, Recording, fail};

/// Uploads up to this many bytes share staging buffers, which go round; larger ones have their own.
const STAGED: u64 = 1 << 20;

impl Chip {
    /// Copies `bytes` to the block, after what was recorded before.
    pub(crate) fn write(&self, block: &Block, bytes: &[u8]) {
        self.write_all(&[(block, bytes)], None);
    }

    /// Copies bytes to blocks, after what was recorded before: one copy with this number, if it has one.
    pub(crate) fn write_all(&self, parts: &[(&Block, &[u8])], number: Option<u64>) {
        let all: u64 = parts.iter().map(|(_, bytes)| in_words(bytes)).sum();
        if all == 0 {
            return;
        }
        // Buffers that go round are there already; a new one of a bucket's size would be cleared page by page.
        let small = parts.iter().all(|(_, bytes)| in_words(bytes) <= STAGED);
        if small && self.device().failure().is_none() {
            return self.stage(parts, number);
        }
        let most = self.device().limits.max_buffer_size;
        if all > most && parts.len() > 1 {
            parts
                .iter()
                .for_each(|part| self.write_all(&[*part], number));
            return;
        }
        let staging = self.device().device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("upload"),
            size: all,
            usage: wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: true,
        });
        match staging.get_mapped_range_mut(..) {
            Ok(mut view) => {
                let mut at = 0;
                for (_, bytes) in parts {
                    view.slice(at..at + bytes.len()).copy_from_slice(bytes);
                    at += in_words(bytes) as usize;
                }
            }
            Err(e) => fail(self.refused("an upload", &e)),
        }
        staging.unmap();
        self.record(|encoder, _| {
            self.stamped(encoder, number, |encoder| {
                let mut at = 0;
                for (block, bytes) in parts {
                    let (to, size) = (block.buffer.seen(), in_words(bytes));
                    encoder.copy_buffer_to_buffer(&staging, at, to, 0, size);
                    at += size;
                }
            });
        });
    }

    fn stage(&self, parts: &[(&Block, &[u8])], number: Option<u64>) {
        let mut recording = self.recording();
        let device = &self.device().device;
        let Recording { encoder, belt, .. } = &mut *recording;
        let encoder = encoder.get_or_insert_with(|| {
            device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
        });
        let belt = belt.get_or_insert_with(|| wgpu::util::StagingBelt::new(device.clone(), STAGED));
        self.stamped(encoder, number, |encoder| {
            for (block, bytes) in parts {
                let Some(size) = wgpu::BufferSize::new(in_words(bytes)) else {
                    continue;
                };
                let mut view = belt.write_buffer(encoder, block.buffer.seen(), 0, size);
                view.slice(..bytes.len()).copy_from_slice(bytes);
            }
        });
    }
}

/// Bytes of whole words, in which copies count.
fn in_words(bytes: &[u8]) -> u64 {
    (bytes.len() as u64).next_multiple_of(4)
}
