//! Writing a checkpoint so that the one before it is whole until this one is.
//!
//! Every touch of the disk that writes goes through [`Disk`], so that the tests can make each of them fail, at every byte.

use super::load::dtype_to;
use super::manifest::{
    Absent, Described, FILE, FORMAT, Manifest, Weights, is_weights, weights_name,
};
use super::{Entry, State};
use crate::error::{Error, ErrorKind, Result};
use safetensors::tensor::{Metadata, TensorInfo};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Saves a checkpoint of `state` and `tensors` in `dir`, which is created if it is not there.
///
/// A failure (a full disk, a missing permission) leaves the checkpoint that was there and says so; a checkpoint of a newer
/// format is never replaced. Only one process may save in a directory at a time. Panics if two tensors have one name, or a
/// tensor's bytes are not of its shape.
pub fn save<'a>(
    dir: &Path,
    state: &State,
    tensors: impl IntoIterator<Item = Entry<'a>>,
) -> Result<()> {
    save_on(&Real, dir, state, tensors.into_iter().collect())
}

/// What saving asks of a file system.
pub(super) trait Disk {
    type File: Write;
    type Lock;
    /// Creates the directory if need be and keeps other processes from saving in it: `WouldBlock` if one does.
    fn open_dir(&self, dir: &Path) -> io::Result<Self::Lock>;
    fn create(&self, path: &Path) -> io::Result<Self::File>;
    /// Forces the file's contents to the disk and closes it.
    fn sync(&self, file: Self::File) -> io::Result<()>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Forces the directory's names to the disk.
    fn sync_dir(&self, lock: &Self::Lock) -> io::Result<()>;
    fn remove(&self, path: &Path) -> io::Result<()>;
}

/// This machine's file system.
pub(super) struct Real;

impl Disk for Real {
    type File = File;
    /// The directory itself, open; only on Unix can it be.
    type Lock = Option<File>;

    fn open_dir(&self, dir: &Path) -> io::Result<Option<File>> {
        let absent = |d: &&Path| !d.as_os_str().is_empty() && !d.exists();
        let new: Vec<&Path> = dir.ancestors().take_while(absent).collect();
        std::fs::create_dir_all(dir)?;
        if !cfg!(unix) {
            return Ok(None);
        }
        // A new directory is safe from a power cut when the one that names it is synced.
        for parent in new.iter().filter_map(|d| d.parent()) {
            let here = parent.as_os_str().is_empty();
            File::open(if here { Path::new(".") } else { parent })?.sync_all()?;
        }
        let file = File::open(dir)?;
        match file.try_lock() {
            Err(std::fs::TryLockError::WouldBlock) => Err(io::ErrorKind::WouldBlock.into()),
            // Some network file systems have no locks on directories; a run of its own directory needs none.
            Ok(()) | Err(std::fs::TryLockError::Error(_)) => Ok(Some(file)),
        }
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        File::create(path)
    }

    fn sync(&self, file: File) -> io::Result<()> {
        file.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn sync_dir(&self, lock: &Option<File>) -> io::Result<()> {
        lock.as_ref().map_or(Ok(()), File::sync_all)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }
}

pub(super) fn save_on<D: Disk>(
    disk: &D,
    dir: &Path,
    state: &State,
    mut tensors: Vec<Entry<'_>>,
) -> Result<()> {
    // Widest elements first: after a header padded to 8 bytes every tensor is then aligned.
    tensors.sort_by(|a, b| (b.dtype.size(), a.name).cmp(&(a.dtype.size(), b.name)));
    let header = header(&tensors)?;
    let total = header.len() as u64 + tensors.iter().map(|t| t.bytes.len() as u64).sum::<u64>();

    let failed = |f: Failure| f.sentence(dir, state.step);
    let lock = disk.open_dir(dir).map_err(|e| match e.kind() {
        io::ErrorKind::WouldBlock => Error::new(
            ErrorKind::Checkpoint,
            format!(
                "another process is saving a checkpoint in {}; give each run a directory of its own",
                dir.display()
            ),
        ),
        _ => failed(Failure::new("opening the directory", dir, total, e)),
    })?;
    // Read under the lock: an earlier answer may name weights that another process has replaced since.
    let before = Manifest::read(dir);
    if let Err(Absent::Newer(e)) = before {
        return Err(e.within("a checkpoint is not replaced"));
    }
    // A killed run may have renamed `checkpoint.json` and not synced: only now is what it no longer names of no use.
    sync_names(disk, &lock).map_err(|e| failed(Failure::new("syncing", dir, total, e)))?;
    clean(disk, dir, before.as_ref().ok());

    let name = (0..)
        .map(|attempt| weights_name(state.step, attempt))
        .find(|name| !dir.join(name).exists())
        .expect("there are more names than files");
    let parts = std::iter::once(&header[..]).chain(tensors.iter().map(|t| t.bytes));
    let written = put(disk, dir, &name, total, parts).and_then(|crc32| {
        sync_names(disk, &lock).map_err(|e| Failure::new("syncing", dir, total, e))?;
        let manifest = manifest(state, &name, total, crc32, &tensors).to_bytes();
        put(disk, dir, FILE, manifest.len() as u64, [&manifest[..]])
    });
    if let Err(failure) = written {
        discard(disk, dir, &name);
        return Err(failed(failure));
    }
    // Committed. Until the disk has the new name, a power cut may bring the old one back: its weights must be there.
    sync_names(disk, &lock).map_err(|e| {
        let sentence = format!(
            "the checkpoint of step {} is in {}, but a power cut may still lose it and bring back the one before: syncing the directory failed: {e}",
            state.step,
            dir.display()
        );
        Error::new(ErrorKind::Io, sentence)
    })?;
    clean(disk, dir, Manifest::read(dir).as_ref().ok());
    Ok(())
}

/// What was being done to which file of how many bytes when the system refused.
struct Failure {
    what: &'static str,
    path: PathBuf,
    bytes: u64,
    error: io::Error,
}

impl Failure {
    fn new(what: &'static str, path: &Path, bytes: u64, error: io::Error) -> Self {
        Failure {
            what,
            path: path.to_owned(),
            bytes,
            error,
        }
    }

