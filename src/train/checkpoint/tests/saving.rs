//! Every way to fail while saving.

use super::*;

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
