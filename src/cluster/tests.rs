use super::*;

#[test]
fn every_file_reads() {
    for name in Machine::names() {
        let machine = Machine::named(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(machine.chips() >= 2 && machine.chips() <= machine.most_chips());
    }
    for name in Machine::chip_names() {
        let chip = Machine::chip_named(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(!chip.title.is_empty());
    }
    for (name, _) in STACKS {
        Machine::named("dgx-a100")
            .unwrap()
            .with_stack(name)
            .unwrap();
    }
    for grade in [
        "ascend-910c:626",
        "ascend-910c:800",
        "ascend-950dt:28",
        "a100:isolated",
    ] {
        Machine::chip_named(grade).unwrap();
    }
}

#[test]
fn the_matmul_peak_is_at_most_the_headline() {
    for name in Machine::chip_names() {
        let chip = Machine::chip_named(name).unwrap();
        for dtype in ["bf16", "fp8", "fp4", "int8", "f32"] {
            let pair = ["headline", "matmul"].map(|p| chip.find(&format!("{p}.{dtype}")));
            if let [Some(headline), Some(matmul)] = pair {
                assert!(
                    matmul <= headline,
                    "{name} {dtype}: {matmul} above {headline}"
                );
            }
        }
    }
}

/// The claim of the press, 67 % more compute and over three times the memory of an NVL72, holds for the best grade only.
#[test]
fn cloudmatrix_against_nvl72() {
    let total = |name: &str, field: &str| {
        let machine = Machine::named(name).unwrap();
        machine.chips() as f64 * machine.chip.value(field).unwrap()
    };
    let ratio = |name, field| total(name, field) / total("gb200-nvl72", field);
    assert!((ratio("cloudmatrix-384:800", "headline.bf16") - 1.71).abs() <= 0.01);
    assert!((ratio("cloudmatrix-384", "headline.bf16") - 1.60).abs() <= 0.01);
    assert!((ratio("cloudmatrix-384:626", "headline.bf16") - 1.34).abs() <= 0.01);
    assert!((ratio("cloudmatrix-384", "matmul.bf16") - 1.51).abs() <= 0.01);
    assert!(ratio("cloudmatrix-384", "memory.capacity") >= 3.0);
}

fn chip(change: impl Fn(&str) -> String) -> Result<Sheet> {
    let text = change(CHIPS.iter().find(|(n, _)| *n == "a100").unwrap().1);
    Sheet::read("mine", "mine.toml", &text, &CHIP, None)
}

/// Replaces one piece of the A100's file and expects the refusal to name file, line and these words.
fn refused(from: &str, to: &str, words: &[&str]) {
    let text = CHIPS.iter().find(|(n, _)| *n == "a100").unwrap().1;
    let at = text
        .find(from)
        .unwrap_or_else(|| panic!("no '{from}' in the file"));
    let line = text[..at].matches('\n').count() + 1;
    let error = chip(|t| t.replacen(from, to, 1)).expect_err(to).to_string();
    assert!(error.starts_with("mine.toml:"), "{error}");
    if words[0] == "here" {
        assert!(
            error.starts_with(&format!("mine.toml:{line}:")),
            "{error}: not at line {line}"
        );
    }
    for word in &words[1..] {
        assert!(error.contains(word), "{error}: does not say {word}");
    }
}

#[test]
fn wrong_files_are_refused_with_line_and_field() {
    chip(str::to_string).unwrap();
    refused(
        "status = \"shipping\"",
        "status = \"sold\"",
        &["here", "status", "'sold'", "announced"],
    );
    refused(
        "tdp = { value = 400",
        "tdb = { value = 400",
        &["here", "power.tdb", "no such field"],
    );
    refused(
        "value = 400, unit = \"W\"",
        "value = 400, unit = \"GB\"",
        &["here", "power.tdp", "'GB'", "kW"],
    );
    refused(
        "value = 400,",
        "value = -400,",
        &["here", "power.tdp", "negative"],
    );
    refused(
        "value = 2.04,",
        "value = 0,",
        &["here", "memory.bandwidth", "unknown"],
    );
    refused("value = 400,", "", &["here", "power.tdp", "no value"]);
    refused(
        "value = 400, unit = \"W\", source = \"known\"",
        "value = 400, unit = \"W\", source = \"x\"",
        &["here", "power.tdp", "'x'"],
    );
    refused(
        "absent = [",
        "unknown = [\"power.tdp\"]\nabsent = [",
        &["", "power.tdp", "unknown"],
    );
    refused(
        "absent = [\"headline.fp8\", ",
        "absent = [",
        &["", "headline.fp8", "missing"],
    );
    refused(
        "absent = [",
        "absent = [\"headline.int3\", ",
        &["here", "headline.int3"],
    );
    refused("[power]", "[power", &["", "syntax"]);
    refused(
        "value = 400",
        "value = nan",
        &["here", "power.tdp", "finite"],
    );
}

#[test]
fn what_is_missing_says_why() {
    let machine = Machine::named("cloudmatrix-384").unwrap();
    let why = |field| machine.chip.value(field).unwrap_err().to_string();
    assert!(why("matmul.fp8").contains("does not have it"));
    assert!(why("power.tdp").contains("nobody published it"));
    let unknown = Machine::named("cloudmatrix").unwrap_err().to_string();
    assert!(unknown.contains("cloudmatrix-384"), "{unknown}");
    let grade = Machine::named("cloudmatrix-384:700")
        .unwrap_err()
        .to_string();
    assert!(grade.contains("626"), "{grade}");
}

#[test]
fn set_changes_one_number() {
    let mut machine = Machine::named("cloudmatrix-384").unwrap();
    machine.set("power.tdp", "1000").unwrap();
    machine.set("level.pod.bandwidth", "1e11").unwrap();
    machine.set("stack.dropout", "yes").unwrap();
    assert_eq!(machine.chip.value("power.tdp").unwrap(), 1000.0);
    assert_eq!(machine.levels().unwrap()[1].bandwidth, 0.84e11);
    assert!(machine.set("chip.colour", "1").is_err());
    assert!(machine.set("power.tdp", "much").is_err());
    assert!(machine.set("memory.bandwidth", "0").is_err());
}

#[test]
fn values_that_no_machine_has_are_refused() {
    for (field, wrong, right) in [
        ("kernel.matmul.efficiency", "1.01", "1"),
        ("kernel.norm.memory", "0", "0.5"),
        ("level.node.efficiency", "2", "0.5"),
        ("exchange.share", "0", "0.1"),
        ("chip.cores", "0.5", "7"),
        ("level.node.chips", "3.5", "16"),
        ("stack.interference", "1", "0"),
        ("stack.stragglers", "1.5", "1"),
        ("stack.imbalance", "0.9", "1"),
        ("level.node.oversubscription", "0.5", "2"),
    ] {
        let mut machine = Machine::named("dgx-a100").unwrap();
        let why = machine.set(field, wrong).unwrap_err().to_string();
        assert!(why.contains(field) && why.contains(wrong), "{why}");
        machine.set(field, right).unwrap();
    }
}

#[test]
fn a_path_may_hold_a_colon_and_a_grade_follows_it() {
    let why = |name: &str| Machine::named(name).expect_err("no such file").to_string();
    let plain = why("/no:where/m.toml");
    assert!(plain.contains("the system /no:where/m.toml:"), "{plain}");
    let graded = why("/no:where/m.toml:800");
    assert!(graded.contains("the system /no:where/m.toml:"), "{graded}");
}
