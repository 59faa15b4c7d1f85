//! `supernode calibrate`: measures this machine's processor into a machine file, and holds the file's forecast against a real run.
//!
//! What is measured are training steps of small models of several widths on the asked number of chips: a trace of a real run holds
//! the time of every op. So the curves have in them what a step has: threads that wake, caches that are cold, chips that share cores.
//! `--compare` prices the trace of a model that was not among them, the one of the example `train_step`, and runs it.

use super::output::{Output, print_text, tell};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use supernode::cluster::{Curve, Machine};
use supernode::forecast::{measured_account, measured_curves, measured_gap, price_trace};
use supernode::kernels::{MemoryStream, peak_flops};
use supernode::mesh::Mesh;
use supernode::model::{Config, Transformer};
use supernode::spmd::{Device, World};
use supernode::trace::Trace;
use supernode::train::data::{Alphabet, Batches, Split, Tokens};
use supernode::train::{Options, Report, Training};
use supernode::{DType, Error, ErrorKind, Result};

/// Arguments of `supernode calibrate`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Where the machine goes: FILE.toml, and beside it FILE-chip.toml and FILE-stack.toml
    #[arg(long, value_name = "FILE.toml")]
    out: PathBuf,
    /// Chips that this processor is divided into
    #[arg(long, default_value_t = 1, value_name = "N")]
    chips: usize,
    /// Threads of each; by default the cores divided by the chips
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Price a step of the example `train_step` on the new machine, run it in turn with what is measured, and print both
    #[arg(long)]
    compare: bool,
}

/// More threads of a chip than this are a mistake.
const MOST_THREADS: usize = 256;

/// Width, heads and key-value heads of the models that are timed. The one that `--compare` runs lies between them and is none of them.
const TIMED: [[usize; 3]; 4] = [[64, 2, 2], [96, 2, 2], [160, 4, 2], [192, 6, 2]];
/// The model of the example `train_step`.
const COMPARED: [usize; 3] = [128, 4, 2];
/// Runs of each, in turn, and steps of a run, of which the last one's events are kept.
const RUNS: usize = 12;
const STEPS: u64 = 5;

/// What the example `train_step` reads.
const TEXT: &str = concat!(
    include_str!("../mesh/mod.rs"),
    include_str!("../placement.rs"),
    include_str!("../tensor.rs"),
    include_str!("../ops/mod.rs"),
    include_str!("../ops/matmul.rs"),
    include_str!("../spmd/chip.rs"),
    include_str!("../spmd/redistribute.rs"),
    include_str!("../model/mod.rs"),
);

