//! Steps from a model's sizes, whose equal layers are priced once, against ghosts of the training loop, which trace every op of every
//! layer.

use super::*;
use crate::DType;
use crate::collective::Kind;
use crate::model::{Config, ContextMethod, Transformer};
use crate::spmd::World;
use crate::trace::Trace;
use crate::train::data::{Alphabet, Batches, Split, Tokens};
use crate::train::{Options, Training};
use std::collections::BTreeMap;
use std::sync::Arc;

const MICRO: usize = 2;

fn config() -> Config {
    Config::gpt2(3, 2048, 16, 8192, 1024)
}

fn traced(mesh: &Mesh, rows: usize, split: impl Fn(Transformer) -> Transformer) -> Trace {
    let text = "abcdefghijklmnopqrstuvwxyz".repeat(200);
    let tokens = Tokens::from_text(text.as_bytes(), Alphabet::Characters, "letters").unwrap();
    let all = Split::new(tokens.len(), 1.0).unwrap();
    let config = config();
    let context = config.context;
    let training = Training {
        model: split(
            Transformer::new(config, mesh)
                .unwrap()
                .with_dtype(DType::Bf16),
        ),
        batches: Batches::new(Arc::new(tokens), all, context, rows, 0).unwrap(),
        options: Options {
            steps: 1,
            micro_batch: Some(MICRO),
            ..Options::default()
        },
    };
    training.trace(&World::ghost(mesh)).unwrap()
}

/// A machine whose software overlaps gradients' sums alone and is never late, as the traced program does.
fn plain() -> Machine {
    let mut machine = Machine::named("dgx-h100").unwrap();
    for (field, value) in [
        ("stack.tp_overlap", "none"),
        ("stack.dp_overlap", "yes"),
        ("stack.launch", "0"),
        ("stack.interference", "0"),
        ("stack.stragglers", "0"),
        // Products add to the sum of gradients themselves.
        ("stack.accumulation", "fused"),
    ] {
        machine.set(field, value).unwrap();
    }
    machine
}

/// What a step's work sums up to.
#[derive(Debug, Default)]
struct Sums {
    matmul: f64,
    attention: f64,
    all_reduce: f64,
    exchanged: f64,
    around: f64,
    messages: f64,
}

impl Sums {
    fn add(&mut self, work: &Work, times: f64) {
        match work {
            Work::Matmul { .. } => self.matmul += times * work.flops(),
            Work::Attention { flops, .. } => self.attention += times * flops,
            Work::Collective { kind, bytes, .. } if *bytes > 1e5 => match kind {
                Kind::AllReduce => self.all_reduce += times * bytes,
                Kind::AllToAll => self.exchanged += times * bytes,
                Kind::Shift => self.around += times * bytes,
                _ => {}
            },
            // Shares that go round: each of R chips sends R - 1 of R shares; a shift's bytes are those of all chips' messages.
            Work::Ring { bytes, .. } => self.around += times * bytes,
            Work::Message { bytes, .. } => self.messages += times * bytes,
            _ => {}
        }
    }

    fn of_trace(trace: &Trace) -> Sums {
        let chip = &trace.classes[0].chip;
        let step = chip.latest.as_ref().or(chip.first.as_ref()).unwrap();
        let mut sums = Sums::default();
        for work in step.events.iter().flat_map(Work::of_event) {
            sums.add(&work, 1.0);
        }
        sums
    }

    fn of_setting(setting: &Setting, machine: &Machine) -> Sums {
        let (shape, block) = (setting.shape(machine), setting.model.block(0));
        let micros = setting.micros() as f64;
        let layers = micros * setting.model.layers as f64;
        let mut sums = Sums::default();
        for (tasks, times) in [
            (shape.forward(block), layers),
            (shape.backward(block), layers),
            (shape.embedding(), micros),
            (shape.embedding_backward(), micros),
            (shape.head(false), micros),
            (shape.head(true), micros),
        ] {
            tasks.iter().for_each(|t| sums.add(&t.work, times));
        }
        sums
    }
}

