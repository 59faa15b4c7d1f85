//! Traces in files: one JSON object that this crate reads back and that trace viewers open as it is.
//!
//! The file is in Chrome's JSON object format (`traceEvents`), which allows keys of one's own: the whole [`Trace`] stands
//! under `supernode`, with a version.

use super::Trace;
use crate::error::{Error, ErrorKind, Result};
use crate::files;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

const VERSION: u32 = 1;

#[derive(Serialize)]
struct Written<'a> {
    #[serde(rename = "traceEvents")]
    events: Vec<Json>,
    #[serde(rename = "displayTimeUnit")]
    unit: &'static str,
    version: u32,
    supernode: &'a Trace,
}

#[derive(Deserialize)]
struct Read {
    version: Option<u32>,
    supernode: Option<Trace>,
}

impl Trace {
    /// Writes the trace to `path`, for [`Trace::load`] and for trace viewers (Perfetto, Chrome).
    ///
    /// # Errors
    /// [`ErrorKind::Io`] with path and cause.
    pub fn save(&self, path: &Path) -> Result<()> {
        let failed = |e: &dyn std::fmt::Display| {
            Error::new(
                ErrorKind::Io,
                format!("cannot write the trace to {}: {e}", path.display()),
            )
        };
        let written = Written {
            events: self.chrome_events(),
            unit: "ms",
            version: VERSION,
            supernode: self,
        };
        let mut file = BufWriter::new(File::create(path).map_err(|e| failed(&e))?);
        serde_json::to_writer(&mut file, &written).map_err(|e| failed(&e))?;
        file.flush().map_err(|e| failed(&e))
    }

    /// Reads a trace that [`Trace::save`] wrote.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the file cannot be read, [`ErrorKind::Input`] if it holds no trace of this version.
    pub fn load(path: &Path) -> Result<Trace> {
        let at = path.display();
        let bytes = files::read(path, u64::MAX)
            .map_err(|e| Error::new(ErrorKind::Io, format!("cannot read the trace {at}: {e}")))?;
        let broken = |why: String| {
            Error::new(
                ErrorKind::Input,
                format!("{at} is no trace of this crate: {why}"),
            )
        };
        let read: Read = serde_json::from_slice(&bytes).map_err(|e| broken(e.to_string()))?;
        match (read.version, read.supernode) {
            (Some(VERSION), Some(trace)) => Ok(trace),
            (Some(v), _) if v != VERSION => {
                Err(broken(format!("version {v}, this build reads {VERSION}")))
            }
            _ => Err(broken("it has no 'supernode' entry".into())),
        }
    }
}