struct Timed {
    trace: Trace,
    /// Seconds of the last step, which the trace holds.
    seconds: f64,
    /// Seconds of all steps but the first.
    all: Vec<f64>,
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// The mesh of the example for so many chips: data parallel, from four chips on with two ways of tensor parallel.
fn mesh_of(chips: usize) -> Mesh {
    match chips {
        1 | 2 => Mesh::new([("dp", chips)]),
        _ => Mesh::new([("dp", chips / 2), ("tp", 2)]),
    }
}

/// A Llama of this width that reads characters, 16 sequences a step.
fn training([width, heads, kv_heads]: [usize; 3], mesh: &Mesh, steps: u64) -> Result<Training> {
    let tokens = Tokens::from_text(TEXT.as_bytes(), Alphabet::Characters, "the source")?;
    let split = Split::new(tokens.len(), 0.9)?;
    let (context, batch) = (64, 16);
    let vocabulary = tokens.vocabulary().len();
    let config = Config::llama(4, width, heads, kv_heads, vocabulary, context);
    Ok(Training {
        model: Transformer::new(config, mesh)?,
        batches: Batches::new(Arc::new(tokens), split, context, batch, 0)?,
        options: Options {
            steps,
            ..Options::default()
        },
    })
}

fn run_once(a: &Arguments, model: [usize; 3], mesh: &Mesh) -> Result<Timed> {
    let times = Mutex::new(Vec::new());
    let observe = |report: &Report| {
        if let Report::Step { ms, .. } = report {
            times
                .lock()
                .unwrap_or_else(|e| e.into_inner())
                .push(ms * 1e-3);
        }
    };
    let mut world = World::threads(mesh, Device::cpu())?;
    if let Some(threads) = a.threads {
        world = world.with_threads(threads);
    }
    let training = training(model, mesh, STEPS)?;
    let run = training.run(&world, &observe, &AtomicBool::new(false))?;
    let times = times.into_inner().unwrap_or_else(|e| e.into_inner());
    Ok(Timed {
        trace: run.trace().clone(),
        seconds: times[times.len() - 1],
        all: times[1..].to_vec(),
    })
}

/// The half of the runs whose last steps lie around the median: a step that the machine interrupted says nothing of its kernels.
fn middle(mut runs: Vec<Timed>) -> Vec<Timed> {
    runs.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    let quarter = runs.len() / 4;
    runs.drain(..quarter);
    runs.truncate(runs.len() - quarter);
    runs
}

/// Runs the command.
pub(super) fn run(a: &Arguments) -> Result<()> {
    let input = |why: &str| Err(Error::new(ErrorKind::Input, why));
    if ![1, 2, 4, 8, 16].contains(&a.chips) {
        return input(&format!(
            "--chips {}: 1, 2, 4, 8 or 16, of which each gets a share of 16 sequences",
            a.chips
        ));
    }
    if let Some(threads) = a.threads.filter(|t| !(1..=MOST_THREADS).contains(t)) {
        return input(&format!(
            "--threads {threads}: a chip has 1 to {MOST_THREADS}"
        ));
    }
    if a.out.extension().is_none_or(|e| e != "toml") {
        return input(&format!(
            "--out {}: a machine is named by its path, which ends in .toml",
            a.out.display()
        ));
    }
    let files = Files::new(&a.out)?;
    let mesh = mesh_of(a.chips);
    // In turn, so that all see the same machine, the run that the forecast is held against too.
    let mut timed: Vec<Vec<Timed>> = TIMED.iter().map(|_| vec![]).collect();
    let mut compared = vec![];
    for round in 0..RUNS {
        tell(&format!("measuring: round {} of {RUNS}", round + 1));
        for (model, runs) in TIMED.into_iter().zip(&mut timed) {
            runs.push(run_once(a, model, &mesh)?);
        }
        if a.compare {
            compared.push(run_once(a, COMPARED, &mesh)?);
        }
    }
    let kept: Vec<Timed> = timed.into_iter().flat_map(middle).collect();
    let gaps = kept.iter().map(|t| measured_gap(&t.trace, t.seconds));
    let gap = gaps.sum::<f64>() / kept.len() as f64;
    let traces: Vec<Trace> = kept.into_iter().map(|t| t.trace).collect();
    let curves = measured_curves(&traces, a.chips, "measured");
    files.write(a, &curves, gap)?;
    print_text(&format!(
        "{} curves of {} chips, {:.1} us between ops, written to {}\n",
        curves.len(),
        a.chips,
        gap * 1e6,
        a.out.display()
    ));
    match a.compare {
        true => compare(a, &mesh, compared),
        false => Ok(()),
    }
}

/// Bytes that a chip's trace says it sends in its latest step.
fn sent(trace: &Trace) -> u64 {
    let chip = &trace.classes[0].chip;
    let step = chip.latest.as_ref().or(chip.first.as_ref());
    let events = step.iter().flat_map(|s| &s.events);
    events
        .filter_map(|e| e.traffic.as_ref())
        .map(|t| t.bytes)
        .sum()
}

/// The forecast of the example's step on the machine that was written, beside its real runs.
fn compare(a: &Arguments, mesh: &Mesh, runs: Vec<Timed>) -> Result<()> {
    let machine = Machine::named(&a.out.to_string_lossy())?;
    let ghost = training(COMPARED, mesh, 1)?.trace(&World::ghost(mesh))?;
    let price = price_trace(&ghost, &machine, "f32")?;
    let real = median(runs.iter().flat_map(|r| r.all.clone()).collect());
    let (said, moved) = (sent(&ghost), sent(&runs[0].trace));
    let middle = middle(runs);
    let mut rows: BTreeMap<String, [f64; 2]> = BTreeMap::new();
    let class = &price.classes[0];
    let kernels = class.compute.iter().map(|(k, s)| (k.to_string(), *s));
    for (name, seconds) in kernels.chain(class.exposed.clone()) {
        rows.entry(name).or_default()[0] += seconds;
    }
    for run in &middle {
        for (name, seconds) in measured_account(&run.trace) {
            rows.entry(name).or_default()[1] += seconds / middle.len() as f64;
        }
        let between = measured_gap(&run.trace, run.seconds) * events(&run.trace) as f64;
        rows.entry("launch".into()).or_default()[1] += between / middle.len() as f64;
    }
    let mut text = format!("{:>12} {:>10} {:>10}\n", "ms of", "forecast", "measured");
    for (name, [forecast, measured]) in rows {
        let (forecast, measured) = (forecast * 1e3, measured * 1e3);
        let _ = writeln!(text, "{name:>12} {forecast:>10.2} {measured:>10.2}");
    }
    let forecast = price.seconds();
    let _ = writeln!(
        text,
        "a step of the example train_step on {} chips ({mesh}): forecast {:.2} ms, measured {:.2} ms, {:+.1} %; bytes sent {said} and {moved}, {}",
        a.chips,
        forecast * 1e3,
        real * 1e3,
        100.0 * (forecast / real - 1.0),
        if said == moved { "equal" } else { "DIFFERENT" }
    );
    print_text(&text);
    match said == moved {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::Input,
            format!("the ghost sends {said} bytes a step, the run {moved}"),
        )),
    }
}

