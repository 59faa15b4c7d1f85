//! Compiled pipelines on disk, where the driver gives them out: the next process need not compile them again.
//!
//! A file for each driver in the user's cache folder (`XDG_CACHE_HOME`, or `.cache` at home), behind a checksum, so that a torn or
//! foreign file never reaches the driver. Whatever goes wrong here costs compiling, nothing else: no error is told.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// The beginning of a file.
const MARK: &[u8; 8] = b"supernod";

pub(super) struct Kept {
    cache: wgpu::PipelineCache,
    path: PathBuf,
    grown: AtomicBool,
}

impl Kept {
    /// What earlier processes kept for this adapter's driver; none where the driver or the system has no place for it.
    pub(super) fn open(device: &wgpu::Device, info: &wgpu::AdapterInfo) -> Option<Self> {
        if !device.features().contains(wgpu::Features::PIPELINE_CACHE) {
            return None;
        }
        let path = folder()?.join(wgpu::util::pipeline_cache_key(info)?);
        let data = std::fs::read(&path).ok().and_then(unwrap);
        let described = wgpu::PipelineCacheDescriptor {
            label: Some("supernode"),
            data: data.as_deref(),
            fallback: true,
        };
        // SAFETY: the contents are what a pipeline cache of a driver with this key gave out, whole, as the checksum says.
        #[allow(unsafe_code)]
        let cache = unsafe { device.create_pipeline_cache(&described) };
        Some(Kept {
            cache,
            path,
            grown: AtomicBool::new(false),
        })
    }

    pub(super) fn cache(&self) -> &wgpu::PipelineCache {
        &self.cache
    }

    /// A pipeline was compiled.
    pub(super) fn grew(&self) {
        self.grown.store(true, Relaxed);
    }

    /// Writes the cache if it grew: aside first, so that another process never reads half of it.
    pub(super) fn save(&self) {
        if !self.grown.swap(false, Relaxed) {
            return;
        }
        let (Some(data), Some(folder)) = (self.cache.get_data(), self.path.parent()) else {
            return;
        };
        let aside = self.path.with_extension(std::process::id().to_string());
        let written = std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::write(&aside, wrap(&data)))
            .and_then(|()| std::fs::rename(&aside, &self.path));
        if written.is_err() {
            let _ = std::fs::remove_file(&aside);
        }
    }
}

/// The user's cache folder for this crate.
pub(super) fn folder() -> Option<PathBuf> {
    let named = |name: &str| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let root = named("XDG_CACHE_HOME")
        .or_else(|| named("HOME").map(|h| h.join(".cache")))
        .or_else(|| named("LOCALAPPDATA"))?;
    Some(root.join("supernode"))
}

fn wrap(data: &[u8]) -> Vec<u8> {
    let sum = crc32fast::hash(data).to_le_bytes();
    [MARK, &sum[..], data].concat()
}

fn unwrap(file: Vec<u8>) -> Option<Vec<u8>> {
    let data = file.strip_prefix(MARK)?;
    let (sum, data) = data.split_first_chunk::<4>()?;
    (crc32fast::hash(data).to_le_bytes() == *sum).then(|| data.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_written_whole_is_read() {
        let whole = wrap(b"pipelines");
        assert_eq!(unwrap(whole.clone()).as_deref(), Some(&b"pipelines"[..]));
        assert_eq!(unwrap(whole[..whole.len() - 1].to_vec()), None, "torn");
        let mut changed = whole.clone();
        changed[14] ^= 1;
        assert_eq!(unwrap(changed), None, "changed");
        assert_eq!(unwrap(b"pipelines".to_vec()), None, "another file");
        assert_eq!(unwrap(Vec::new()), None, "nothing");
    }
}
