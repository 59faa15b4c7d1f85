//! A file system that fails on demand, and a checkpoint whose contents tell its step.

mod loading;
mod saving;

use super::manifest::{Absent, Described, FILE, FORMAT, Manifest, Weights, weights_name};
use super::save::{Disk, Real, save_on};
use super::*;
use crate::dtype::Slice;
use crate::error::{Error, ErrorKind, Result};
use safetensors::SafeTensors;
use serde_json::json;
use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use tempfile::TempDir;

/// A file system that fails after some bytes or at some operation, and from then on altogether if the run is killed.
#[derive(Clone)]
struct Faulty(Rc<Faults>);

struct Faults {
    bytes: Cell<usize>,
    operations: Cell<usize>,
    killed: bool,
    failed: Cell<bool>,
}

impl Faulty {
    fn new(bytes: usize, operations: usize, killed: bool) -> Self {
        Faulty(Rc::new(Faults {
            bytes: Cell::new(bytes),
            operations: Cell::new(operations),
            killed,
            failed: Cell::new(false),
        }))
    }

    fn fail(&self, kind: io::ErrorKind) -> io::Error {
        self.0.failed.set(true);
        kind.into()
    }

    fn operation(&self) -> io::Result<()> {
        let left = self.0.operations.get();
        if left == 0 && (self.0.killed || !self.0.failed.get())
            || self.0.killed && self.0.failed.get()
        {
            return Err(self.fail(io::ErrorKind::PermissionDenied));
        }
        self.0.operations.set(left.saturating_sub(1));
        Ok(())
    }
}

struct FaultyFile(File, Faulty);

impl Write for FaultyFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let left = &self.1.0.bytes;
        let n = bytes.len().min(left.get());
        if n == 0 && !bytes.is_empty() {
            return Err(self.1.fail(io::ErrorKind::StorageFull));
        }
        left.set(left.get() - n);
        self.0.write(&bytes[..n])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Disk for Faulty {
    type File = FaultyFile;
    type Lock = ();

    fn open_dir(&self, dir: &Path) -> io::Result<()> {
        self.operation()?;
        fs::create_dir_all(dir)
    }
    fn create(&self, path: &Path) -> io::Result<FaultyFile> {
        self.operation()?;
        Ok(FaultyFile(File::create(path)?, self.clone()))
    }
    fn sync(&self, _: FaultyFile) -> io::Result<()> {
        self.operation()
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.operation()?;
        Real.rename(from, to)
    }
    fn sync_dir(&self, (): &()) -> io::Result<()> {
        self.operation()
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.operation()?;
        Real.remove(path)
    }
}

const ALL: usize = usize::MAX;

fn state(step: u64) -> State {
    State {
        step,
        seed: 1337,
        model: json!({"layers": 2, "epsilon": 1e-5}),
        data: json!({"fingerprint": 12}),
        other: json!([0.1, null]),
    }
}

/// Two tensors whose contents tell the step.
fn contents(step: u64) -> (Vec<u8>, Vec<u8>) {
    let weights = (0..6).flat_map(|i| (step as f32 + i as f32).to_le_bytes());
    (weights.collect(), vec![step as u8; 6])
}

fn save_step(disk: &impl Disk, dir: &Path, step: u64) -> Result<()> {
    let (w, b) = contents(step);
    let entry = |name, dtype, shape, bytes| Entry {
        name,
        dtype,
        shape,
        bytes,
    };
    // The narrow type first: saving must still align the wide one.
    let tensors = vec![
        entry("b", DType::Bf16, &[3], &b),
        entry("w", DType::F32, &[2, 3], &w),
        entry("none", DType::U32, &[0, 4], &[]),
    ];
    save_on(disk, dir, &state(step), tensors)
}

/// The step of the checkpoint, after checking all of it.
#[track_caller]
fn verify(dir: &Path) -> u64 {
    let loaded = load(dir).unwrap();
    let step = loaded.state.step;
    let (w, b) = contents(step);
    assert_eq!(loaded.state, state(step));
    assert_eq!(loaded.expect("w", DType::F32, &[2, 3]).unwrap(), w);
    assert_eq!(loaded.expect("b", DType::Bf16, &[3]).unwrap(), b);
    assert!(
        loaded
            .expect("none", DType::U32, &[0, 4])
            .unwrap()
            .is_empty()
    );
    loaded.finish().unwrap();
    step
}

fn listing(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = names
        .map(|f| f.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn weights(dir: &Path) -> PathBuf {
    dir.join(Manifest::read(dir).unwrap().weights.file)
}

#[track_caller]
fn says(error: &Error, kind: ErrorKind, words: &[&str]) {
    assert_eq!(error.kind(), kind, "{error}");
    for word in words {
        assert!(error.to_string().contains(word), "{error} lacks {word:?}");
    }
}
