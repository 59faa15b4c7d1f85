//! Where results and words go: standard output, standard error, and a file that a command writes at its end, after minutes of
//! measuring: whether it can is known at the beginning.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use supernode::{Error, ErrorKind, Result};

/// A path that can be written. What is there stays until [`Output::write`]; without that, nothing is left of a new file.
pub(super) struct Output {
    path: PathBuf,
    /// Made here and still empty.
    fresh: bool,
}

impl Output {
    /// # Errors
    /// If the path cannot be written.
    pub(super) fn new(path: &Path) -> Result<Self> {
        let fresh = !path.exists();
        let mut options = OpenOptions::new();
        let opened = options.create(true).append(true).open(path);
        opened.map_err(|e| unwritten(path, &e))?;
        let path = path.into();
        Ok(Output { path, fresh })
    }

    /// # Errors
    /// If the file can be written no longer.
    pub(super) fn write(mut self, text: &str) -> Result<()> {
        std::fs::write(&self.path, text).map_err(|e| unwritten(&self.path, &e))?;
        self.fresh = false;
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.fresh {
            // Nothing was promised of an empty file, and an error is on its way already.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// The first failure of standard output, told when the command ends: what runs for hours goes on and saves.
static FAILURE: Mutex<Option<io::Error>> = Mutex::new(None);

/// Prints results and flushes. Whoever closed the pipe has read enough; any other failure is an error of [`check_printed`].
pub(super) fn print_text(text: &str) {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    match written {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            let mut failure = FAILURE.lock().unwrap_or_else(PoisonError::into_inner);
            failure.get_or_insert(e);
        }
        _ => {}
    }
}

/// # Errors
/// [`ErrorKind::Io`] if results could not be printed.
pub(super) fn check_printed() -> Result<()> {
    let failure = FAILURE.lock().unwrap_or_else(PoisonError::into_inner);
    match &*failure {
        None => Ok(()),
        Some(e) => {
            let what = format!("cannot write standard output: {e}; the results are incomplete");
            Err(Error::new(ErrorKind::Io, what))
        }
    }
}

/// A line on standard error. Words that nobody can read are no reason to stop.
pub(super) fn tell(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

fn unwritten(path: &Path, why: &io::Error) -> Error {
    let what = format!("cannot write {}: {why}", path.display());
    Error::new(ErrorKind::Io, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unwritten_file_leaves_nothing_and_an_old_one_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x.toml");
        drop(Output::new(&path).expect("a new file"));
        assert!(!path.exists());
        Output::new(&path)
            .and_then(|o| o.write("old"))
            .expect("written");
        drop(Output::new(&path).expect("the old file"));
        assert_eq!(std::fs::read_to_string(&path).expect("there"), "old");
        let folder = Output::new(folder.path())
            .err()
            .expect("a folder is no file");
        assert!(folder.to_string().starts_with("cannot write "), "{folder}");
    }
}