/// Events of the latest step of the first chip.
fn events(trace: &Trace) -> usize {
    let chip = &trace.classes[0].chip;
    let step = chip.latest.as_ref().or(chip.first.as_ref());
    step.map_or(0, |s| s.events.len())
}

/// Rate of the op `name` at its largest size: work a second.
fn rate(curves: &[Curve], name: &str) -> Option<f64> {
    let curve = curves.iter().find(|c| c.kernel == name)?;
    let (amount, seconds) = *curve.points.last()?;
    Some(amount / seconds)
}

fn number(name: &str, value: f64, unit: &str, trust: &str) -> String {
    let source = if trust == "assumed" { "none" } else { "run" };
    format!(
        "{name} = {{ value = {value:e}, unit = \"{unit}\", source = \"{source}\", trust = \"{trust}\" }}\n"
    )
}

const SOURCES: &str = "[sources]\nrun = \"supernode calibrate on this machine: training steps of small models\"\n\
    none = \"no measurement\"\n\n";

/// The files of a machine: its chip and its stack lie beside the system.
struct Files {
    stem: String,
    chip: Output,
    stack: Output,
    system: Output,
}

impl Files {
    fn new(system: &Path) -> Result<Self> {
        let stem = system.file_stem().unwrap_or_default();
        let stem = stem.to_string_lossy().into_owned();
        let beside = |part| Output::new(&system.with_file_name(format!("{stem}-{part}.toml")));
        Ok(Files {
            chip: beside("chip")?,
            stack: beside("stack")?,
            system: Output::new(system)?,
            stem,
        })
    }

    fn write(self, a: &Arguments, curves: &[Curve], gap: f64) -> Result<()> {
        self.chip.write(&chip_sheet(a, curves))?;
        self.stack.write(&stack_sheet(gap))?;
        self.system.write(&system_sheet(a, curves, &self.stem))
    }
}

