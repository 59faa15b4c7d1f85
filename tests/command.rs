//! The `supernode` command as a user meets it: results on standard output, one sentence and a status when it fails.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

const SMALL: &[&str] = &[
    "--layers",
    "2",
    "--hidden",
    "16",
    "--heads",
    "2",
    "--context",
    "8",
    "--batch",
    "4",
    "--eval-every",
    "0",
];

/// A directory with a text in it.
pub(crate) struct Bench {
    dir: TempDir,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let text =
            "the quick brown fox jumps over the lazy dog; pack my box with five dozen jugs. "
                .repeat(8);
        std::fs::write(dir.path().join("text"), text).expect("a text");
        Bench { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        self.by(Command::new(env!("CARGO_BIN_EXE_supernode")), arguments)
    }

    /// A training run by a program that runs what follows its own arguments.
    pub(crate) fn by(&self, mut command: Command, arguments: &[&str]) -> Command {
        command
            .current_dir(self.dir.path())
            .args(["train"])
            .args(SMALL)
            .args(arguments);
        command.env_remove("RUST_BACKTRACE").stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments)
            .output()
            .expect("the command starts")
    }

    /// The objects that a run with `--json` prints.
    pub(crate) fn json(&self, arguments: &[&str]) -> Vec<Value> {
        let out = self.run(&[&["--text", "text", "--json"], arguments].concat());
        assert!(
            out.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        let text = String::from_utf8(out.stdout).expect("UTF-8");
        text.lines()
            .map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{l}: {e}")))
            .collect()
    }

    /// Runs what has to fail: status 1, nothing on standard output, and one sentence with all of `says` in it.
    pub(crate) fn fails(&self, arguments: &[&str], says: &[&str]) {
        let out = self.run(arguments);
        let error = String::from_utf8_lossy(&out.stderr);
        assert_eq!(
            out.status.code(),
            Some(1),
            "{arguments:?} ended with {}: {error}",
            out.status
        );
        let last = error
            .lines()
            .filter(|l| l.starts_with("supernode: "))
            .collect::<Vec<_>>();
        assert_eq!(last.len(), 1, "{arguments:?}: {error}");
        for part in says {
            assert!(
                last[0].contains(part),
                "{arguments:?}: no '{part}' in: {}",
                last[0]
            );
        }
        assert!(!error.contains("panicked at"), "{arguments:?}: {error}");
    }
}

pub(crate) fn losses(lines: &[Value]) -> Vec<f64> {
    lines
        .iter()
        .filter(|l| l.get("ms").is_some())
        .map(|l| l["loss"].as_f64().expect("a loss"))
        .collect()
}

