//! `--shares` and `--mesh dp=3:1` as a user meets them.

use crate::command::{Bench, losses};
use serde_json::Value;

fn close(a: &[Value], b: &[Value]) {
    let (a, b) = (losses(a), losses(b));
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(&b) {
        assert!((a - b).abs() <= 1e-5, "{a} against {b}");
    }
}

#[test]
fn shares_by_name_or_by_measure_give_one_chips_losses_and_are_taken_up_again() {
    let bench = Bench::new();
    let steps = ["--steps", "4"];
    let single = bench.json(&steps);
    let on = |more: &[&str]| bench.json(&[&steps[..], more].concat());
    let by_mesh = on(&["--mesh", "dp=3:1"]);
    close(&by_mesh, &single);
    let by_name = on(&["--mesh", "dp=2", "--shares", "3,1", "--checkpoint", "saved"]);
    assert_eq!(losses(&by_name), losses(&by_mesh));
    // It goes on with the shares of before, which it names, and not with equal ones.
    let longer = [
        "--steps",
        "6",
        "--resume",
        "--checkpoint",
        "saved",
        "--mesh",
        "dp=2",
    ];
    for wish in [&[][..], &["--shares", "measured"]] {
        let again = bench.json(&[&longer[..], wish].concat());
        let told = again
            .iter()
            .find(|l| l.get("shares").is_some())
            .expect("a line");
        assert_eq!(told["mesh"], "dp=3:1");
        assert_eq!(told["from"], "recorded");
    }
    let measured = on(&["--mesh", "dp=2,tp=2", "--shares", "measured"]);
    close(&measured, &single);
    let told = measured
        .iter()
        .find(|l| l.get("shares").is_some())
        .expect("a line");
    assert_eq!(told["from"], "measured");
    assert_eq!(told["ms_per_sequence"].as_array().map(Vec::len), Some(2));
    let ghost = on(&["--ghost", "--mesh", "dp=2", "--shares", "3,1"]);
    let done = ghost.last().expect("a line");
    assert_eq!(done["mesh"], "dp=3:1");
}

#[test]
fn wishes_that_do_not_fit_are_refused() {
    let bench = Bench::new();
    let with = |more: &[&'static str]| [&["--text", "text"][..], more].concat();
    bench.fails(
        &with(&["--mesh", "dp=3:2"]),
        &["4 sequences", "5 shares", "a batch of 5 does"],
    );
    bench.fails(
        &with(&["--mesh", "dp=2", "--shares", "1,2,1"]),
        &["3 shares", "2 chips"],
    );
    bench.fails(&with(&["--shares", "3,1"]), &["single has not"]);
    bench.fails(&with(&["--shares", "measured"]), &["single", "dp=2"]);
    bench.fails(
        &with(&["--mesh", "dp=3:1", "--shares", "3,1"]),
        &["two wishes"],
    );
    bench.fails(
        &with(&["--mesh", "dp=2", "--ghost", "--shares", "measured"]),
        &["a ghost computes nothing", "--shares 3,1"],
    );
    bench.fails(
        &with(&["--mesh", "tp=3:1"]),
        &["tp=3:1", "uneven shares", "tp=2 would do"],
    );
    bench.fails(
        &with(&["--mesh", "dp=3:1", "--zero", "1"]),
        &["dp=3:1", "no more memory"],
    );
    // clap's own errors end with status 2.
    let out = bench.run(&with(&["--mesh", "dp=2", "--shares", "3;1"]));
    let error = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{error}");
    assert!(error.contains("'3;1' are no shares"), "{error}");
}
