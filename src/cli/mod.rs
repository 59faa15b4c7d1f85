//! The command line: arguments in, one sentence out when something is wrong.
//!
//! Standard output carries results (with `--json` one object a line), standard error everything else.

mod architecture;
mod bench;
mod calibrate;
mod chips;
mod devices;
mod forecast;
mod generate;
mod machines;
mod output;
mod plan;
mod preset;
mod progress;
mod shares;
mod signals;
mod text;
mod train;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Transformer kernels split over many chips.
#[derive(Debug, Parser)]
#[command(
    name = "supernode",
    version,
    about,
    max_term_width = 100,
    args_override_self = true
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a transformer on a text, over a mesh of chips on this machine
    #[command(args_override_self = true)]
    Train(Box<train::Arguments>),
    /// Continue texts with a trained model, over a mesh of chips on this machine
    #[command(args_override_self = true)]
    Generate(Box<generate::Arguments>),
    /// Time kernels and training steps against this machine's limits
    #[command(args_override_self = true)]
    Bench(bench::Arguments),
    /// List what chips can be on this machine, and what is missing
    Devices(devices::Arguments),
    /// Say what a training step costs on a described machine
    #[command(args_override_self = true)]
    Forecast(Box<forecast::Arguments>),
    /// Search the best split of a model over a described machine
    #[command(args_override_self = true)]
    Plan(Box<plan::Arguments>),
    /// Measure this machine's processor into a machine file
    #[command(args_override_self = true)]
    Calibrate(calibrate::Arguments),
    /// List and compare the described machines
    #[command(args_override_self = true)]
    Machines(machines::Arguments),
}

/// A training run that a signal stopped after it had saved.
const STOPPED: u8 = 3;

/// Runs the command. Status 0 if it did what was asked, 1 if not, 2 if the arguments cannot be understood, 3 if a training run was
/// stopped by a signal before its end.
pub(crate) fn run() -> ExitCode {
    keep_panics_of_chips_for_the_error();
    let done = |()| ExitCode::SUCCESS;
    let result = match Arguments::parse().command {
        Command::Train(arguments) => train::run(&arguments).map(|outcome| match outcome {
            train::Outcome::Done => ExitCode::SUCCESS,
            train::Outcome::Stopped => ExitCode::from(STOPPED),
        }),
        Command::Generate(arguments) => generate::run(&arguments).map(done),
        Command::Bench(arguments) => bench::run(&arguments).map(done),
        Command::Devices(arguments) => devices::run(&arguments).map(done),
        Command::Forecast(arguments) => forecast::run(&arguments).map(done),
        Command::Plan(arguments) => plan::run(&arguments).map(done),
        Command::Calibrate(arguments) => calibrate::run(&arguments).map(done),
        Command::Machines(arguments) => machines::run(&arguments).map(done),
    };
    match result.and_then(|status| output::check_printed().map(|()| status)) {
        Ok(status) => status,
        Err(error) => {
            output::tell(&format!("supernode: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// A panic on a chip becomes the run's error, which is printed once; the default hook would print it a second time, in the
/// middle of the progress line.
fn keep_panics_of_chips_for_the_error() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let chip = std::thread::current()
            .name()
            .is_some_and(|n| n.starts_with("supernode rank"));
        if !chip || std::env::var_os("RUST_BACKTRACE").is_some() {
            default(info);
        }
    }));
}
