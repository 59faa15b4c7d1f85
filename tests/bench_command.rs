//! `supernode bench` as a user meets it: a line per case with its results, and a sentence for what cannot be timed.

use serde_json::Value;
use std::io::Write;
use std::process::{Command, Output, Stdio};
use tempfile::NamedTempFile;

const MATMUL: &str =
    r#"{"op":"matmul","m":17,"k":33,"n":5,"layout":"tn","dtype":"f32","threads":1}"#;
const BATCHES: &str =
    r#"{"op":"matmul","batch":3,"m":8,"k":16,"n":40,"layout":"nt","dtype":"bf16","threads":2}"#;
const MATRIX_VECTOR: &str = r#"{"op":"matmul","m":1,"k":512,"n":512,"layout":"tt","dtype":"f16"}"#;
const FORWARD: &str = r#"{"op":"attention","batch":2,"heads":4,"kv_heads":2,"tokens":37,"head_dim":16,"causal":false,"pass":"forward","dtype":"bf16","threads":2}"#;
const BACKWARD: &str = r#"{"op":"attention","batch":1,"heads":4,"tokens":70,"head_dim":8,"causal":true,"pass":"backward","dtype":"f32","threads":1}"#;
const STEP: &str =
    r#"{"op":"train_step","model":"char-6x384","batch":1,"tokens":8,"dtype":"bf16","threads":2}"#;

fn file(lines: &[&str]) -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("a temporary file");
    writeln!(file, "{}", lines.join("\n")).expect("written");
    file
}

fn bench(cases: &NamedTempFile, arguments: &[&str]) -> Output {
    let path = cases.path().to_str().expect("a UTF-8 path");
    run(&[&["--cases", path], arguments].concat())
}

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_supernode"))
        .arg("bench")
        .args(arguments)
        .env_remove("RUST_BACKTRACE")
        .stdin(Stdio::null())
        .output()
        .expect("the command starts")
}

fn lines(out: &Output) -> Vec<Value> {
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && error.is_empty(), "{error}");
    let text = std::str::from_utf8(&out.stdout).expect("UTF-8");
    text.lines()
        .map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{l}: {e}")))
        .collect()
}

/// Status 1, nothing on standard output, one sentence with all of `says` in it.
fn refused(out: &Output, says: &[&str]) {
    let error = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{error}");
    assert!(
        out.stdout.is_empty(),
        "{}",
        String::from_utf8_lossy(&out.stdout)
    );
    assert!(
        error.starts_with("supernode: ") && error.lines().count() == 1,
        "{error}"
    );
    for part in says {
        assert!(error.contains(part), "no '{part}' in: {error}");
    }
}

#[test]
fn every_case_comes_back_with_its_results() {
    let cases = [MATMUL, BATCHES, MATRIX_VECTOR, FORWARD, BACKWARD];
    let results = lines(&bench(&file(&cases), &["--json"]));
    assert_eq!(results.len(), cases.len());
    let pairs = 4.0 * 4.0 * 70.0 * 70.0 * 8.0;
    let flops = [
        2.0 * 17.0 * 33.0 * 5.0,
        2.0 * 3.0 * 8.0 * 16.0 * 40.0,
        2.0 * 512.0 * 512.0,
        4.0 * 2.0 * 4.0 * 37.0 * 37.0 * 16.0,
        2.5 * pairs / 2.0,
    ];
    for ((case, result), flops) in cases.iter().zip(&results).zip(flops) {
        let case: Value = serde_json::from_str(case).unwrap();
        for (name, value) in case.as_object().unwrap() {
            assert_eq!(&result[name], value, "{name}: {result}");
        }
        assert_eq!(result["backend"], "cpu", "{result}");
        let number = |name: &str| {
            result[name]
                .as_f64()
                .unwrap_or_else(|| panic!("{name}: {result}"))
        };
        let counted = number("gflops") * 1e9 * number("seconds");
        assert!(
            (counted - flops).abs() <= 1e-9 * flops,
            "{counted} flops, not {flops}: {result}"
        );
        assert!(number("fraction_of_peak") > 0.0, "{result}");
        assert!(
            result["bound"] == "compute" || result["bound"] == "memory",
            "{result}"
        );
    }
}

#[test]
fn unknown_fields_and_their_order_are_kept() {
    let fields =
        r#""note":{"a":[2.5]},"op":"matmul","n":4,"k":4,"m":4,"dtype":"f32","zz":null,"backend":"#;
    let out = bench(
        &file(&["", &format!("{{{fields}\"other\"}}"), "  "]),
        &["--json"],
    );
    assert_eq!(lines(&out).len(), 1);
    let text = String::from_utf8(out.stdout).unwrap();
    let begin = format!("{{{fields}\"cpu\",\"seconds\":");
    assert!(
        text.starts_with(&begin),
        "{text} does not begin with {begin}"
    );
}

#[test]
fn a_training_step_is_timed_and_a_table_printed() {
    let out = bench(&file(&[STEP]), &["--backend", "cpu"]);
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let text = String::from_utf8(out.stdout).unwrap();
    let rows: Vec<&str> = text.lines().collect();
    assert_eq!(rows.len(), 2, "{text}");
    for part in ["case", "ms", "GFLOP/s", "of peak", "bound"] {
        assert!(rows[0].contains(part), "{text}");
    }
    assert!(
        rows[1].starts_with("train_step char-6x384 B1 T8 "),
        "{text}"
    );
    assert!(rows[1].contains(" bf16 "), "{text}");
    assert!(
        rows[1].ends_with("memory") || rows[1].ends_with("compute"),
        "{text}"
    );
}

