//! `checkpoint.json`: what it says, and how a flipped byte in it is found.
//!
//! ```text
//! {"crc32":"89abcdef","body":{ ... }}
//! ```
//!
//! The CRC-32 is that of the body's bytes as they stand in the file, so the frame around it is fixed to the byte, for every
//! version of the body. It is found by its text, not by parsing: a parser would read many damaged files as another
//! valid one.

use super::State;
use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result};
use crate::files;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::Path;

/// The version of the body that this crate writes, and the newest that it reads.
pub(super) const FORMAT: u64 = 1;
pub(super) const FILE: &str = "checkpoint.json";

const BEFORE_CRC: &[u8] = b"{\"crc32\":\"";
const BEFORE_BODY: &[u8] = b"\",\"body\":";
const AFTER_BODY: &[u8] = b"}\n";

/// The body of `checkpoint.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub(super) format: u64,
    pub(super) state: State,
    pub(super) weights: Weights,
    pub(super) tensors: Vec<Described>,
}

/// The weights' file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Weights {
    pub(super) file: String,
    pub(super) bytes: u64,
    pub(super) crc32: u32,
}

/// A tensor without its contents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Described {
    pub(super) name: String,
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
}

/// Why there is no manifest.
#[derive(Debug)]
pub(super) enum Absent {
    /// No such file.
    Missing,
    /// Written by a newer version of this crate.
    Newer(Error),
    /// Damaged or unreadable.
    Broken(Error),
}

impl Manifest {
    /// The bytes of `checkpoint.json`.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let body = serde_json::to_vec_pretty(self).expect("a manifest holds only what JSON has");
        let crc = format!("{:08x}", crc32fast::hash(&body));
        [BEFORE_CRC, crc.as_bytes(), BEFORE_BODY, &body, AFTER_BODY].concat()
    }

    /// Reads `DIR/checkpoint.json`.
    pub(super) fn read(dir: &Path) -> Result<Self, Absent> {
        let path = dir.join(FILE);
        match files::read(&path, files::DESCRIPTION) {
            Ok(bytes) => Manifest::from_bytes(&bytes, &path),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(Absent::Missing),
            Err(e) => Err(Absent::Broken(Error::new(
                ErrorKind::Io,
                format!("cannot read {}: {e}", path.display()),
            ))),
        }
    }

    fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self, Absent> {
        let path = path.display();
        let broken = |what: String| {
            let sentence = format!("{path} is damaged: {what}; restore it from a copy");
            Absent::Broken(Error::new(ErrorKind::Checkpoint, sentence))
        };
        let (stored, body) = open_frame(bytes).ok_or_else(|| {
            broken(format!(
                "its {} bytes do not begin and end as a checkpoint's do",
                bytes.len()
            ))
        })?;
        let computed = format!("{:08x}", crc32fast::hash(body));
        if stored != computed.as_bytes() {
            return Err(broken(format!(
                "it says that its CRC-32 is {}, but that is {computed}",
                String::from_utf8_lossy(stored)
            )));
        }
        // The version decides how the rest is to be read, so it is read alone first.
        #[derive(Deserialize)]
        struct Version {
            format: u64,
        }
        let json = |e: serde_json::Error| broken(format!("its JSON cannot be read ({e})"));
        let Version { format } = serde_json::from_slice(body).map_err(json)?;
        if format > FORMAT {
            return Err(Absent::Newer(Error::new(
                ErrorKind::Checkpoint,
                format!(
                    "{path} has format version {format}, this program reads up to {FORMAT}; use a newer supernode"
                ),
            )));
        }
        let manifest: Manifest = serde_json::from_slice(body).map_err(json)?;
        if !is_weights(&manifest.weights.file) {
            // A name with a directory in it would lead out of the checkpoint.
            return Err(broken(format!(
                "its weights are said to be in {:?}, which is no name of a weights file",
                manifest.weights.file
            )));
        }
        Ok(manifest)
    }
}

/// The stored CRC-32 and the body.
fn open_frame(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (crc, rest) = bytes.strip_prefix(BEFORE_CRC)?.split_at_checked(8)?;
    let body = rest.strip_prefix(BEFORE_BODY)?.strip_suffix(AFTER_BODY)?;
    Some((crc, body))
}

