//! `supernode generate` as a user meets it: the text on standard output, the same on every mesh, and one sentence when it
//! fails.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn supernode(dir: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_supernode"));
    command.current_dir(dir).args(arguments);
    command.env_remove("RUST_BACKTRACE").stdin(Stdio::null());
    command.output().expect("the command starts")
}

/// A directory with a text, and with a model that two chips trained on it.
fn trained() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let text = "the quick brown fox jumps over the lazy dog; pack my box with five dozen jugs. ";
    std::fs::write(dir.path().join("text"), text.repeat(8)).expect("a text");
    let line = "train --text text --chars --layers 2 --hidden 16 --heads 2 --context 8 --batch 4 --eval-every 0 --steps 20 \
                --mesh tp=2 --threads 1 --checkpoint run";
    let out = supernode(dir.path(), &line.split_whitespace().collect::<Vec<_>>());
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    dir
}

#[test]
fn a_text_is_continued_alike_on_every_mesh() {
    let dir = trained();
    let generate = |more: &[&str]| {
        let fixed = [
            "generate",
            "--checkpoint",
            "run",
            "--prompt",
            "the quick",
            "--tokens",
            "12",
            "--threads",
            "1",
        ];
        let out = supernode(dir.path(), &[&fixed[..], more].concat());
        assert!(
            out.status.success(),
            "{more:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8(out.stdout).expect("UTF-8")
    };
    let text = generate(&[]);
    assert!(
        text.starts_with("the quick") && text.ends_with('\n'),
        "{text}"
    );
    assert_eq!(
        text.trim_end_matches('\n').chars().count(),
        9 + 12,
        "{text}"
    );
    for mesh in ["tp=2", "fsdp=2", "cp=2", "pp=2", "pp=2,cp=2"] {
        assert_eq!(generate(&["--mesh", mesh]), text, "{mesh}");
    }
    assert_ne!(generate(&["--seed", "5"]), text);
    let greedy = generate(&["--temperature", "0"]);
    assert_eq!(generate(&["--top-k", "1", "--seed", "9"]), greedy);
    let two = generate(&[
        "--prompt",
        "lazy",
        "--json",
        "--mesh",
        "dp=2",
        "--temperature",
        "0",
    ]);
    let lines: Vec<Value> = two
        .lines()
        .map(|l| serde_json::from_str(l).expect("JSON"))
        .collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(
        lines[0]["text"].as_str().map(|t| format!("{t}\n")),
        Some(greedy)
    );
    assert_eq!(
        (&lines[1]["prompt"], &lines[1]["new_tokens"]),
        (&"lazy".into(), &12.into())
    );
}

/// The likeliest tokens do not depend on the kind of chip, alone and with heads on two chips that share an adapter.
#[cfg(feature = "gpu")]
#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn a_graphics_processor_continues_it_too() {
    let dir = trained();
    let line = "generate --checkpoint run --prompt the --tokens 12 --threads 1 --temperature 0";
    let generate = |more: &str| {
        let all = format!("{line} {more}");
        supernode(dir.path(), &all.split_whitespace().collect::<Vec<_>>())
    };
    let want = generate("");
    assert!(want.status.success() && !want.stdout.is_empty());
    for chips in ["--device gpu", "--device gpu --mesh tp=2"] {
        let got = generate(chips);
        let why = String::from_utf8_lossy(&got.stderr);
        if !got.status.success() && std::env::var_os("SUPERNODE_REQUIRE_GPU").is_none() {
            assert!(why.contains("gpu:0"), "{why}");
            eprintln!("ignored: {why}");
            return;
        }
        assert!(got.status.success(), "{chips}: {why}");
        let text = |out: &Output| String::from_utf8_lossy(&out.stdout).into_owned();
        assert_eq!(text(&got), text(&want), "{chips}");
    }
}

#[test]
fn what_cannot_be_continued_is_one_sentence() {
    let dir = trained();
    let cases: [(&[&str], &[&str]); 6] = [
        (&["--prompt", "Q"], &["'Q'", "not among"]),
        (&["--prompt", ""], &["without tokens"]),
        (
            &["--prompt", "the", "--mesh", "tp=4"],
            &["tp=4", "2 heads", "tp=2 does"],
        ),
        (
            &["--prompt", "the", "--mesh", "pp=9"],
            &["pp=9", "2 layers", "pp=4 would do"],
        ),
        (
            &["--prompt", "the", "--temperature", "-1"],
            &["temperature is -1"],
        ),
        (&["--prompt-file", "missing"], &["missing"]),
    ];
    for (arguments, says) in cases {
        let fixed = ["generate", "--checkpoint", "run", "--threads", "1"];
        let out = supernode(dir.path(), &[&fixed[..], arguments].concat());
        let error = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{arguments:?}: {error}");
        assert!(
            says.iter().all(|part| error.contains(part)),
            "{arguments:?}: {error}"
        );
        assert!(out.stdout.is_empty());
    }
    let out = supernode(
        dir.path(),
        &["generate", "--checkpoint", "nowhere", "--prompt", "x"],
    );
    let error = String::from_utf8_lossy(&out.stderr);
    assert!(error.contains("no checkpoint in nowhere"), "{error}");
}