    /// The error of saving `step` in `dir`, with the checkpoint that is there now.
    fn sentence(self, dir: &Path, step: u64) -> Error {
        let kept = match Manifest::read(dir) {
            Ok(m) => format!("the checkpoint of step {} there is kept", m.state.step),
            Err(Absent::Missing) => "there was none before it".to_owned(),
            Err(Absent::Newer(e) | Absent::Broken(e)) => format!("what was there is kept ({e})"),
        };
        let sentence = format!(
            "cannot save the checkpoint of step {step}: {} {} ({} bytes) failed: {}; {kept}",
            self.what,
            self.path.display(),
            self.bytes,
            self.error
        );
        Error::new(ErrorKind::Io, sentence)
    }
}

fn sync_names<D: Disk>(disk: &D, lock: &D::Lock) -> io::Result<()> {
    match disk.sync_dir(lock) {
        // Some network file systems cannot sync a directory: they do it with the rename.
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// Writes `parts`, `total` bytes, to `DIR/NAME` under a temporary name, syncs and renames it. Returns their CRC-32.
fn put<'a, D: Disk>(
    disk: &D,
    dir: &Path,
    name: &str,
    total: u64,
    parts: impl IntoIterator<Item = &'a [u8]>,
) -> Result<u32, Failure> {
    let path = temporary(dir, name);
    let failed = |what| {
        let path = path.clone();
        move |e| Failure::new(what, &path, total, e)
    };
    let mut crc = crc32fast::Hasher::new();
    let file = disk.create(&path).map_err(failed("creating"))?;
    let mut writer = BufWriter::with_capacity(1 << 16, file);
    for part in parts {
        crc.update(part);
        writer.write_all(part).map_err(failed("writing"))?;
    }
    let file = writer
        .into_inner()
        .map_err(|e| failed("writing")(e.into_error()))?;
    disk.sync(file).map_err(failed("syncing"))?;
    let to = dir.join(name);
    disk.rename(&path, &to).map_err(failed("renaming"))?;
    Ok(crc.finalize())
}

fn temporary(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.tmp"))
}

/// Removes what a failed save wrote. The weights stay if `checkpoint.json` names them after all: over a network, a
/// rename may be done and yet report a failure.
fn discard<D: Disk>(disk: &D, dir: &Path, name: &str) {
    // Failing to remove is no new failure: the next save removes it.
    let _ = disk.remove(&temporary(dir, name));
    let _ = disk.remove(&temporary(dir, FILE));
    let named = match Manifest::read(dir) {
        Ok(manifest) => manifest.weights.file == name,
        Err(Absent::Missing) => false,
        Err(_) => true,
    };
    if !named {
        let _ = disk.remove(&dir.join(name));
    }
}

/// Removes what killed runs left, and the weights of checkpoints before the `present` one. Without a present one, weights
/// stay: they may be all that is left of a damaged checkpoint.
fn clean<D: Disk>(disk: &D, dir: &Path, present: Option<&Manifest>) {
    // What cannot be listed or removed now (Windows: a file still mapped) is removed by a later save.
    let Ok(files) = std::fs::read_dir(dir) else {
        return;
    };
    for file in files.flatten() {
        let name = file.file_name();
        let Some(name) = name.to_str() else { continue };
        let unfinished = name
            .strip_suffix(".tmp")
            .is_some_and(|n| n == FILE || is_weights(n));
        let old = present.is_some_and(|m| is_weights(name) && name != m.weights.file);
        if unfinished || old {
            let _ = disk.remove(&file.path());
        }
    }
}

/// The safetensors header of `tensors`, in this order, with its length before it.
fn header(tensors: &[Entry<'_>]) -> Result<Vec<u8>> {
    let mut names = BTreeSet::new();
    let mut offset = 0;
    let mut infos = Vec::with_capacity(tensors.len());
    for t in tensors {
        assert!(names.insert(t.name), "two tensors are named '{}'", t.name);
        assert_ne!(t.name, "__metadata__", "safetensors keeps this name");
        let bytes = t.shape.iter().product::<usize>() * t.dtype.size();
        assert_eq!(
            t.bytes.len(),
            bytes,
            "'{}' is {} {:?} and not of {} bytes",
            t.name,
            t.dtype,
            t.shape,
            t.bytes.len()
        );
        let info = TensorInfo {
            dtype: dtype_to(t.dtype),
            shape: t.shape.to_vec(),
            data_offsets: (offset, offset + bytes),
        };
        offset += bytes;
        infos.push((t.name.to_owned(), info));
    }
    let refused = |e: String| {
        let sentence = format!("the weights' header cannot be written: {e}");
        Error::new(ErrorKind::Checkpoint, sentence)
    };
    let metadata = Metadata::new(None, infos).map_err(|e| refused(e.to_string()))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|e| refused(e.to_string()))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok(header)
}

fn manifest(state: &State, name: &str, bytes: u64, crc32: u32, tensors: &[Entry<'_>]) -> Manifest {
    let describe = |t: &Entry<'_>| Described {
        name: t.name.to_owned(),
        dtype: t.dtype,
        shape: t.shape.to_vec(),
    };
    Manifest {
        format: FORMAT,
        state: state.clone(),
        weights: Weights {
            file: name.to_owned(),
            bytes,
            crc32,
        },
        tensors: tensors.iter().map(describe).collect(),
    }
}
