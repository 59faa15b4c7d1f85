//! `supernode bench`: times kernels and training steps, case by case, and says how near to the machine's limit they come.
//!
//! A case is an object a line, the same that other libraries are timed with, so that both sides can be compared in one run.
//! Everything runs on one chip with the case's number of threads, through the ops that programs use, on random numbers:
//! zeros would flatter some processors. A result is checked against the textbook before it is timed. On a graphics processor the
//! device's own clock then says what each kernel took.

mod attention;
mod cases;
mod matmul;
mod measure;
mod operands;
mod table;
mod train_step;
mod trainer;
#[cfg(feature = "gpu")]
mod tune;

use cases::{Case, Cases, Op};
use std::path::PathBuf;
use supernode::mesh::Mesh;
use supernode::spmd::{Device, World};
use supernode::{DType, Error, ErrorKind, Result};

/// Arguments of `supernode bench`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Cases, one JSON object a line, - for standard input; without it a default set
    #[arg(long, value_name = "FILE")]
    cases: Option<PathBuf>,
    /// Print each case with its results as one JSON object a line, instead of a table
    #[arg(long)]
    json: bool,
    /// What computes; on a graphics processor the case's threads wait for it
    #[arg(long, default_value = "cpu", value_name = "cpu|gpu|gpu:N")]
    backend: String,
    /// Instead of cases, time every way to cut up products on a graphics processor and write the table of the best to FILE
    #[cfg(feature = "gpu")]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["cases", "op", "dtype", "threads", "json"])]
    tune: Option<PathBuf>,
    /// Only cases of this op
    #[arg(long, value_enum)]
    op: Option<Op>,
    /// Only cases of this element type
    #[arg(long, value_name = "f32|bf16|f16")]
    dtype: Option<DType>,
    /// Only cases of this number of threads; the default set is made for it
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

/// Runs the command.
pub(super) fn run(a: &Arguments) -> Result<()> {
    let device = backend(&a.backend)?;
    #[cfg(feature = "gpu")]
    if let Some(path) = &a.tune {
        return tune::run(&device, path);
    }
    if a.threads == Some(0) {
        return Err(input("--threads 0: a case needs at least one thread"));
    }
    let cases = match &a.cases {
        Some(path) => Cases::read(path)?,
        None => Cases::default_set(a.threads),
    };
    let total = cases.0.len();
    let wanted: Vec<Case> = cases.0.into_iter().filter(|c| a.wants(c)).collect();
    if wanted.is_empty() {
        let why = format!("none of the {total} cases is left; see --op, --dtype, --threads");
        return Err(input(&why));
    }
    if !a.json {
        table::print_header();
    }
    for case in wanted {
        let world = World::threads(&Mesh::single(), device.clone())?.with_threads(case.threads);
        let run = world.run(|chip| case.run(chip));
        let run = run.map_err(|e| e.within(&case.origin))?;
        let measured = run.into_outputs().remove(0);
        match a.json {
            true => table::print_line(case, &device.to_string(), &measured),
            false => table::print_row(&case, &measured),
        }
    }
    Ok(())
}

impl Arguments {
    fn wants(&self, case: &Case) -> bool {
        self.op.is_none_or(|op| op == case.work.op())
            && self.dtype.is_none_or(|d| d == case.dtype)
            && self.threads.is_none_or(|t| t == case.threads)
    }
}

fn backend(name: &str) -> Result<Device> {
    match name.contains(',') {
        false => Device::parse(name),
        true => Err(input(&format!(
            "--backend {name}: cases are timed on one chip; name one of these"
        ))),
    }
}

fn input(sentence: &str) -> Error {
    Error::new(ErrorKind::Input, sentence)
}