fn chip_sheet(a: &Arguments, curves: &[Curve]) -> String {
    // The peak of one chip while all of them compute, as the curves are.
    let threads = a.threads.unwrap_or_else(|| {
        std::thread::available_parallelism().map_or(1, |n| (n.get() / a.chips).max(1))
    });
    let peak = peak_flops(DType::F32) * threads as f64;
    let bandwidth = MemoryStream::new(1 << 28, 1 << 27).bytes_per_second();
    let share = |name: &str, of: f64| (rate(curves, name).unwrap_or(of) / of).clamp(0.01, 1.0);
    let mut text =
        String::from("title = \"a slice of this machine's processor\"\nstatus = \"shipping\"\n");
    text += "unknown = [\"memory.capacity\", \"power.tdp\", \"chip.cores\", \"vector.f32\", \"headline.bf16\", \"matmul.bf16\", \
        \"headline.int8\", \"matmul.int8\"]\nabsent = [\"headline.fp8\", \"matmul.fp8\", \"headline.fp4\", \"matmul.fp4\"]\n\n";
    text += SOURCES;
    text += &("[headline]\n".to_string() + &number("f32", peak / 1e9, "GFLOP/s", "fitted"));
    text += &("\n[matmul]\n".to_string() + &number("f32", peak / 1e9, "GFLOP/s", "fitted"));
    text += &("\n[memory]\n".to_string() + &number("bandwidth", bandwidth, "B/s", "fitted"));
    text += &("\n[link]\n".to_string()
        + &number("up", bandwidth, "B/s", "assumed")
        + &number("out", bandwidth, "B/s", "assumed"));
    text += &("\n[kernel.matmul]\n".to_string()
        + &number("efficiency", share("matmul", peak), "1", "fitted")
        + &number("memory", 1.0, "1", "assumed")
        + &number("prologue", 0.0, "1", "assumed"));
    text += &("\n[kernel.attention]\n".to_string()
        + &number("efficiency", share("attention", peak), "1", "fitted")
        + &number("backward", share("attention.backward", peak), "1", "fitted"));
    for (class, op) in [
        ("elementwise", "add"),
        ("norm", "rms_norm"),
        ("activation", "swiglu"),
    ] {
        let _ = write!(
            text,
            "\n[kernel.{class}]\n{}",
            number("memory", share(op, bandwidth), "1", "fitted")
        );
    }
    text
}

fn stack_sheet(gap: f64) -> String {
    let mut text = String::from("title = \"this crate\"\n\n") + SOURCES + "[stack]\n";
    for (name, word) in [
        ("attention", "fused"),
        ("dropout", "no"),
        ("tp_overlap", "none"),
        ("dp_overlap", "no"),
        ("pp_overlap", "no"),
        ("gradient", "f32"),
        ("exchange", "all-to-all"),
        ("exchange_overlap", "no"),
        ("reshard", "auto"),
    ] {
        let _ = writeln!(text, "{name} = \"{word}\"");
    }
    text += &number("gap", gap, "s", "fitted");
    text += &number("launch", 0.0, "s", "assumed");
    for name in [
        "allocator",
        "interference",
        "stragglers",
        "straggling",
        "jitter",
    ] {
        text += &number(name, 0.0, "1", "assumed");
    }
    text + &number("imbalance", 1.0, "1", "assumed")
}

fn system_sheet(a: &Arguments, curves: &[Curve], stem: &str) -> String {
    // Between chips: what a large all-reduce reaches, and the time of the smallest.
    let reduce = curves.iter().find(|c| c.kernel == "all-reduce");
    let last = reduce.and_then(|c| c.points.last()).copied();
    let bandwidth = last.map_or(1e10, |(bytes, seconds)| bytes / seconds);
    let latency = reduce.map_or(1e-6, |c| c.points[0].1 / 2.0);
    let mut text = String::from(
        "title = \"this machine's processor\"\nstatus = \"shipping\"\nunknown = [\"power.total\"]\n\n",
    );
    text += SOURCES;
    let _ = write!(
        text,
        "[system]\nchip = \"{stem}-chip.toml\"\nstack = \"{stem}-stack.toml\"\ngrows = \"no\"\n{}",
        number("chips", a.chips.max(2) as f64, "chips", "fitted")
    );
    let _ = write!(
        text,
        "\n[level.memory]\nkind = \"switch\"\n{}{}{}{}",
        number("chips", a.chips.max(2) as f64, "chips", "fitted"),
        number("bandwidth", bandwidth, "B/s", "fitted"),
        number("latency", latency, "s", "fitted"),
        number("efficiency", 1.0, "1", "assumed")
    );
    for curve in curves {
        let points: Vec<String> = curve
            .points
            .iter()
            .map(|(amount, seconds)| format!("[{amount:e}, {seconds:e}]"))
            .collect();
        let _ = write!(
            text,
            "\n[[curve]]\nkernel = \"{}\"\ngroup = {}\nsource = \"run\"\ntrust = \"fitted\"\npoints = [{}]\n",
            curve.kernel,
            curve.group,
            points.join(", ")
        );
    }
    text
}
