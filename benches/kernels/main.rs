//! Kernels on one chip, under criterion: matmul, attention, everything else of a step, and the step.
//!
//! ```sh
//! cargo bench                         # all, on 1 and 2 threads
//! cargo bench -- matmul               # what contains this name
//! cargo bench -- --against-stream     # the table of ops of rows against a stream, nothing else
//! cargo bench -- --splits             # a step on meshes against one chip, nothing else
//! ```
//!
//! Every product is checked against the textbook before it is timed. Results depend on the
//! machine and on what else runs: compare in one sitting. `benches/results` keeps some, by machine and date.

mod attention;
mod matmul;
mod rows;
mod splits;
mod step;

use criterion::Criterion;
use std::time::Duration;
use supernode::random::Stream;

/// `len` normal numbers: zeros would flatter some processors.
fn random(name: &str, len: usize) -> Vec<f32> {
    let stream = Stream::new(0, name);
    let mut x = vec![0.0; len];
    stream.fill_normal(0, &mut x);
    x
}

/// Runs `work` on a thread that is the first of a pool of `threads`.
fn on(threads: usize, work: impl FnOnce() + Send + 'static) {
    let inside = move || {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let _pool = pool.use_current_thread().build().expect("a pool");
        work();
    };
    let done = std::thread::spawn(inside).join();
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let all: Vec<String> = std::env::args().skip(1).collect();
    if all.iter().any(|a| a == "--splits") {
        let meshes: Vec<String> = all.into_iter().filter(|a| !a.starts_with('-')).collect();
        return splits::table(&meshes);
    }
    if arguments.any(|a| a == "--against-stream") {
        let wanted = arguments.find(|a| !a.starts_with('-')).unwrap_or_default();
        for threads in [1, 2] {
            let wanted = wanted.clone();
            on(threads, move || rows::table(threads, &wanted));
        }
        return;
    }
    for threads in [1, 2] {
        on(threads, move || {
            let mut c = Criterion::default()
                .sample_size(10)
                .warm_up_time(Duration::from_millis(200))
                .measurement_time(Duration::from_secs(1))
                .configure_from_args();
            matmul::bench(&mut c, threads);
            attention::bench(&mut c, threads);
            rows::bench(&mut c, threads);
            step::bench(&mut c, threads);
            c.final_summary();
        });
    }
}
