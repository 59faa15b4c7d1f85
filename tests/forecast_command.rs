//! `supernode forecast` and `supernode plan`, as a user runs them.

use std::process::Command;
use std::time::Instant;

pub(crate) fn supernode(line: &str) -> (bool, String, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_supernode"))
        .args(line.split_whitespace())
        .output()
        .expect("the command runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (out.status.success(), text(out.stdout), text(out.stderr))
}

pub(crate) const KORTHIKANTI: &str = "forecast --machine dgx-a100 --model gpt3-175b --mesh tp=8,pp=8 --global-batch 64 --micro-batch 1 \
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
    assert_eq!(object["mode"], "train");
    assert!(
        object["mfu_rule"]
            .as_str()
            .is_some_and(|r| r.contains("6 per matmul parameter"))
    );
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

/// Chunks hide their transfers; what smaller products lose beside it depends on the machine.
#[test]
fn a_collective_matmul_waits_less_for_tp() {
    let step = |more: &str| {
        let line = "forecast --machine dgx-a100 --model gpt3-175b --mesh tp=8,pp=8 --global-batch 512 --recompute full --json";
        let (good, out, err) = supernode(&format!("{line} --sequence-parallel {more}"));
        assert!(good, "{more}: {err}");
        let object: serde_json::Value = serde_json::from_str(out.trim_end()).expect("an object");
        let of = |value: &serde_json::Value| value.as_f64().expect("seconds");
        let waits = of(&object["exposed_communication_seconds"]["tp"]);
        (of(&object["compute_seconds"]["matmul"]), waits)
    };
    for micro in [1, 8] {
        let without = step(&format!("--micro-batch {micro}"));
        let with = step(&format!("--micro-batch {micro} --collective-matmul"));
        assert!(10.0 * with.1 < without.1, "{with:?} {without:?}");
        assert!(with.0 > without.0, "{with:?} {without:?}");
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
    let lines: Vec<&str> = out.lines().collect();
    let why = lines
        .iter()
        .position(|l| l.starts_with("why the first wins"));
    assert_eq!(why, Some(12), "{out}");
    assert!(lines.len() > 15 && lines[13].contains('%'), "{out}");
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

fn object(line: &str) -> serde_json::Value {
    let (good, out, err) = supernode(&format!("{line} --json"));
    assert!(good, "{line}: {err}");
    assert_eq!(out.matches('\n').count(), 1, "{out}");
    serde_json::from_str(out.trim_end()).expect("an object")
}

#[test]
fn mixtures_meshes_and_schedules_are_priced() {
    let deepseek =
        "forecast --machine h800 --model deepseek-v3 --global-batch 1024 --zero 1 --dtype fp8";
    for more in [
        "--mesh pp=16,ep=64,dp=2 --schedule dualpipe",
        "--mesh pp=16,dp=128,ep=64 --chips 2048 --schedule dualpipe",
        "--mesh pp=8,ep=32,tp=2,cp=2 --schedule zb-v --sequence-parallel --cp-method all-gather",
        "--mesh fsdp=8,ep=32 --recompute full --stack megatron-core-2025",
        "--mesh pp=4,ep=64 --schedule interleaved --virtual-stages 4 --order dp,pp,fsdp,cp,ep,tp",
    ] {
        let o = object(&format!("{deepseek} {more}"));
        let number = |key: &str| {
            o[key]
                .as_f64()
                .unwrap_or_else(|| panic!("{more}: no {key}"))
        };
        let (low, value, high) = (
            number("step_seconds_low"),
            number("step_seconds"),
            number("step_seconds_high"),
        );
        assert!(
            low <= value && value <= high,
            "{more}: {low} {value} {high}"
        );
        assert!(
            number("mfu") > 0.01 && number("mfu") < 0.9,
            "{more}: {}",
            number("mfu")
        );
    }
    // Both ways to count ep are the same mesh.
    let chips = |more: &str| object(&format!("{deepseek} {more}"))["mesh"].clone();
    assert_eq!(
        chips("--mesh pp=16,ep=64,dp=2"),
        chips("--mesh pp=16,dp=128,ep=64 --chips 2048")
    );
}

#[test]
fn every_size_can_be_set() {
    let base = "forecast --machine dgx-h100 --model llama3-8b --mesh fsdp=8 --global-batch 8 --context 2048";
    let step = |more: &str| {
        object(&format!("{base} {more}"))["step_seconds"]
            .as_f64()
            .expect("seconds")
    };
    let plain = step("");
    for more in [
        "--layers 16",
        "--hidden 2048 --heads 16 --kv-heads 8",
        "--ffn 7168",
        "--gated false",
        "--vocab 32000",
        "--set model.layers=16",
        "--head-dim 64",
    ] {
        assert!(step(more) < plain, "{more}");
    }
    for more in [
        "--tied true",
        "--kv-rank 512 --q-rank 1536",
        "--predicted-tokens 1",
    ] {
        assert!(step(more) > 0.0, "{more}");
    }
    let experts =
        "--experts 8 --experts-per-token 2 --expert-ffn 14336 --shared-experts 1 --dense-layers 1";
    assert!(step(experts) > plain);
}

#[test]
fn a_config_file_is_a_model() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("config.json");
    let text = r#"{"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192, "hidden_act": "silu"}"#;
    std::fs::write(&path, text).expect("a file");
    let line = |model: &str| {
        format!("forecast --machine dgx-h100 --model {model} --mesh fsdp=8 --global-batch 8")
    };
    let name = path.to_str().expect("UTF-8");
    assert_eq!(object(&line(name)), object(&line("llama3-8b")));
    std::fs::write(&path, "{}").expect("a file");
    let (good, _, err) = supernode(&line(name));
    assert!(
        !good && err.contains("num_hidden_layers") && err.contains(name),
        "{err}"
    );
}

#[test]
fn prompts_and_decoding_are_priced() {
    let line = "forecast --machine cloudmatrix-384 --model deepseek-v3 --dtype int8 --mesh ep=160";
    let decode = object(&format!(
        "{line} --mode decode --global-batch 15360 --context 4096 --speculated 1 --accepted 0.7"
    ));
    let number = |o: &serde_json::Value, key: &str| o[key].as_f64().unwrap_or(f64::NAN);
    assert!(number(&decode, "time_per_token_seconds") < number(&decode, "step_seconds"));
    assert!(number(&decode, "step_seconds_low") <= number(&decode, "step_seconds"));
    assert!(
        number(&decode["memory_bytes_per_chip"], "cache") > 1e9,
        "{decode}"
    );
    let prefill = object(&format!(
        "{line} --mode prefill --global-batch 640 --context 4096"
    ));
    assert!(prefill["time_per_token_seconds"].is_null());
    let (a, b) = (
        number(&prefill, "tokens_per_second"),
        number(&decode, "tokens_per_second"),
    );
    assert!(a > b && b > 0.0, "{a} and {b}");
}

#[test]
fn the_page_opens_without_a_network() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("step.html");
    let name = path.to_str().expect("UTF-8");
    object(&format!("{KORTHIKANTI} --html {name}"));
    let text = std::fs::read_to_string(&path).expect("a file");
    for word in ["<svg", "Scaling", "stage 7", "Memory", "</html>"] {
        assert!(text.contains(word), "no {word}");
    }
    for word in ["http", "<script", "src=", "NaN"] {
        assert!(!text.contains(word), "{word}");
    }
}

/// DeepSeek-V3's split fits on the chips that it ran on if norms and up-projections are made again and values are kept narrow, as by
/// default on H800s, and in no other way.
#[test]
fn a_latent_mixture_fits_as_its_report_says() {
    let line = "forecast --machine dgx-h800 --model deepseek-v3 --mesh pp=16,dp=2,ep=64 --global-batch 15360 --context 4096 \
                --schedule dualpipe --zero 1 --dtype fp8 --json";
    let fits = |more: &str| object(&format!("{line} {more}"))["fits"].clone();
    assert_eq!(fits("--recompute selective"), true);
    assert_eq!(fits(""), false);
    assert_eq!(fits("--recompute selective --set stack.stored=wide"), false);
    let all = "--recompute selective --set stack.recompute_up_projections=no";
    assert_eq!(fits(all), false);
}

/// What looks odd and is right: uneven tokens, a padded vocabulary, heads that take their share of another width, neighbours that
/// exchange heads.
#[test]
fn odd_sizes_are_priced() {
    let gpt = "forecast --machine dgx-a100 --model gpt3-175b --global-batch 8 --json";
    let seconds = |rest: &str| {
        let step = object(&format!("{gpt} {rest}"))["step_seconds"].as_f64();
        step.expect("a number")
    };
    let small = "--layers 12 --hidden 1024 --heads 16 --ffn 4096 --context 8192";
    assert!(seconds(&format!("{small} --mesh cp=3")) > seconds(&format!("{small} --mesh cp=4")));
    assert!(seconds(&format!("{small} --mesh tp=8 --vocab 50257")) > 0.0);
    let heads = |dim: &str| seconds(&format!("{small} {dim} --mesh dp=8"));
    assert_eq!(heads(""), heads("--head-dim 64"));
    assert!(heads("") < heads("--head-dim 128"));
    let over = |method: &str| seconds(&format!("{small} --mesh cp=16 --cp-method {method}"));
    let both = [over("usp"), over("usp --cp-exchange 16"), over("ulysses")];
    assert_eq!(both[0], both[1]);
    assert_eq!(both[0], both[2]);
    assert_eq!(over("usp --cp-exchange 1"), over("ring"));
    // Eight neighbours lie in a node; only the ring that joins the blocks leaves it.
    assert!(over("usp --cp-exchange 8") < over("ulysses"));
}
