//! Signals that ask a run to stop: the first lets it finish its step, the second ends the process.

use super::output::tell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use supernode::{Error, ErrorKind, Result};

/// A flag that the first Ctrl-C, SIGTERM or SIGHUP sets. What this process was started to ignore, as `nohup` does with SIGHUP and a
/// shell with SIGINT of a background job, stays ignored.
///
/// # Errors
/// [`ErrorKind::Io`] if the system lets no handler be set.
pub(super) fn stop_when_asked() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let asked = move || {
        if flag.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        tell("supernode: finishing the step; press Ctrl-C again to end at once");
    };
    listen(asked)
        .map_err(|e| Error::new(ErrorKind::Io, format!("cannot listen for signals: {e}")))?;
    Ok(stop)
}

#[cfg(unix)]
fn listen(asked: impl Fn() + Send + 'static) -> std::io::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let ignored = ignored();
    let wanted = [SIGINT, SIGTERM, SIGHUP]
        .into_iter()
        .filter(|signal| ignored >> (signal - 1) & 1 == 0);
    let mut signals = signal_hook::iterator::Signals::new(wanted)?;
    let each = move || signals.forever().for_each(|_| asked());
    std::thread::Builder::new()
        .name("supernode signals".into())
        .spawn(each)?;
    Ok(())
}

/// Signals that this process ignores, a bit each from the lowest on. Only Linux tells without unsafe code; elsewhere none.
#[cfg(unix)]
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

#[cfg(not(unix))]
fn listen(asked: impl Fn() + Send + 'static) -> std::io::Result<()> {
    ctrlc::set_handler(asked).map_err(std::io::Error::other)
}
