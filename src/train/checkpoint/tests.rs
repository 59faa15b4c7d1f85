//! Every way to fail while saving, and every damage that loading must name.

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

#[test]
fn a_checkpoint_round_trips_and_replaces_the_one_before() {
    let root = TempDir::new().unwrap();
    let dir = &root.path().join("new/run");
    assert_eq!(peek(dir).unwrap(), None);
    for step in [1, 250, 100_000_000] {
        save_step(&Real, dir, step).unwrap();
        assert_eq!(verify(dir), step);
        assert_eq!(peek(dir).unwrap(), Some(state(step)));
        assert_eq!(listing(dir), [FILE.to_owned(), weights_name(step, 0)]);
    }
    let bytes = fs::read(weights(dir)).unwrap();
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.tensor("w").unwrap().shape(), [2, 3]);
    let loaded = load(dir).unwrap();
    let words = Slice::of_bytes(loaded.expect("w", DType::F32, &[2, 3]).unwrap(), DType::F32);
    assert_eq!(words.typed::<f32>()[5], 100_000_005.0);
    let tensors: Vec<_> = loaded.tensors().collect();
    assert_eq!(tensors[0], ("b", DType::Bf16, &[3usize][..]));
}

#[test]
fn the_same_step_again_never_overwrites_its_weights() {
    let dir = TempDir::new().unwrap();
    for attempt in [0, 1, 0] {
        save_step(&Real, dir.path(), 5).unwrap();
        assert_eq!(verify(dir.path()), 5);
        assert_eq!(
            listing(dir.path()),
            [FILE.to_owned(), weights_name(5, attempt)]
        );
    }
}

#[test]
fn a_disk_that_is_full_after_any_byte_keeps_the_old_checkpoint() {
    let dir = TempDir::new().unwrap();
    save_step(&Faulty::new(ALL, ALL, false), dir.path(), 1).unwrap();
    let before = listing(dir.path());
    let full = io::Error::from(io::ErrorKind::StorageFull).to_string();
    let mut written = 0;
    for bytes in 0.. {
        let disk = Faulty::new(bytes, ALL, false);
        let result = save_step(&disk, dir.path(), 2);
        if !disk.0.failed.get() {
            result.unwrap();
            written = bytes;
            break;
        }
        let words = [
            "step 2",
            ".tmp (",
            " bytes) failed: ",
            &full,
            "step 1 there is kept",
        ];
        says(&result.unwrap_err(), ErrorKind::Io, &words);
        assert_eq!(verify(dir.path()), 1);
        assert_eq!(listing(dir.path()), before, "full after {bytes} bytes");
    }
    assert_eq!(verify(dir.path()), 2);
    let size = |path| fs::metadata(path).unwrap().len();
    let sizes = size(weights(dir.path())) + size(dir.path().join(FILE));
    assert_eq!(written as u64, sizes);
}

#[test]
fn a_first_save_that_fails_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    for bytes in [0, 1, 100, 400] {
        let error = save_step(&Faulty::new(bytes, ALL, false), dir.path(), 2).unwrap_err();
        says(&error, ErrorKind::Io, &["there was none before it"]);
        assert_eq!(listing(dir.path()), [""; 0]);
    }
}

#[test]
fn any_operation_that_fails_leaves_the_old_or_the_new_checkpoint() {
    let mut steps = vec![];
    for operations in 0.. {
        let dir = TempDir::new().unwrap();
        save_step(&Faulty::new(ALL, ALL, false), dir.path(), 1).unwrap();
        let disk = Faulty::new(ALL, operations, false);
        let result = save_step(&disk, dir.path(), 2);
        if !disk.0.failed.get() {
            break;
        }
        let step = verify(dir.path());
        match result {
            Err(e) if step == 1 => says(&e, ErrorKind::Io, &["step 1 there is kept"]),
            Err(e) => says(&e, ErrorKind::Io, &["step 2 is in", "power cut"]),
            Ok(()) => assert_eq!(step, 2),
        }
        steps.push(step);
        save_step(&Real, dir.path(), 3).unwrap();
        assert_eq!(listing(dir.path()), [FILE.to_owned(), weights_name(3, 0)]);
    }
    // open, sync, create, sync, rename, sync, create, sync, rename | sync, remove.
    assert_eq!(steps, [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2]);
}