#[test]
fn filters_leave_what_they_name() {
    let all = file(&[MATMUL, BATCHES, MATRIX_VECTOR, FORWARD, BACKWARD, STEP]);
    let left = |arguments: &[&str]| -> Vec<Value> {
        lines(&bench(&all, &[arguments, &["--json"]].concat()))
            .iter()
            .map(|l| l["m"].clone())
            .collect()
    };
    assert_eq!(left(&["--op", "matmul", "--threads", "1"]), [17, 1]);
    assert_eq!(left(&["--op", "matmul", "--dtype", "bf16"]), [8]);
    let none = bench(&all, &["--op", "train_step", "--dtype", "f32"]);
    refused(&none, &["none of the 6 cases", "--dtype"]);
}

#[test]
fn a_wrong_case_is_refused_with_its_line_before_anything_runs() {
    let wrong = |line: &str, says: &[&str]| {
        let cases = file(&[MATMUL, "", line, FORWARD]);
        let place = format!("{}:3: ", cases.path().display());
        refused(&bench(&cases, &["--json"]), &[&[&place[..]], says].concat());
    };
    wrong("matmul 3 4 5", &["expected"]);
    wrong("[1]", &["JSON object"]);
    wrong(
        &MATMUL.replace("matmul", "multiply"),
        &["multiply", "matmul"],
    );
    wrong(&MATMUL.replace("\"m\":17,", ""), &["`m`"]);
    wrong(&MATMUL.replace("17", "0"), &["nonzero"]);
    wrong(&MATMUL.replace("17", "-3"), &["-3"]);
    wrong(&MATMUL.replace("f32", "u32"), &["u32", "bf16"]);
    wrong(&MATMUL.replace("\"tn\"", "\"nm\""), &["nm", "`tt`"]);
    wrong(
        &FORWARD.replace("\"kv_heads\":2", "\"kv_heads\":3"),
        &["3 key heads", "4 query heads"],
    );
    wrong(
        &STEP.replace("\"tokens\":8", "\"tokens\":2048"),
        &["2048", "256", "char-6x384"],
    );
}

#[test]
fn what_cannot_be_run_is_said_in_a_sentence() {
    let cases = file(&[MATMUL]);
    refused(
        &bench(&cases, &["--backend", "cpu,gpu"]),
        &["--backend cpu,gpu", "one chip"],
    );
    refused(&bench(&cases, &["--threads", "0"]), &["--threads 0"]);
    refused(&bench(&file(&[""]), &[]), &["no case"]);
    refused(
        &run(&["--cases", "absent.jsonl"]),
        &["absent.jsonl", "No such file"],
    );
    let out = run(&["--op", "sort"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("train_step"));
}

/// A word that the environment may not have is told before anything is computed, by every command that computes.
#[test]
fn unknown_units_for_products_are_refused_in_a_sentence() {
    let cases = file(&[MATMUL]);
    let path = cases.path().to_str().expect("a UTF-8 path");
    let folder = tempfile::tempdir().expect("a folder");
    let machine = folder.path().join("machine.toml");
    let machine = machine.to_str().expect("a UTF-8 path");
    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/src/lib.rs");
    for command in [
        &["bench", "--json", "--cases", path][..],
        &["train", "--text", text, "--steps", "1"],
        &["calibrate", "--out", machine],
    ] {
        let out = Command::new(env!("CARGO_BIN_EXE_supernode"))
            .args(command)
            .env("SUPERNODE_MATRIX_UNITS", "foo")
            .env_remove("RUST_BACKTRACE")
            .output()
            .expect("the command starts");
        let error = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{command:?}: {error}");
        assert!(!error.contains("panicked"), "{command:?}: {error}");
        let told = "SUPERNODE_MATRIX_UNITS is \"foo\"; set it to on, off or pairs";
        assert!(error.contains(told), "{command:?}: {error}");
    }
}

/// On a graphics processor the same cases are verified, timed, and told kernel by kernel.
#[cfg(feature = "gpu")]
#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn a_graphics_processor_is_timed_kernel_by_kernel() {
    let cases = file(&[MATMUL, FORWARD, BACKWARD]);
    let path = cases.path().to_str().expect("a UTF-8 path");
    let out = Command::new(env!("CARGO_BIN_EXE_supernode"))
        .args(["bench", "--backend", "gpu", "--json", "--cases", path])
        // A software driver complains where the variable is missing.
        .env("XDG_RUNTIME_DIR", std::env::temp_dir())
        .output()
        .expect("the command starts");
    if !out.status.success() && std::env::var_os("SUPERNODE_REQUIRE_GPU").is_none() {
        let why = String::from_utf8_lossy(&out.stderr);
        assert!(why.contains("gpu:0"), "{why}");
        eprintln!("ignored: {why}");
        return;
    }
    let told = lines(&out);
    for (result, kernel) in told.iter().zip(["matmul", "attention", "attention_d"]) {
        assert_eq!(result["backend"], "gpu:0");
        assert!(result["seconds"].as_f64() > Some(0.0), "{result}");
        let Some(kernels) = result["kernels"].as_array() else {
            continue;
        };
        let named = |k: &Value| k["kernel"].as_str().is_some_and(|n| n.starts_with(kernel));
        assert!(kernels.iter().any(named), "{result}");
    }
    assert_eq!(told.len(), 3);
}

#[test]
fn cases_are_read_from_standard_input() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_supernode"))
        .args(["bench", "--cases", "-", "--json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command starts");
    let mut input = child.stdin.take().expect("piped");
    writeln!(input, "{MATMUL}").expect("written");
    drop(input);
    let out = child.wait_with_output().expect("ends");
    assert_eq!(lines(&out)[0]["m"], 17);
}