/// Calls, bytes and seconds alone of each kind of op and transfer of a traced step.
fn traced_by_op(trace: &Trace, machine: &Machine) -> BTreeMap<String, [f64; 3]> {
    let (rates, network) = (
        Rates::of(machine, "bf16").unwrap(),
        Network::of(machine).unwrap(),
    );
    let chip = &trace.classes[0].chip;
    let step = chip.latest.as_ref().or(chip.first.as_ref()).unwrap();
    let mut all: BTreeMap<String, [f64; 3]> = BTreeMap::new();
    for event in &step.events {
        for work in Work::of_event(event) {
            let (name, bytes) = match &event.traffic {
                Some(t) => (
                    format!(
                        "{} over {} {:?}",
                        work.name(),
                        work.axis().unwrap_or(""),
                        event.stream
                    ),
                    t.bytes as f64,
                ),
                None => (event.op.to_string(), event.bytes as f64),
            };
            let seconds = rates.seconds(&work) + network.seconds(&trace.mesh, &work).unwrap_or(0.0);
            let sum = all.entry(name).or_default();
            *sum = [sum[0] + 1.0, sum[1] + bytes, sum[2] + seconds];
        }
    }
    all
}

/// The same of a generated step, without what follows the pipeline.
fn generated_by_op(setting: &Setting, machine: &Machine) -> BTreeMap<String, [f64; 3]> {
    let (rates, network) = (
        Rates::of(machine, "bf16").unwrap(),
        Network::of(machine).unwrap(),
    );
    let (shape, block) = (setting.shape(machine), setting.model.block(0));
    let micros = setting.micros() as f64;
    let layers = micros * setting.model.layers as f64;
    let mut all: BTreeMap<String, [f64; 3]> = BTreeMap::new();
    for (pass, tasks, times) in [
        ("forward", shape.forward(block), layers),
        ("backward", shape.backward(block), layers),
        ("embedding", shape.embedding(), micros),
        ("embedding", shape.embedding_backward(), micros),
        ("head", shape.head(false), micros),
        ("head", shape.head(true), micros),
    ] {
        for task in tasks {
            let work = &task.work;
            let bytes = match work {
                Work::Stream { bytes, .. }
                | Work::Attention { bytes, .. }
                | Work::Collective { bytes, .. }
                | Work::Ring { bytes, .. } => *bytes,
                _ => 0.0,
            };
            let seconds = rates.seconds(work) + network.seconds(&setting.mesh, work).unwrap_or(0.0);
            let axis = work.axis().map_or(String::new(), |a| format!(" over {a}"));
            let sum = all
                .entry(format!("{pass} {}{axis}", work.name()))
                .or_default();
            *sum = [
                sum[0] + times,
                sum[1] + times * bytes,
                sum[2] + times * seconds,
            ];
        }
    }
    all
}

fn print_by_op(title: &str, ops: &BTreeMap<String, [f64; 3]>) {
    println!("  {title}, op by op: calls, MB, ms");
    for (name, [calls, bytes, seconds]) in ops {
        println!(
            "    {name:<44} {calls:>5} {:>9.1} {:>8.4}",
            bytes / 1e6,
            1e3 * seconds
        );
    }
}

