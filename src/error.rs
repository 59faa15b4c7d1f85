//! One error type for the world's failures: what happened, where, both numbers, and what to do.
//!
//! Mistakes in a program (wrong shapes, unknown axis names) panic with both sides in the message, as ndarray does. What
//! the program cannot help (a broken file, a full disk, a memory budget, a dead peer) is an [`Error`].

use std::fmt;

/// What kind of failure an [`Error`] is; match on it, print the error itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A value that the user gave: a flag, a file's contents, a configuration.
    Input,
    /// A mesh or placement that cannot carry the program.
    Mesh,
    /// A memory budget exceeded.
    Memory,
    /// A device that is not there, cannot be opened, was lost or does not answer.
    Device,
    /// Reading or writing a file failed.
    Io,
    /// A checkpoint that is cut short, damaged, or of another shape.
    Checkpoint,
    /// A loss or gradient that is not a number or infinite.
    NotFinite,
    /// A chip panicked, returned early, or broke a collective; the others were stopped.
    Chip,
    /// Every chip waits for another one.
    Deadlock,
    /// A chip waited longer than the run's deadline.
    Deadline,
    /// The user asked to stop.
    Interrupted,
}

/// A failure with one sentence that says what, where, both numbers, and what to do.
#[derive(Clone, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    message: String,
}

impl Error {
    /// An error of `kind` with its sentence.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error {
            kind,
            message: message.into(),
        }
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The same error with `context` in front: `context: message`.
    pub fn within(self, context: impl fmt::Display) -> Self {
        Error {
            kind: self.kind,
            message: format!("{context}: {}", self.message),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.message)
    }
}

impl std::error::Error for Error {}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
