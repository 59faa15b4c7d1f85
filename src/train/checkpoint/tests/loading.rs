//! Every damage that loading must name.

use super::*;

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