#[test]
fn a_run_killed_anywhere_leaves_a_checkpoint_and_the_next_save_cleans_up() {
    let kill = |bytes, operations| {
        let dir = TempDir::new().unwrap();
        save_step(&Faulty::new(ALL, ALL, false), dir.path(), 1).unwrap();
        let disk = Faulty::new(bytes, operations, true);
        // A killed run tells nobody; what it left is what counts.
        let _ = save_step(&disk, dir.path(), 2);
        let step = verify(dir.path());
        let left = listing(dir.path()).len();
        save_step(&Faulty::new(ALL, ALL, false), dir.path(), 2).unwrap();
        assert_eq!((verify(dir.path()), listing(dir.path()).len()), (2, 2));
        (disk.0.failed.get(), step, left)
    };
    let mut left_behind = 0;
    for operations in 0.. {
        let (failed, _, left) = kill(ALL, operations);
        left_behind += left - 2;
        if !failed {
            break;
        }
    }
    assert!(left_behind >= 5, "only {left_behind} files were left");
    for bytes in (0..).step_by(31) {
        let (failed, step, _) = kill(bytes, ALL);
        if !failed {
            break;
        }
        assert_eq!(step, 1);
    }
}

#[test]
fn a_directory_that_cannot_be_is_a_sentence() {
    let root = TempDir::new().unwrap();
    let file = root.path().join("file");
    fs::write(&file, "x").unwrap();
    let error = save_step(&Real, &file.join("run"), 4).unwrap_err();
    says(&error, ErrorKind::Io, &["step 4", "file", "failed: "]);
    assert_eq!(fs::read(&file).unwrap(), b"x");
}

#[cfg(unix)]
#[test]
fn two_runs_do_not_save_in_one_directory_at_once() {
    let dir = TempDir::new().unwrap();
    let other = Real.open_dir(dir.path()).unwrap();
    let error = save_step(&Real, dir.path(), 1).unwrap_err();
    says(
        &error,
        ErrorKind::Checkpoint,
        &["another process is saving"],
    );
    drop(other);
    save_step(&Real, dir.path(), 1).unwrap();
}

#[test]
fn foreign_files_stay_and_a_newer_format_is_not_replaced() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    for name in ["notes.tmp", "best.safetensors", "step-1.safetensors"] {
        fs::write(path(name), "mine").unwrap();
    }
    save_step(&Real, dir.path(), 1).unwrap();
    save_step(&Real, dir.path(), 2).unwrap();
    assert_eq!(listing(dir.path()).len(), 5);

    let mut newer = Manifest::read(dir.path()).unwrap();
    newer.format = FORMAT + 1;
    fs::write(path(FILE), newer.to_bytes()).unwrap();
    let words = ["format version 2", "reads up to 1"];
    says(
        &load(dir.path()).unwrap_err(),
        ErrorKind::Checkpoint,
        &words,
    );
    says(
        &peek(dir.path()).unwrap_err(),
        ErrorKind::Checkpoint,
        &words,
    );
    let error = save_step(&Real, dir.path(), 3).unwrap_err();
    says(&error, ErrorKind::Checkpoint, &["not replaced", words[0]]);
    assert_eq!(fs::read(path(FILE)).unwrap(), newer.to_bytes());
}

#[test]
fn a_damaged_checkpoint_is_replaced_only_by_a_whole_one() {
    let dir = TempDir::new().unwrap();
    save_step(&Real, dir.path(), 1).unwrap();
    let old = weights(dir.path());
    fs::write(dir.path().join(FILE), "{").unwrap();
    let error = save_step(&Faulty::new(50, ALL, false), dir.path(), 2).unwrap_err();
    says(
        &error,
        ErrorKind::Io,
        &["what was there is kept", "is damaged"],
    );
    assert!(old.exists());
    save_step(&Real, dir.path(), 2).unwrap();
    assert_eq!((verify(dir.path()), old.exists()), (2, false));
}

