//! `supernode plan`.

use super::forecast::{Model, On};
use super::output::print_text;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use supernode::forecast::{Forecast, Found, Search, Setting, choices};
use supernode::{Error, ErrorKind, Result};

/// Arguments of `supernode plan`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    on: On,
    #[command(flatten)]
    model: Model,
    /// Tokens of a step, such as 16M: 16 x 1024 x 1024
    #[arg(long, value_name = "N[K|M]", allow_hyphen_values = true)]
    tokens_per_batch: String,
    /// Tokens of a sequence; by default the model's
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Chips to use; by default the whole system
    #[arg(long, value_name = "N")]
    chips: Option<usize>,
    /// Type of matmuls
    #[arg(long, default_value = "bf16", value_parser = ["f32", "bf16", "fp8", "int8", "fp4"])]
    dtype: String,
    /// Splits to print
    #[arg(long, default_value_t = 10, value_name = "N")]
    top: usize,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(super) fn run(a: &Arguments) -> Result<()> {
    if a.top == 0 {
        let why = "--top 0: print at least 1 split";
        return Err(Error::new(ErrorKind::Input, why));
    }
    if a.chips == Some(0) {
        let why = "--chips 0: a step needs at least 1";
        return Err(Error::new(ErrorKind::Input, why));
    }
    let machine = a.on.machine()?;
    let model = a.model.architecture(&a.on)?;
    let context = a.context.unwrap_or(model.context);
    let tokens = count(&a.tokens_per_batch)?;
    if context == 0 {
        let why = "--context 0: a sequence has at least 1 token";
        return Err(Error::new(ErrorKind::Input, why));
    }
    if !tokens.is_multiple_of(context) {
        let why = format!(
            "--tokens-per-batch {tokens} is no multiple of the context {context}; {} is",
            (tokens / context).max(1) * context
        );
        return Err(Error::new(ErrorKind::Input, why));
    }
    let search = Search {
        model,
        chips: a.chips.unwrap_or(machine.chips()),
        global_batch: tokens / context,
        context,
        dtype: a.dtype.clone(),
    };
    let began = Instant::now();
    let (done, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let candidates = search.candidates();
    let total = candidates.len();
    let found = std::thread::scope(|scope| {
        scope.spawn(|| show(total, &done, &over));
        let found = search.run(&machine, candidates, a.top, &done);
        over.store(true, Ordering::Relaxed);
        found
    })?;
    if a.json {
        found
            .best
            .iter()
            .for_each(|(s, f)| print_text(&format!("{}\n", line(s, f))));
        return Ok(());
    }
    print_text(&format!(
        "{} on {} chips of {}, {} sequences of {} tokens: {} candidates, {} too large for the memory, {:.1} s\n",
        a.model.name(),
        search.chips,
        machine.system.title,
        search.global_batch,
        context,
        found.candidates,
        found.too_large,
        began.elapsed().as_secs_f64()
    ));
    table(&found);
    Ok(())
}

/// The bar, on a terminal only.
fn show(total: usize, done: &AtomicUsize, over: &AtomicBool) {
    let style = ProgressStyle::with_template("{bar:40} {pos} of {len} splits, {eta} left");
    let bar = ProgressBar::new(total as u64).with_style(style.expect("a template"));
    while !over.load(Ordering::Relaxed) {
        bar.set_position(done.load(Ordering::Relaxed) as u64);
        std::thread::sleep(Duration::from_millis(20));
    }
    bar.finish_and_clear();
}

/// `16M` as 16 x 1024 x 1024.
fn count(text: &str) -> Result<usize> {
    let (digits, scale) = match text.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1 << 10),
        None => match text.strip_suffix(['m', 'M']) {
            Some(digits) => (digits, 1 << 20),
            None => (text, 1),
        },
    };
    let number: Option<usize> = digits.parse().ok();
    number
        .and_then(|n| n.checked_mul(scale))
        .filter(|n| *n > 0)
        .ok_or_else(|| {
            let why = format!(
                "--tokens-per-batch {text}: write a number, with K or M behind it if you like"
            );
            Error::new(ErrorKind::Input, why)
        })
}

fn line(s: &Setting, f: &Forecast) -> serde_json::Value {
    let mut object = json!({
        "mesh": s.mesh.to_string(), "step_seconds": f.step_seconds, "mfu": f.mfu,
        "tokens_per_second": f.tokens / f.step_seconds,
        "memory_bytes_per_chip": f.memory.total(), "bubble_seconds": f.bubble_seconds,
        "exposed_communication_seconds": f.exposed, "sequence_parallel": s.sequence_parallel,
        "collective_matmul": s.collective_matmul, "micro_batch": s.micro_batch,
        "virtual_stages": s.virtual_stages, "zero": s.zero,
    });
    for (name, value) in choices(s) {
        if name == "schedule" || name == "recompute" {
            object[name] = json!(value);
        }
    }
    object
}

/// The splits, and beside each what it loses where: the reason for its place. Under `beside` stands whether products run beside the
/// transfers of sequence parallelism (`--collective-matmul`).
fn table(found: &Found) {
    print_text(&format!(
        "{:<34} {:>5} {:>8} {:>6} {:>9} {:>4} {:>6} {:>10} {:>6} {:>8}  {}\n",
        "mesh (last: neighbours)",
        "micro",
        "schedule",
        "chunks",
        "recompute",
        "zero",
        "beside",
        "step s",
        "mfu",
        "GB",
        "of it kernels, bubble and network"
    ));
    for (s, f) in &found.best {
        let share = |seconds: f64| format!("{:.1} %", 100.0 * seconds / f.step_seconds);
        let kernels: f64 = f.compute_seconds.values().sum();
        let bubble = format!("bubble {}", share(f.bubble_seconds));
        let waits = f.exposed.iter().map(|(k, v)| format!("{k} {}", share(*v)));
        let waits: Vec<String> = std::iter::once(bubble).chain(waits).collect();
        let [_, _, _, _, micro, schedule, chunks, recompute, zero, beside] =
            choices(s).map(|c| c.1);
        print_text(&format!(
            "{:<34} {micro:>5} {schedule:>8} {chunks:>6} {recompute:>9} {zero:>4} {beside:>6} {:>10.4} {:>5.1}% {:>8.1}  {}, {}\n",
            s.mesh.to_string(),
            f.step_seconds,
            f.mfu * 100.0,
            f.memory.total() / 1e9,
            share(kernels),
            waits.join(", ")
        ));
    }
    let Some((first, f)) = found.best.first() else {
        return;
    };
    print_text("why the first wins: the best with another choice, everything else free\n");
    let mine = choices(first);
    for (name, other, seconds) in &found.against {
        let own = mine.iter().find(|m| m.0 == *name);
        let own = own.map_or("", |m| m.1.as_str());
        print_text(&format!(
            "  {name} {own}: with {other} {:+.1} % at least\n",
            100.0 * (seconds / f.step_seconds - 1.0)
        ));
    }
}
