//! Files as memory: token files and weights are read where the page cache holds them, without a copy.
#![allow(unsafe_code)]

use memmap2::Mmap;
use std::fs::File;
use std::io;
use std::path::Path;

/// Maps the regular file at `path` for reading.
///
/// The file must not be shortened or changed in place while it is mapped. This crate never does: it writes a new file
/// and renames it. Elsewhere it is the user's to keep; a shortened file ends the process when its lost pages are read.
pub(super) fn map(path: &Path) -> io::Result<Mmap> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        // A directory or a pipe can be opened, and then fails to map with a message about devices.
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is no regular file",
        ));
    }
    // SAFETY: the mapping is read-only and nothing in this process writes to the file in place (the contract above);
    // no system can exclude that another process does, which the docs of every caller leave to the user.
    unsafe { Mmap::map(&file) }
}