#[test]
fn json_has_a_line_per_step_and_evaluation_and_ends_with_done() {
    let bench = Bench::new();
    let lines = bench.json(&["--steps", "6", "--eval-every", "3", "--mesh", "dp=2,tp=2"]);
    let steps: Vec<u64> = lines
        .iter()
        .filter(|l| l.get("ms").is_some())
        .map(|l| l["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
    let evaluated: Vec<u64> = lines
        .iter()
        .filter(|l| l.get("val_loss").is_some() && l.get("done").is_none())
        .map(|l| l["step"].as_u64().unwrap())
        .collect();
    assert_eq!(evaluated, [3, 6]);
    let done = lines.last().expect("lines");
    assert_eq!(
        (done["done"].as_bool(), done["steps"].as_u64()),
        (Some(true), Some(6))
    );
    for key in [
        "loss",
        "val_loss",
        "tokens_per_second",
        "ms_per_step_median",
    ] {
        assert!(done[key].as_f64().is_some_and(|x| x > 0.0), "{key}: {done}");
    }
    assert_eq!(
        done["peak_bytes_per_chip"].as_array().map(Vec::len),
        Some(4)
    );
    let reduces = done["collectives"].as_array().expect("a list");
    for axis in ["dp", "tp"] {
        let found = reduces
            .iter()
            .find(|c| c["op"] == "all-reduce" && c["axis"] == axis);
        assert!(
            found.is_some_and(|c| c["calls"].as_u64() > Some(0) && c["bytes"].as_u64() > Some(0)),
            "{axis}: {done}"
        );
    }
}

#[test]
fn meshes_and_threads_agree_and_runs_repeat() {
    let bench = Bench::new();
    let one = losses(&bench.json(&["--steps", "8"]));
    assert_eq!(
        one,
        losses(&bench.json(&["--steps", "8", "--threads", "1"])),
        "threads change no bit"
    );
    for mesh in ["dp=2", "tp=2", "dp=2,tp=2", "dp=4"] {
        for how in ["tree", "ring", "recursive"] {
            let run = ["--steps", "8", "--mesh", mesh, "--collectives", how];
            for (a, b) in one.iter().zip(&losses(&bench.json(&run))) {
                assert!((a - b).abs() <= 1e-5, "{mesh} by {how}: {a} against {b}");
            }
        }
    }
    let end = ["--steps", "8", "--document-end", " "];
    let documents = losses(&bench.json(&end));
    assert_ne!(documents, one);
    let split = [&end[..], &["--mesh", "dp=2,cp=2"]].concat();
    for (a, b) in documents.iter().zip(&losses(&bench.json(&split))) {
        assert!((a - b).abs() <= 1e-5, "documents over cp: {a} against {b}");
    }
    let beside = ["--sequence-parallel", "--collective-matmul"];
    let run = [&["--steps", "8", "--mesh", "tp=2"][..], &beside].concat();
    for (a, b) in one.iter().zip(&losses(&bench.json(&run))) {
        assert!((a - b).abs() <= 1e-5, "{run:?}: {a} against {b}");
    }
    for how in ["gpipe", "1f1b", "zb-h1", "zb-v"] {
        let run = ["--steps", "8", "--mesh", "pp=2", "--schedule", how];
        let got = losses(&bench.json(&run));
        assert_eq!(got.len(), one.len());
        for (a, b) in one.iter().zip(&got) {
            assert!((a - b).abs() <= 1e-5, "pp=2 by {how}: {a} against {b}");
        }
    }
}

#[test]
fn texts_that_cannot_be_trained_on_are_refused() {
    let bench = Bench::new();
    std::fs::write(bench.path("empty"), "").unwrap();
    std::fs::write(bench.path("short"), "abc").unwrap();
    std::fs::write(bench.path("latin"), b"caf\xe9 ".repeat(100)).unwrap();
    bench.fails(&[], &["--text"]);
    bench.fails(&["--text", "absent"], &["absent", "No such file"]);
    bench.fails(&["--text", "empty"], &["empty"]);
    bench.fails(&["--text", "short"], &["short", "2 tokens", "9"]);
    bench.fails(
        &["--text", "latin", "--chars"],
        &["latin", "UTF-8", "offset 3"],
    );
    bench.fails(&["--tokens", "absent.bin"], &["absent.bin"]);
    bench.fails(&["--text", "text", "--vocab", "10"], &["10", "256"]);
}

#[test]
fn meshes_that_do_not_divide_are_refused_with_the_nearest_that_does() {
    let bench = Bench::new();
    let text = ["--text", "text"];
    bench.fails(
        &[&text[..], &["--mesh", "tp=3"]].concat(),
        &["tp=3", "2 heads", "tp=2"],
    );
    bench.fails(
        &[&text[..], &["--mesh", "dp=3"]].concat(),
        &["dp=3", "4 sequences", "dp=2"],
    );
    bench.fails(&[&text[..], &["--mesh", "dp"]].concat(), &["dp"]);
    bench.fails(&[&text[..], &["--mesh", "xy=2"]].concat(), &["xy=2"]);
    bench.fails(&[&text[..], &["--micro-batch", "3"]].concat(), &["3", "4"]);
    bench.fails(
        &[&text[..], &["--hidden", "15"]].concat(),
        &["15", "2 heads"],
    );
    bench.fails(
        &[&text[..], &["--device", "abacus"]].concat(),
        &["abacus", "cpu"],
    );
    #[cfg(feature = "gpu")]
    bench.fails(&[&text[..], &["--device", "gpu:77"]].concat(), &["gpu:77"]);
    bench.fails(&[&text[..], &["--dtype", "u32"]].concat(), &["u32"]);
    bench.fails(&[&text[..], &["--threads", "0"]].concat(), &["thread"]);
    bench.fails(
        &[&text[..], &["--mesh", "pp=6"]].concat(),
        &["pp=6", "2 layers", "pp=4"],
    );
    bench.fails(
        &[&text[..], &["--schedule", "gpipe", "--virtual-stages", "2"]].concat(),
        &["gpipe", "one chunk"],
    );
    bench.fails(
        &[&text[..], &["--sequence-parallel"]].concat(),
        &["sequence parallelism", "tp=2"],
    );
    let end = |token: &'static str| [&text[..], &["--document-end", token]].concat();
    bench.fails(&end("ab"), &["--document-end", "ab", "these are 2"]);
    bench.fails(&end("é"), &["--document-end", "these are 2"]);
    bench.fails(
        &[&end("é")[..], &["--chars"]].concat(),
        &["--document-end", "é", "not among"],
    );
    bench.fails(
        &[&text[..], &["--mesh", "tp=2", "--collective-matmul"]].concat(),
        &["give --sequence-parallel too"],
    );
}

#[test]
fn a_checkpoint_is_never_overwritten_by_accident() {
    let bench = Bench::new();
    bench.json(&["--steps", "4", "--checkpoint", "saved"]);
    bench.fails(
        &["--text", "text", "--steps", "8", "--checkpoint", "saved"],
        &["already", "step 4", "--resume"],
    );
    bench.fails(
        &["--text", "text", "--resume", "--checkpoint", "nowhere"],
        &["nowhere", "no checkpoint"],
    );
}

#[cfg(unix)]
/// The one file of weights in a checkpoint's directory.
fn weights(dir: &Path) -> PathBuf {
    let files = std::fs::read_dir(dir)
        .expect("a directory")
        .map(|e| e.expect("an entry").path());
    files
        .into_iter()
        .find(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .expect("weights")
}

#[test]
fn damaged_and_foreign_checkpoints_are_refused() {
    let bench = Bench::new();
    bench.json(&["--steps", "2", "--checkpoint", "c"]);
    let resume = [
        "--text",
        "text",
        "--steps",
        "4",
        "--checkpoint",
        "c",
        "--resume",
    ];
    bench.fails(
        &[&resume[..], &["--layers", "3"]].concat(),
        &["model", "layers", "2", "3"],
    );
    bench.fails(&[&resume[..], &["--seed", "7"]].concat(), &["seed", "7"]);
    let file = weights(&bench.path("c"));
    let good = std::fs::read(&file).expect("weights");
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    std::fs::write(&file, &bad).unwrap();
    bench.fails(&resume, &["safetensors"]);
    std::fs::write(&file, &good[..good.len() - 5]).unwrap();
    bench.fails(&resume, &["safetensors"]);
    std::fs::write(&file, &good).unwrap();
    let json = bench.path("c").join("checkpoint.json");
    let text = std::fs::read_to_string(&json).unwrap();
    std::fs::write(&json, text.replacen("\"step\": 2", "\"step\": 3", 1)).unwrap();
    bench.fails(&resume, &["checkpoint.json"]);
    std::fs::write(&json, &text).unwrap();
    assert!(bench.run(&resume).status.success());
}

#[test]
fn a_run_that_diverges_stops_and_keeps_the_last_checkpoint() {
    let bench = Bench::new();
    bench.json(&["--steps", "2", "--checkpoint", "c"]);
    let before = std::fs::read(weights(&bench.path("c"))).expect("weights");
    let wild = [
        "--text",
        "text",
        "--steps",
        "40",
        "--lr",
        "1e30",
        "--checkpoint",
        "c",
        "--resume",
    ];
    bench.fails(&wild, &["step", "checkpoint of step 2", "kept"]);
    assert_eq!(
        before,
        std::fs::read(weights(&bench.path("c"))).expect("weights")
    );
}

#[test]
fn a_ghost_says_what_a_run_would_need() {
    let bench = Bench::new();
    for more in [
        vec!["--mesh", "dp=2,tp=2"],
        vec!["--mesh", "dp=4", "--collectives", "ring"],
        vec!["--mesh", "tp=2", "--dtype", "bf16", "--recompute"],
        vec!["--mesh", "pp=2,fsdp=2", "--virtual-stages", "2"],
        vec![],
    ] {
        let mesh = [&more[..], &["--steps", "1"]].concat();
        let run = bench.json(&mesh);
        let ghost = bench.json(&[&mesh[..], &["--ghost"]].concat());
        let (run, ghost) = (run.last().unwrap(), ghost.last().unwrap());
        assert_eq!(
            run["peak_bytes_per_chip"], ghost["peak_bytes_per_chip"],
            "{more:?}"
        );
        assert_eq!(run["collectives"], ghost["collectives"], "{more:?}");
    }
    // Neither a text nor a machine of that size is needed.
    let out = bench.run(&[
        "--ghost",
        "--json",
        "--mesh",
        "dp=4096,tp=2",
        "--batch",
        "4096",
    ]);
    let done: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!(done["chips"].as_u64(), Some(8192), "{done}");
}

#[test]
fn a_trace_is_written_for_this_crate_and_for_viewers() {
    let bench = Bench::new();
    bench.json(&["--steps", "2", "--mesh", "dp=2", "--trace", "trace.json"]);
    let trace = supernode::trace::Trace::load(&bench.path("trace.json")).expect("a trace");
    assert_eq!((trace.mesh.chips(), trace.classes.len()), (2, 2));
    let json: Value =
        serde_json::from_slice(&std::fs::read(bench.path("trace.json")).unwrap()).expect("JSON");
    assert!(
        json["traceEvents"]
            .as_array()
            .is_some_and(|e| e.len() > 100)
    );
}

#[test]
fn tokenised_text_trains_and_samples() {
    let bench = Bench::new();
    let numbers: Vec<u8> = (0..600u16).flat_map(|i| (i % 11).to_le_bytes()).collect();
    std::fs::write(bench.path("t.bin"), numbers).unwrap();
    let out = bench.run(&[
        "--tokens", "t.bin", "--vocab", "11", "--steps", "3", "--json", "--sample", "5", "--mesh",
        "tp=2",
    ]);
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let text = String::from_utf8(out.stdout).unwrap();
    let sample = text
        .lines()
        .find(|l| l.contains("\"sample\""))
        .expect("a sample");
    let sample: Value = serde_json::from_str(sample).unwrap();
    assert_eq!(
        sample["sample"].as_str().map(|s| s.split(' ').count()),
        Some(6),
        "{sample}"
    );
}

#[test]
fn a_mixture_with_latent_attention_trains_on_a_mesh_of_experts() {
    let bench = Bench::new();
    let model = [
        "--preset",
        "llama-tiny",
        "--kv-heads",
        "2",
        "--experts",
        "4",
        "--expert-ffn",
        "16",
        "--shared-experts",
        "1",
        "--dense-layers",
        "1",
        "--router-score",
        "sigmoid",
        "--balance",
        "bias",
        "--attention",
        "mla",
        "--kv-lora-rank",
        "8",
        "--steps",
        "3",
    ];
    let lines = bench.json(&[&model[..], &["--mesh", "ep=2,tp=2"]].concat());
    for line in &lines[..3] {
        for key in ["dropped", "busiest_expert", "close_choices"] {
            assert!(line[key].is_number(), "no {key} in {line}");
        }
    }
    let ghost = bench.json(
        &[
            &model[..],
            &["--mesh", "dp=2,ep=4", "--batch", "8", "--ghost"],
        ]
        .concat(),
    );
    let calls = ghost[0]["collectives"].as_array().expect("a list");
    assert!(
        calls
            .iter()
            .any(|c| c["op"] == "all-to-all" && c["axis"] == "ep"),
        "{calls:?}"
    );
    for (wrong, says) in [
        (&["--mesh", "ep=3"][..], "ep=3 does not divide 4 experts"),
        (&["--experts-per-token", "9"], "9 experts per token of 4"),
        (
            &["--attention", "grouped"],
            "--kv-lora-rank belongs to latent attention",
        ),
    ] {
        bench.fails(&[&["--text", "text"], &model[..], wrong].concat(), &[says]);
    }
    let stray = ["--text", "text", "--shared-experts", "1"];
    bench.fails(&stray, &["--shared-experts", "give --experts too"]);
}

#[test]
fn devices_are_listed() {
    let list = |arguments: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_supernode"))
            .arg("devices")
            .args(arguments)
            .output()
            .expect("the command starts");
        assert!(out.status.success());
        String::from_utf8(out.stdout).expect("UTF-8")
    };
    let text = list(&[]);
    assert!(text.starts_with("cpu: "), "{text}");
    assert!(
        text.contains("gpu:0: ") || text.contains("no graphics processor: "),
        "{text}"
    );
    for line in list(&["--json"]).lines() {
        let object: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"));
        assert!(object["device"].is_string(), "{line}");
    }
}
