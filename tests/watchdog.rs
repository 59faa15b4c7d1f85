//! A test of what must not hang may not hang itself: it runs on a thread that the test gives up on after a while.

use std::sync::mpsc;
use std::time::Duration;

/// Longer than any of these programs takes, short enough for a person to wait.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs `body` on a thread of its own and returns what it returns.
///
/// # Panics
/// If `body` panics, or has not returned after 20 s: its threads are then left behind.
pub(crate) fn watched<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, wait) = mpsc::channel();
    let thread = std::thread::spawn(move || done.send(body()).ok());
    match wait.recv_timeout(PATIENCE) {
        Ok(result) => result,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("it hangs: no end after {PATIENCE:?}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => match thread.join() {
            Err(payload) => std::panic::resume_unwind(payload),
            Ok(_) => unreachable!("a body that returns sends its result first"),
        },
    }
}
