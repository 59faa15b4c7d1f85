//! What the command does when it is interrupted, or when nobody can read what it says.

use crate::command::Bench;
use serde_json::Value;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

const STOPPED: i32 = 3;

/// A run that listens to signals although this test may ignore them, as a shell's background job does.
fn listening(bench: &Bench, arguments: &[&str]) -> Command {
    let mut env = Command::new("env");
    env.args([
        "--default-signal=INT,HUP,TERM",
        env!("CARGO_BIN_EXE_supernode"),
    ]);
    bench.by(env, arguments)
}

fn signal(child: &Child, name: &str) {
    let mut kill = Command::new("kill");
    let status = kill.args([name, &child.id().to_string()]).status();
    assert!(status.expect("kill runs").success());
}

/// Waits for so many lines of standard output.
fn after_lines(child: &mut Child, n: usize) -> impl Iterator<Item = Value> + use<> {
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    for _ in 0..n {
        lines.next().expect("a step").expect("a line");
    }
    lines.map(|l| serde_json::from_str(&l.expect("a line")).expect("JSON"))
}

const LONG: &[&str] = &[
    "--text",
    "text",
    "--json",
    "--steps",
    "400",
    "--checkpoint",
    "saved",
];

fn losses(lines: &[Value]) -> Vec<f64> {
    lines.iter().filter_map(|l| l["loss"].as_f64()).collect()
}

#[test]
#[cfg(target_os = "linux")]
fn a_signal_saves_and_has_a_status_of_its_own() {
    for name in ["-INT", "-TERM", "-HUP"] {
        let bench = Bench::new();
        // Whoever reads standard error dies first, as `tee` does of a Ctrl-C.
        let mut child = listening(&bench, LONG)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts");
        let lines = after_lines(&mut child, 5);
        drop(child.stderr.take());
        signal(&child, name);
        let rest: Vec<Value> = lines.collect();
        assert_eq!(child.wait().expect("ends").code(), Some(STOPPED), "{name}");
        let done = rest.last().expect("the last line");
        let steps = done["steps"].as_u64().expect("steps");
        assert!(done["stopped"] == true && steps < 400, "{done}");
        let resumed = bench.json(&["--steps", "400", "--checkpoint", "saved", "--resume"]);
        assert_eq!(resumed[0]["step"].as_u64(), Some(steps + 1));
        let whole = losses(&bench.json(&["--steps", "400"]));
        let (whole, after) = (&whole[steps as usize..], losses(&resumed));
        assert_eq!(whole, after, "resumed after step {steps}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn what_was_to_be_ignored_stays_ignored() {
    let bench = Bench::new();
    let mut nohup = Command::new("env");
    nohup.args([
        "--default-signal=INT,TERM",
        "--ignore-signal=HUP",
        env!("CARGO_BIN_EXE_supernode"),
    ]);
    let mut child = bench
        .by(nohup, &["--text", "text", "--json", "--steps", "60"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    let lines = after_lines(&mut child, 3);
    signal(&child, "-HUP");
    let last = lines.last().expect("lines");
    assert!(child.wait().expect("ends").success());
    assert!(last["steps"] == 60 && last["stopped"] == false, "{last}");
}

#[test]
#[cfg(target_os = "linux")]
fn progress_that_cannot_be_shown_stops_nothing() {
    let bench = Bench::new();
    let full = OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .expect("a full device");
    let run = ["--text", "text", "--steps", "3", "--checkpoint", "saved"];
    let status = bench
        .command(&run)
        .stderr(full)
        .stdout(Stdio::null())
        .status();
    assert!(status.expect("runs").success());
    assert!(bench.json(&["--steps", "4", "--checkpoint", "saved", "--resume"])[0]["step"] == 4);
}

#[test]
#[cfg(target_os = "linux")]
fn results_that_cannot_be_written_are_an_error() {
    let full = || {
        OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .expect("a full device")
    };
    let bench = Bench::new();
    let mut machines = Command::new(env!("CARGO_BIN_EXE_supernode"));
    machines.arg("machines");
    let train = bench.command(&["--text", "text", "--steps", "2"]);
    for mut command in [machines, train] {
        let out = command.stdout(full()).output().expect("runs");
        let error = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{error}");
        assert!(error.contains("cannot write standard output"), "{error}");
    }
}

/// As `supernode machines | head -1`: enough was read.
#[test]
fn a_closed_pipe_ends_quietly() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_supernode"))
        .arg("machines")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    drop(child.stdout.take());
    let out = child.wait_with_output().expect("ends");
    assert!(out.status.success() && out.stderr.is_empty(), "{out:?}");
}

#[test]
fn the_environments_number_of_threads_is_honoured_or_refused() {
    let bench = Bench::new();
    for (threads, says) in [
        ("1", "1 thread(s) each"),
        ("0", "RAYON_NUM_THREADS=0"),
        ("many", "RAYON_NUM_THREADS=many"),
    ] {
        let mut run = bench.command(&["--text", "text", "--steps", "1"]);
        let out = run
            .env("RAYON_NUM_THREADS", threads)
            .output()
            .expect("runs");
        let error = String::from_utf8_lossy(&out.stderr);
        assert!(error.contains(says), "{threads}: {error}");
        assert_eq!(out.status.success(), threads == "1", "{error}");
    }
}

#[test]
fn a_large_vocabulary_wants_a_stated_width() {
    let bench = Bench::new();
    let tokens = ["--tokens", "text", "--vocab", "100000", "--steps", "1"];
    bench.fails(&tokens, &["--vocab 100000", "65536", "--token-width u32"]);
}

/// Sizes that no machine has are refused with a sentence, at once.
#[test]
fn absurd_sizes_are_refused() {
    let bench = Bench::new();
    let huge = "4611686018427387904";
    for flag in [
        "--layers",
        "--hidden",
        "--vocab",
        "--batch",
        "--context",
        "--ffn",
        "--heads",
    ] {
        for size in ["1000000007", huge, "18446744073709551615"] {
            // These are possible: a dry run allocates nothing.
            if size == "1000000007" && ["--vocab", "--batch"].contains(&flag) {
                continue;
            }
            bench.fails(&["--ghost", flag, size], &[size]);
        }
    }
    bench.fails(
        &["--text", "text", "--threads", "10000"],
        &["--threads 10000", "1024"],
    );
    let forecast = "forecast --machine dgx-a100 --model gpt3-175b --mesh tp=8,pp=8 --global-batch 64 --virtual-stages";
    let experts = "plan --machine cloudmatrix-384 --model gpt3-175b --tokens-per-batch 16M --experts 1000000007";
    for (command, says) in [
        (format!("{forecast} {huge}"), "pieces of work"),
        (format!("{forecast} 1000000007"), "pieces of work"),
        (experts.to_string(), "1000000007"),
    ] {
        let began = std::time::Instant::now();
        let out = Command::new(env!("CARGO_BIN_EXE_supernode"))
            .args(command.split(' '))
            .output()
            .expect("runs");
        let error = String::from_utf8_lossy(&out.stderr);
        assert!(
            !out.status.success() && error.contains(says),
            "{command}: {error}"
        );
        assert!(!error.contains("panicked"), "{command}: {error}");
        assert!(
            began.elapsed().as_secs() < 20,
            "{command} took {:?}",
            began.elapsed()
        );
    }
}
