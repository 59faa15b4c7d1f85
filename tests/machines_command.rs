//! `supernode machines`, as a user runs it.

use std::process::Command;

fn supernode(arguments: &[&str]) -> (bool, String, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_supernode"))
        .args(arguments)
        .output()
        .expect("the command runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (out.status.success(), text(out.stdout), text(out.stderr))
}

#[test]
fn all_machines_are_listed() {
    let (good, out, err) = supernode(&["machines"]);
    assert!(good, "{err}");
    for name in [
        "cloudmatrix-384",
        "atlas-960-supercluster",
        "ascend-970",
        "rubin",
    ] {
        assert!(out.lines().any(|l| l.starts_with(name)), "{name}: {out}");
    }
}

#[test]
fn a_comparison_is_against_the_last() {
    let (good, out, err) = supernode(&["machines", "cloudmatrix-384:800", "gb200-nvl72"]);
    assert!(good, "{err}");
    let line = out.lines().find(|l| l.starts_with("bf16 headline"));
    assert!(line.is_some_and(|l| l.ends_with("1.71")), "{out}");
}

#[test]
fn json_has_null_where_nobody_published() {
    let (good, out, err) = supernode(&["machines", "ascend-970", "--json"]);
    assert!(good, "{err}");
    let line: serde_json::Value = serde_json::from_str(out.trim_end()).expect("one object");
    assert!(line["numbers_si"]["power.tdp"].is_null());
    assert_eq!(line["numbers_si"]["matmul.fp8"]["value"], 3892e12);
}

#[test]
fn a_file_of_ones_own_is_read_or_refused_by_line() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("mine.toml");
    let text = include_str!("../src/cluster/systems/dgx-a100.toml");
    std::fs::write(&path, text).expect("written");
    let name = path.to_str().expect("UTF-8");
    assert!(supernode(&["machines", name]).0);
    std::fs::write(&path, text.replace("kind = \"clos\"", "kind = \"closs\"")).expect("written");
    let (good, _, err) = supernode(&["machines", name]);
    let line = text
        .lines()
        .position(|l| l == "kind = \"clos\"")
        .expect("a line")
        + 1;
    assert!(
        !good && err.contains(&format!("mine.toml:{line}: level.fabric.kind")),
        "{err}"
    );
    let (good, _, err) = supernode(&["machines", "atlas"]);
    assert!(!good && err.contains("atlas-950-superpod"), "{err}");
}
