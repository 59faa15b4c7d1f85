//! What `supernode forecast`, `plan`, `machines` and `calibrate` refuse: each by one sentence.

use crate::forecast_command::{KORTHIKANTI, supernode};
use std::time::Instant;

#[test]
fn mistakes_are_one_sentence() {
    for (more, word) in [
        ("--set colour=1", "colour"),
        ("--machine nowhere", "cloudmatrix-384"),
        ("--dtype fp8", "matmul.fp8"),
        ("--mesh ep=8,tp=8", "the model has none"),
        ("--mesh up=8", "'up'"),
        ("--mesh tp=7", "96 heads"),
        ("--order tp,pp", "once"),
        ("--chips 12", "--chips says 12"),
        ("--set model.colour=1", "model has no 'colour'"),
        ("--set stack.attention=fast", "unfused"),
        ("--set memory.bandwidth=-1", "at least 0"),
        ("--schedule gpipe", "one chunk"),
        ("--mode decode --micro-batch 1 --trace x.json", "--trace"),
        ("--model llama9", "deepseek-v3"),
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
fn options_that_say_nothing_are_refused() {
    for (line, says) in [
        (
            format!("{KORTHIKANTI} --speculated 3"),
            "give --mode decode",
        ),
        (format!("{KORTHIKANTI} --accepted 2"), "give --mode decode"),
        (
            format!("{KORTHIKANTI} --expert-ffn 5"),
            "give --experts too",
        ),
        (format!("{KORTHIKANTI} --q-rank 64"), "give --kv-rank too"),
        (
            format!("{KORTHIKANTI} --set model.q_rank=64"),
            "give --kv-rank too",
        ),
        (
            format!("{KORTHIKANTI} --dense-layers 9"),
            "give --experts too",
        ),
        (
            format!("{KORTHIKANTI} --experts 4 --dense-layers 999"),
            "999 dense layers in front of a model of 96",
        ),
        (
            format!("{KORTHIKANTI} --predicted-tokens 999"),
            "999 layers that predict further tokens",
        ),
        (
            format!("{KORTHIKANTI} --context 18446744073709551615").replace("--context 2048 ", ""),
            "at most 2^32",
        ),
        (
            "plan --machine dgx-h100 --model llama3-8b --tokens-per-batch 1M --top 0".into(),
            "--top 0: print at least 1",
        ),
        (
            format!("{KORTHIKANTI} --set memory.bandwidth=0"),
            "a rate is more than 0",
        ),
        (
            "forecast --machine dgx-h100 --model llama3-8b --mesh dp=8 --global-batch 99999999999999992".into(),
            "at most 2^32",
        ),
        (
            "plan --machine dgx-h100 --model llama3-8b --tokens-per-batch 1M --context 0".into(),
            "at least 1 token",
        ),
    ] {
        let (good, out, err) = supernode(&line);
        assert!(!good && out.is_empty(), "{line}: {out}");
        assert!(err.contains(says), "{line}: {err}");
        assert_eq!(err.trim_end().matches('\n').count(), 0, "{line}: {err}");
    }
}

/// Sizes and splits that do not fit each other, and values that no machine has.
#[test]
fn what_does_not_fit_is_refused() {
    let gpt = "forecast --machine dgx-a100 --model gpt3-175b --global-batch 8";
    let deepseek = "forecast --machine dgx-h800 --model deepseek-v3 --global-batch 64";
    let small = "--layers 12 --hidden 1024 --heads 16";
    for (line, says) in [
        (
            format!("{gpt} --hidden 1000 --mesh dp=8"),
            "1000 hidden are not divisible by 96 heads; 1056 is",
        ),
        (
            format!("{gpt} --set model.heads=7 --mesh dp=8"),
            "12288 hidden are not divisible by 7 heads",
        ),
        (
            format!("{gpt} {small} --ffn 1001 --mesh tp=8"),
            "tp=8 does not divide 1001 ffn; tp=7 does",
        ),
        (
            format!("{gpt} --mesh tp=7"),
            "tp=7 does not divide 96 heads; tp=6 does",
        ),
        (
            format!("{gpt} {small} --kv-heads 5 --mesh dp=8"),
            "16 heads are not divisible by 5 kv-heads",
        ),
        (
            format!("{deepseek} --mesh ep=7"),
            "ep=7 does not divide 256 experts; ep=8 does",
        ),
        (
            format!("{deepseek} --kv-heads 8 --mesh ep=8"),
            "--kv-heads 8: latent attention",
        ),
        (
            format!("{gpt} --mesh ep=8"),
            "the model has none; split sequences over dp",
        ),
        (
            format!("{gpt} --mesh cp=5 --cp-method ulysses"),
            "cp=5 does not divide the 96 heads that tp=1 leaves",
        ),
        (
            format!("{gpt} {small} --kv-heads 2 --mesh cp=4 --cp-method ulysses"),
            "the 2 kv-heads",
        ),
        (
            format!("{gpt} --mesh cp=8 --cp-method usp --cp-exchange 3"),
            "3 chips that exchange tokens for heads do not divide cp=8; 8 do",
        ),
        (
            format!("{gpt} {small} --kv-heads 2 --mesh cp=8 --cp-method usp --cp-exchange 4"),
            "do not divide the 2 kv-heads that tp=1 leaves of 2; 2 do",
        ),
        (
            format!("{gpt} --mesh cp=8 --cp-method ring --cp-exchange 2"),
            "--cp-exchange 2 is for --cp-method usp, not ring",
        ),
        (
            format!("{gpt} --mesh tp=8 --cp-method ring"),
            "has none; cp=2 would do",
        ),
        (
            format!("{gpt} --mesh cp=4096 --context 2048"),
            "cp=4096 is more than 2048 tokens",
        ),
        (
            format!("{gpt} --mesh dp=8 --sequence-parallel"),
            "has no tp; leave it out",
        ),
        (
            format!("{gpt} --mesh tp=8 --context 1025 --sequence-parallel"),
            "1025 tokens, which are not divisible by tp=8; 1032 are",
        ),
        (
            format!("{gpt} --mesh tp=8 --collective-matmul"),
            "give --sequence-parallel too",
        ),
        (
            format!("{gpt} --mesh tp=8,cp=2 --sequence-parallel --collective-matmul"),
            "cp=2 cuts them too; leave one of the two out",
        ),
        (
            format!("{gpt} --mesh tp=8 --mode decode --sequence-parallel --collective-matmul"),
            "--collective-matmul is of a training step",
        ),
        (
            format!("{gpt} --mesh pp=8 --schedule zb-v --virtual-stages 1"),
            "zb-v has two chunks",
        ),
        (format!("{gpt} --mesh pp=200"), "at most 98"),
        (
            format!("{gpt} --mesh tp=8 --mode decode --recompute full"),
            "--recompute is of a training step",
        ),
        (
            format!("{gpt} --mesh tp=8 --mode decode --zero 3"),
            "--zero is of a training step",
        ),
        (
            format!("{gpt} --mesh tp=8 --mode prefill --schedule zb-h1"),
            "--schedule is of a training step",
        ),
        (
            format!("{gpt} --mesh dp=8 --set kernel.matmul.efficiency=3"),
            "above 0 and up to 1",
        ),
        (
            format!("{gpt} --mesh dp=8 --set kernel.matmul.efficiency=0"),
            "above 0 and up to 1",
        ),
        (
            format!("{gpt} --mesh dp=8 --set chip.cores=0"),
            "whole, at least 1",
        ),
        (
            format!("{gpt} --mesh dp=8 --set level.node.chips=3.5"),
            "whole, at least 1",
        ),
        (
            format!("{gpt} --mesh dp=8 --set stack.imbalance=0.5"),
            "1 or more",
        ),
        (
            format!("{gpt} --mesh dp=8 --set stack.interference=1"),
            "below 1",
        ),
        (
            format!("{gpt} --mesh dp=8 --set matmul.bf16=1e-320"),
            "far too small",
        ),
        (
            "plan --machine dgx-a100 --model gpt3-175b --tokens-per-batch 1M --chips 0".into(),
            "--chips 0: a step needs",
        ),
        (
            "plan --machine dgx-a100 --model gpt3-175b --tokens-per-batch 4M --chips 99999989"
                .into(),
            "such as a power of two",
        ),
        (
            "plan --machine dgx-a100 --model gpt3-175b --tokens-per-batch -4M".into(),
            "--tokens-per-batch -4M: write a number",
        ),
        (
            "plan --machine ascend-970 --model llama3-8b --tokens-per-batch 4M".into(),
            "'ascend-970' is a chip, and no system that joins it is described",
        ),
        (
            format!("{gpt} --mesh dp=8 --set stack.recompute_norms=maybe"),
            "'maybe' is none of yes, no",
        ),
        (
            format!("{gpt} --mesh dp=8 --set kernel.matmul.sustained=2"),
            "above 0 and up to 1",
        ),
        (
            "machines cloudmatrix-384:900".into(),
            "there is no '900'; there are 626, 800, die",
        ),
    ] {
        let (good, out, err) = supernode(&line);
        assert!(!good && out.is_empty(), "{line}: {out}");
        assert!(err.contains(says), "{line}: {err}");
        assert_eq!(err.trim_end().matches('\n').count(), 0, "{line}: {err}");
    }
}

/// Wrong values of `calibrate` are refused before anything is measured.
#[test]
fn calibration_refuses_what_it_cannot_do() {
    let here = std::env::temp_dir().join(format!("supernode-calibrate-{}", std::process::id()));
    std::fs::create_dir_all(here.join("folder.toml")).expect("a folder");
    let path = |name: &str| here.join(name).display().to_string();
    for (line, says) in [
        (
            format!("--out {} --chips 3", path("m.toml")),
            "--chips 3: 1, 2, 4, 8 or 16",
        ),
        (
            format!("--out {} --chips 0", path("m.toml")),
            "--chips 0: 1, 2, 4, 8 or 16",
        ),
        (
            format!("--out {} --threads 0", path("m.toml")),
            "--threads 0: a chip has 1 to 256",
        ),
        (format!("--out {}", path("m")), "ends in .toml"),
        (format!("--out {}", path("nowhere/m.toml")), "cannot write"),
        (format!("--out {}", path("folder.toml")), "cannot write"),
    ] {
        let began = Instant::now();
        let (good, out, err) = supernode(&format!("calibrate {line}"));
        assert!(!good && out.is_empty(), "{line}: {out}");
        assert!(err.contains(says), "{line}: {err}");
        assert_eq!(err.trim_end().matches('\n').count(), 0, "{line}: {err}");
        assert!(began.elapsed().as_secs() < 5, "{line} was measured first");
    }
    let left = std::fs::read_dir(&here).expect("the folder").count();
    assert_eq!(left, 1, "what was refused leaves no files");
    std::fs::remove_dir_all(here).expect("the folder goes");
}