#[test]
fn no_checkpoint_is_a_sentence() {
    let dir = TempDir::new().unwrap();
    for dir in [dir.path(), &dir.path().join("absent")] {
        let words = ["no checkpoint in", dir.to_str().unwrap(), FILE];
        says(&load(dir).unwrap_err(), ErrorKind::Checkpoint, &words);
    }
}

#[test]
fn weights_cut_short_flipped_or_gone_are_sentences() {
    let dir = TempDir::new().unwrap();
    save_step(&Real, dir.path(), 1).unwrap();
    let path = weights(dir.path());
    let good = fs::read(&path).unwrap();
    let crc = |bytes: &[u8]| format!("{:08x}", crc32fast::hash(bytes));
    let all = format!("says {}", good.len());
    for i in 0..good.len() {
        fs::write(&path, &good[..i]).unwrap();
        let short = format!("{i} bytes are there");
        let words = [path.to_str().unwrap(), "cut short", &short, &all];
        says(
            &load(dir.path()).unwrap_err(),
            ErrorKind::Checkpoint,
            &words,
        );

        let mut flipped = good.clone();
        flipped[i] ^= 1 << (i % 8);
        fs::write(&path, &flipped).unwrap();
        let words = ["damaged", &crc(&flipped), &crc(&good)];
        says(
            &load(dir.path()).unwrap_err(),
            ErrorKind::Checkpoint,
            &words,
        );
    }
    fs::write(&path, [&good[..], b"x"].concat()).unwrap();
    let words = ["too long", &all];
    says(
        &load(dir.path()).unwrap_err(),
        ErrorKind::Checkpoint,
        &words,
    );
    fs::remove_file(&path).unwrap();
    let words = ["cannot read the weights", path.to_str().unwrap()];
    says(
        &load(dir.path()).unwrap_err(),
        ErrorKind::Checkpoint,
        &words,
    );
}

#[test]
fn another_model_is_named_with_both_sides() {
    let dir = TempDir::new().unwrap();
    save_step(&Real, dir.path(), 9).unwrap();
    let loaded = load(dir.path()).unwrap();
    let refused = |name, dtype, shape: &[usize], words: &[&str]| {
        let error = loaded.expect(name, dtype, shape).unwrap_err();
        says(
            &error,
            ErrorKind::Checkpoint,
            &[&["step 9"], words].concat(),
        );
    };
    refused("x", DType::F32, &[2], &["lacks the tensor 'x' (f32 [2])"]);
    refused(
        "w",
        DType::F32,
        &[3, 2],
        &["'w' as f32 [2, 3]", "f32 [3, 2]"],
    );
    refused(
        "w",
        DType::U32,
        &[2, 3],
        &["'w' as f32 [2, 3]", "u32 [2, 3]"],
    );
    loaded.expect("w", DType::F32, &[2, 3]).unwrap();
    let words = ["'b' (bf16 [3])", "no place for (2 in all)"];
    says(&loaded.finish().unwrap_err(), ErrorKind::Checkpoint, &words);
}

#[test]
#[should_panic(expected = "two tensors are named 'a'")]
fn two_tensors_of_one_name_panic() {
    let dir = TempDir::new().unwrap();
    let a = Entry {
        name: "a",
        dtype: DType::F32,
        shape: &[1],
        bytes: &[0; 4],
    };
    let _ = save(dir.path(), &state(1), [a, a]);
}

#[test]
#[should_panic(expected = "'a' is f32 [2] and not of 4 bytes")]
fn bytes_of_another_shape_panic() {
    let dir = TempDir::new().unwrap();
    let a = Entry {
        name: "a",
        dtype: DType::F32,
        shape: &[2],
        bytes: &[0; 4],
    };
    let _ = save(dir.path(), &state(1), [a]);
}