/// The `attempt`-th name of the weights of `step`.
pub(super) fn weights_name(step: u64, attempt: u64) -> String {
    match attempt {
        0 => format!("step-{step:08}.safetensors"),
        _ => format!("step-{step:08}-{attempt}.safetensors"),
    }
}

/// True for the names that [`weights_name`] gives, and no others.
pub(super) fn is_weights(name: &str) -> bool {
    let parse = || {
        let middle = name.strip_prefix("step-")?.strip_suffix(".safetensors")?;
        let (step, attempt) = middle.split_once('-').unwrap_or((middle, "0"));
        Some(weights_name(step.parse().ok()?, attempt.parse().ok()?))
    };
    parse().is_some_and(|canonical| canonical == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn manifest() -> Manifest {
        Manifest {
            format: FORMAT,
            state: State {
                step: 250,
                seed: u64::MAX,
                model: json!({"layers": 2, "lr": 0.1}),
                data: json!("abc"),
                other: json!(null),
            },
            weights: Weights {
                file: weights_name(250, 0),
                bytes: 10,
                crc32: 7,
            },
            tensors: vec![Described {
                name: "w".into(),
                dtype: DType::Bf16,
                shape: vec![2, 3],
            }],
        }
    }

    fn sentence(bytes: &[u8]) -> String {
        match Manifest::from_bytes(bytes, Path::new("DIR/checkpoint.json")) {
            Err(Absent::Broken(e) | Absent::Newer(e)) => {
                assert_eq!(e.kind(), ErrorKind::Checkpoint);
                e.to_string()
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn it_round_trips_and_is_json() {
        let bytes = manifest().to_bytes();
        let back = Manifest::from_bytes(&bytes, Path::new("x")).unwrap();
        assert_eq!(back, manifest());
        let value: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(value["body"]["state"]["step"], 250);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let bytes = manifest().to_bytes();
        for i in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[i] ^= 1 << bit;
                assert!(sentence(&flipped).contains("is damaged"), "byte {i}");
            }
            assert!(sentence(&bytes[..i]).contains("is damaged"), "cut at {i}");
        }
        let mut flipped = bytes.clone();
        flipped[60] ^= 1;
        let computed = format!("{:08x}", crc32fast::hash(open_frame(&flipped).unwrap().1));
        let stored = String::from_utf8_lossy(&bytes[10..18]).into_owned();
        let sentence = sentence(&flipped);
        assert!(
            sentence.contains(&format!("CRC-32 is {stored}, but that is {computed}"))
                && sentence.contains("DIR/checkpoint.json"),
            "{sentence}"
        );
    }

    #[test]
    fn a_newer_format_says_both_versions() {
        let mut newer = manifest();
        newer.format = 7;
        let result = Manifest::from_bytes(&newer.to_bytes(), Path::new("x"));
        let Err(Absent::Newer(e)) = result else {
            panic!("{result:?}")
        };
        assert!(
            e.to_string()
                .contains("format version 7, this program reads up to 1"),
            "{e}"
        );
    }

    #[test]
    fn a_body_that_is_no_manifest_is_a_sentence() {
        let frame = |body: &str| {
            let crc = format!("{:08x}", crc32fast::hash(body.as_bytes()));
            format!("{{\"crc32\":\"{crc}\",\"body\":{body}}}\n")
        };
        for body in ["{}", "{\"format\":1}", "nonsense", "[1]", "{\"format\":-1}"] {
            let sentence = sentence(frame(body).as_bytes());
            assert!(sentence.contains("its JSON cannot be read"), "{sentence}");
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in [
            "../step-00000001.safetensors",
            "/etc/passwd",
            "",
            "step-1.safetensors",
        ] {
            let mut m = manifest();
            m.weights.file = name.into();
            assert!(sentence(&m.to_bytes()).contains("no name of a weights file"));
        }
        assert!(is_weights("step-00000001.safetensors"));
        assert!(is_weights("step-123456789012-3.safetensors"));
        assert!(!is_weights("step-00000001-0.safetensors"));
        assert!(!is_weights("step-00000001.safetensors.tmp"));
        assert!(!is_weights("step-+0000001.safetensors"));
    }
}