#[test]
fn generated_steps_are_what_ghosts_trace() {
    let machine = plain();
    let usp = |exchange| {
        (
            ContextMethod::Usp { exchange },
            ContextParallel::Usp { exchange },
        )
    };
    let ulysses = (ContextMethod::Ulysses, ContextParallel::Ulysses);
    for (axes, method, rows) in [
        (("dp", 1), None, 8),
        (("dp", 4), None, 8),
        (("tp", 4), None, 8),
        (("cp", 4), Some(ulysses), MICRO),
        (("cp", 4), Some(usp(Some(2))), MICRO),
        (("cp", 4), Some(usp(None)), MICRO),
        (("cp", 4), Some(ulysses), 8),
        (("cp", 4), Some(usp(Some(2))), 8),
        (("cp", 4), Some(usp(None)), 8),
    ] {
        let mesh = Mesh::new([axes]);
        let trace = traced(&mesh, rows, |m| m.with_context_method(method.map(|m| m.0)));
        let setting = Setting {
            micro_batch: MICRO,
            context_parallel: method.map_or(ContextParallel::Ring, |m| m.1),
            ..Setting::new(
                (&config()).into(),
                Mesh::new(AXES.map(|a| (a, mesh.size_of(a)))),
                rows,
            )
        };
        let (ghost, made) = (Sums::of_trace(&trace), Sums::of_setting(&setting, &machine));
        println!("{axes:?} {method:?}\n  traced {ghost:?}\n  generated {made:?}");
        // Products alike to the last operation; attention counts exact pairs, or half of all of them.
        assert_eq!(ghost.matmul, made.matmul, "{axes:?}");
        let near = |a: f64, b: f64, bound: f64| (a - b).abs() <= bound * b;
        assert!(near(ghost.attention, made.attention, 0.02), "{axes:?}");
        if axes.0 == "tp" {
            assert!(near(ghost.all_reduce, made.all_reduce, 1e-3), "{axes:?}");
        }
        assert!(
            near(ghost.exchanged, made.exchanged, 1e-9),
            "{axes:?} {method:?}"
        );
        // Forward keys and values go round as they are; backward this crate's gradients travel in f32, not in 2 bytes.
        let around = made.around * 4.0 / 3.0;
        assert!(
            (ghost.around - around).abs() <= 1e-9 * around,
            "{axes:?} {method:?}"
        );
        let priced = price_trace(&trace, &machine, "bf16").unwrap();
        let said = setting.price(&machine).unwrap();
        println!(
            "  traced {:.2} ms {:?} {:?}\n  generated {:.2} ms {:?} {:?}",
            1e3 * priced.seconds(),
            priced.classes[0].compute,
            priced.classes[0].exposed,
            1e3 * said.step_seconds,
            said.compute_seconds,
            said.exposed
        );
        let error = priced.seconds() / said.step_seconds - 1.0;
        println!("  {:+.1} %", 100.0 * error);
        let (ghosts, made) = (
            traced_by_op(&trace, &machine),
            generated_by_op(&setting, &machine),
        );
        print_by_op("traced", &ghosts);
        print_by_op("generated", &made);
        // Tokens are exchanged for heads as often, among as many chips, and so for as long.
        let exchanges = |ops: &BTreeMap<String, [f64; 3]>| {
            let own = ops.iter().filter(|(name, _)| name.contains("all-to-all"));
            own.fold((0.0, 0.0), |sum, (_, op)| (sum.0 + op[0], sum.1 + op[2]))
        };
        let ((calls, seconds), (made_calls, made_seconds)) = (exchanges(&ghosts), exchanges(&made));
        assert_eq!(calls, made_calls, "{axes:?} {method:?}");
        assert!(
            near(seconds, made_seconds, 1e-6),
            "{axes:?} {method:?}: {seconds}, {made_seconds}"
        );
        assert!(
            error.abs() <= 0.15,
            "{axes:?} {method:?}, {rows} sequences: {error}"
        );
    }
}

#[test]
fn a_collective_matmuls_steps_are_what_ghosts_trace() {
    let machine = plain();
    let mesh = Mesh::new([("tp", 4)]);
    let rows = 8;
    let priced = |collective_matmul: bool| {
        let trace = traced(&mesh, rows, |m| {
            m.with_sequence_parallel(true)
                .with_collective_matmul(collective_matmul)
        });
        let setting = Setting {
            micro_batch: MICRO,
            sequence_parallel: true,
            collective_matmul,
            ..Setting::new(
                (&config()).into(),
                Mesh::new(AXES.map(|a| (a, mesh.size_of(a)))),
                rows,
            )
        };
        let (ghost, made) = (Sums::of_trace(&trace), Sums::of_setting(&setting, &machine));
        println!("collective matmul {collective_matmul}\n  traced {ghost:?}\n  generated {made:?}");
        assert_eq!(ghost.matmul, made.matmul);
        let traced = price_trace(&trace, &machine, "bf16").unwrap();
        let said = setting.price(&machine).unwrap();
        let of = |p: &TracePrice| p.classes[0].exposed["tp"];
        println!(
            "  traced {:.2} ms, {:.2} waiting; generated {:.2} ms, {:.2} waiting",
            1e3 * traced.seconds(),
            1e3 * of(&traced),
            1e3 * said.step_seconds,
            1e3 * said.exposed["tp"]
        );
        let error = traced.seconds() / said.step_seconds - 1.0;
        assert!(error.abs() <= 0.15, "{collective_matmul}: {error}");
        (ghost, made, of(&traced), said)
    };
    let (ghost, made, traced, said) = priced(true);
    // A shift's bytes are those of all chips' messages.
    assert!(made.messages > 0.0);
    assert_eq!(ghost.around, 4.0 * made.messages);
    let (_, _, traced_without, said_without) = priced(false);
    assert!(traced < traced_without && said.exposed["tp"] < said_without.exposed["tp"]);
    assert!(said.memory.activations > said_without.memory.activations);
}
