//! `supernode forecast` and `supernode plan`, as a user runs them.

use std::process::Command;
use std::time::Instant;

fn supernode(line: &str) -> (bool, String, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_supernode"))
        .args(line.split_whitespace())
        .output()
        .expect("the command runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (out.status.success(), text(out.stdout), text(out.stderr))
}

const KORTHIKANTI: &str = "forecast --machine dgx-a100 --model gpt3-175b --mesh tp=8,pp=8 --global-batch 64 --micro-batch 1 \
    --context 2048 --virtual-stages 3 --recompute full";

#[test]
fn json_is_one_object_on_one_line() {
    let (good, out, err) = supernode(&format!("{KORTHIKANTI} --json"));
    assert!(good, "{err}");
    assert_eq!(out.matches('\n').count(), 1, "{out}");
    let object: serde_json::Value = serde_json::from_str(out.trim_end()).expect("an object");
    let number = |key: &str| {
        object[key]
            .as_f64()
            .unwrap_or_else(|| panic!("no {key} in {object}"))
    };
    assert!((number("step_seconds") / 18.13 - 1.0).abs() <= 0.08);
    assert!(number("step_seconds_low") < number("step_seconds"));
    assert!(number("step_seconds") < number("step_seconds_high"));
    for key in [
        "mfu",
        "tflops_per_chip",
        "tokens_per_second",
        "bubble_seconds",
        "energy_joules",
        "goodput",
    ] {
        assert!(number(key) > 0.0, "{key}");
    }
    for key in [
        "memory_bytes_per_chip",
        "compute_seconds",
        "exposed_communication_seconds",
    ] {
        assert!(
            object[key].as_object().is_some_and(|o| !o.is_empty()),
            "{key}"
        );
    }
}

#[test]
fn what_nobody_published_is_null_with_its_reason() {
    let line = "forecast --machine atlas-950-supercluster --model llama3-405b --mesh tp=8,pp=16,dp=4096 --global-batch 4096 \
        --zero 1 --sequence-parallel --json";
    let began = Instant::now();
    let (good, out, err) = supernode(line);
    assert!(good, "{err}");
    assert!(
        began.elapsed().as_secs_f64() < 30.0,
        "half a million chips take {:?}",
        began.elapsed()
    );
    let object: serde_json::Value = serde_json::from_str(out.trim_end()).expect("an object");
    assert_eq!(object["chips"], 524_288);
    assert!(object["energy_joules"].is_null());
    assert!(
        object["energy_reason"]
            .as_str()
            .is_some_and(|r| r.contains("nobody published it"))
    );
}

#[test]
fn set_and_stack_change_the_price() {
    let step = |more: &str| {
        let (good, out, err) = supernode(&format!("{KORTHIKANTI} --json {more}"));
        assert!(good, "{more}: {err}");
        let object: serde_json::Value = serde_json::from_str(out.trim_end()).expect("an object");
        object["step_seconds"].as_f64().expect("seconds")
    };
    assert!(step("--set memory.bandwidth=1e12") > step(""));
    assert!(step("--stack ideal") < step(""));
    assert!(step("--layers 48") < 0.6 * step(""));
}

#[test]
fn mistakes_are_one_sentence() {
    for (more, word) in [
        ("--set colour=1", "colour"),
        ("--machine nowhere", "cloudmatrix-384"),
        ("--dtype fp8", "matmul.fp8"),
        ("--mesh ep=8", "'ep'"),
        ("--model deepseek-v3", "mixture"),
    ] {
        let (good, out, err) = supernode(&format!("{KORTHIKANTI} {more}"));
        assert!(
            !good && out.is_empty() && err.contains(word),
            "{more}: {err}"
        );
        assert_eq!(err.trim_end().lines().count(), 1, "{err}");
    }
}

#[test]
fn a_plan_prints_its_candidates_and_the_best() {
    let line = "plan --machine dgx-a100 --model megatron-22b --chips 16 --tokens-per-batch 64K --context 2048";
    let (good, out, err) = supernode(line);
    assert!(good, "{err}");
    assert!(
        out.lines().next().is_some_and(|l| l.contains("candidates")),
        "{out}"
    );
    assert_eq!(out.lines().count(), 12, "{out}");
    let (good, _, err) = supernode(&line.replace("64K", "1000"));
    assert!(!good && err.contains("no multiple"), "{err}");
}

#[test]
fn the_timeline_is_a_trace_of_all_stages() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("step.json");
    let name = path.to_str().expect("UTF-8");
    let (good, out, err) = supernode(&format!("{KORTHIKANTI} --json --trace {name}"));
    assert!(good, "{err}");
    let step = serde_json::from_str::<serde_json::Value>(out.trim_end()).expect("an object");
    let text = std::fs::read_to_string(&path).expect("a file");
    let trace: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let events = trace["traceEvents"].as_array().expect("events");
    // 8 stages: a name, 64 micro-batches of 3 chunks forward and backward, and the update.
    assert_eq!(events.len(), 8 * (1 + 2 * 64 * 3 + 1));
    let ends = events
        .iter()
        .filter_map(|e| Some(e["ts"].as_f64()? + e["dur"].as_f64()?));
    let last = ends.fold(0.0, f64::max) * 1e-6;
    assert!((last / step["step_seconds"].as_f64().expect("seconds") - 1.0).abs() <= 1e-9);
    let (good, _, err) = supernode(&format!("{KORTHIKANTI} --trace {name}/no/such"));
    assert!(!good && err.contains("cannot write the timeline"), "{err}");
}