/// A checkpoint with right checksums around any weights file.
fn forge(weights: &[u8], tensors: &[(&str, DType, &[usize])]) -> Result<Loaded> {
    let dir = TempDir::new().unwrap();
    let file = weights_name(1, 0);
    fs::write(dir.path().join(&file), weights).unwrap();
    let described = |&(name, dtype, shape): &(&str, DType, &[usize])| Described {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
    };
    let manifest = Manifest {
        format: FORMAT,
        state: state(1),
        weights: Weights {
            file,
            bytes: weights.len() as u64,
            crc32: crc32fast::hash(weights),
        },
        tensors: tensors.iter().map(described).collect(),
    };
    fs::write(dir.path().join(FILE), manifest.to_bytes()).unwrap();
    load(dir.path())
}

fn file(header: &[u8], data: usize) -> Vec<u8> {
    let n = (header.len() as u64).to_le_bytes();
    [&n[..], header, &vec![0; data]].concat()
}

#[test]
fn attacks_on_the_header_are_sentences() {
    let one = |shape: &str, from: u64, to: u64| {
        format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}}}"#)
    };
    let two = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}"#;
    let attacks: [(&str, Vec<u8>); 13] = [
        ("empty file", vec![]),
        ("length cut short", vec![1, 0, 0]),
        ("length of 2^64 - 1", vec![0xff; 16]),
        (
            "length beyond the file",
            [&100u64.to_le_bytes()[..], b"{}"].concat(),
        ),
        ("no UTF-8", file(b"\xff\xfe", 0)),
        ("no JSON", file(b"{\"a\":", 0)),
        (
            "unknown type",
            file(one("[1]", 0, 4).replace("F32", "F33").as_bytes(), 4),
        ),
        (
            "tensor beyond the file",
            file(one("[2]", 0, 8).as_bytes(), 4),
        ),
        (
            "data after the last tensor",
            file(one("[1]", 0, 4).as_bytes(), 8),
        ),
        ("gap before the first", file(one("[1]", 4, 8).as_bytes(), 8)),
        ("shape of more bytes", file(one("[3]", 0, 4).as_bytes(), 4)),
        (
            "shape that overflows",
            file(one("[4294967296,4294967296,4]", 0, 0).as_bytes(), 0),
        ),
        ("overlap", file(two.as_bytes(), 6)),
    ];
    for (attack, weights) in attacks {
        let error = forge(&weights, &[("a", DType::F32, &[1])]).expect_err(attack);
        says(&error, ErrorKind::Checkpoint, &["header", "is invalid: "]);
    }
}

#[test]
fn header_and_manifest_must_agree() {
    let header = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  "#;
    let good = file(header.as_bytes(), 4);
    let a: (&str, DType, &[usize]) = ("a", DType::F32, &[1]);
    assert!(forge(&good, &[a]).is_ok());
    let refused = |tensors: &[_], words: &[&str]| {
        let error = forge(&good, tensors).unwrap_err();
        says(&error, ErrorKind::Checkpoint, words);
    };
    refused(
        &[a, ("c", DType::F32, &[2])],
        &["lack a tensor", "'c' (f32 [2])"],
    );
    refused(&[], &["hold a tensor 'a'", "says nothing"]);
    refused(
        &[("a", DType::F32, &[1, 1])],
        &["as f32 [1]", "'a' (f32 [1, 1])"],
    );
    refused(&[("a", DType::U32, &[1])], &["as f32 [1]", "'a' (u32 [1])"]);
    let misaligned = file(header.trim_end().as_bytes(), 4);
    let error = forge(&misaligned, &[a]).unwrap_err();
    says(
        &error,
        ErrorKind::Checkpoint,
        &["no multiple of the 4 bytes"],
    );
    let double = file(
        header
            .replace("F32", "F64")
            .replace("0,4", "0,8")
            .as_bytes(),
        8,
    );
    let error = forge(&double, &[a]).unwrap_err();
    says(
        &error,
        ErrorKind::Checkpoint,
        &["as f64 [1]", "'a' (f32 [1])"],
    );
}

#[test]
fn an_unreadable_manifest_is_no_missing_one() {
    let dir = TempDir::new().unwrap();
    fs::create_dir(dir.path().join(FILE)).unwrap();
    assert!(matches!(Manifest::read(dir.path()), Err(Absent::Broken(_))));
    says(
        &peek(dir.path()).unwrap_err(),
        ErrorKind::Io,
        &["cannot read"],
    );
}
