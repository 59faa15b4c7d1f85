//! Files of others: read whole, regular ones only, up to a stated size.
//!
//! They are not mapped: a file that another process cuts short would end this one. A pipe would hang, and a device never ends.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;

/// Bytes of a description that a person or a small program wrote (a machine, a `config.json`, a manifest, cases, a table), at most.
pub const DESCRIPTION: u64 = 64 << 20;

/// The bytes of the regular file at `path`.
///
/// # Errors
/// The system's, or that it is no regular file, or is longer than `most` bytes.
pub fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    let wrong = |why: String| Err(Error::new(ErrorKind::InvalidInput, why));
    // Before it is opened, which waits for ever with a pipe that nobody writes to.
    let about = std::fs::metadata(path)?;
    if !about.is_file() {
        return wrong("it is no regular file".into());
    }
    let mut bytes = Vec::new();
    if about.len() <= most {
        let length = usize::try_from(about.len()).unwrap_or(usize::MAX);
        bytes.try_reserve_exact(length).map_err(|_| {
            let why = format!("its {length} bytes do not fit into memory");
            Error::new(ErrorKind::OutOfMemory, why)
        })?;
        File::open(path)?
            .take(most.saturating_add(1))
            .read_to_end(&mut bytes)?;
    }
    if about.len() > most || bytes.len() as u64 > most {
        return wrong(format!(
            "it has {} bytes; at most {most} are read of such a file",
            about.len().max(bytes.len() as u64)
        ));
    }
    Ok(bytes)
}

/// The text of the regular file at `path`.
///
/// # Errors
/// As [`read`], or that it is not UTF-8.
pub fn read_text(path: &Path, most: u64) -> Result<String> {
    String::from_utf8(read(path, most)?)
        .map_err(|e| Error::new(ErrorKind::InvalidData, format!("it is no UTF-8 text: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_of_the_stated_size_are_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x");
        std::fs::write(&path, "twelve bytes").expect("written");
        assert_eq!(read_text(&path, 12).expect("read"), "twelve bytes");
        let long = read(&path, 11).expect_err("too long").to_string();
        assert!(long.contains("12 bytes") && long.contains("11"), "{long}");
        for none in [folder.path(), Path::new("/dev/zero")] {
            let why = read(none, 1 << 20).expect_err("no regular file");
            assert!(!why.to_string().is_empty());
        }
        std::fs::write(&path, [0xff, 0xfe]).expect("written");
        assert!(read_text(&path, 12).is_err());
    }

    #[test]
    #[cfg(unix)]
    fn a_pipe_is_refused_and_not_waited_for() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.expect("mkfifo runs").success());
        let why = read(&path, 100).expect_err("a pipe").to_string();
        assert!(why.contains("no regular file"), "{why}");
    }
}
