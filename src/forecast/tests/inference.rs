//! Prefill and decode of DeepSeek-R1 on CloudMatrix384 (arXiv:2506.12708, tables 3 to 5), with the shares of the peak that the paper
//! measures for its kernels and the exchange of table 7.

use super::*;

fn cloudmatrix(imbalance: &str) -> Machine {
    let mut machine = Machine::named("cloudmatrix-384:die").unwrap();
    machine.set("stack.imbalance", imbalance).unwrap();
    machine
}

fn serving(mesh: Mesh, sequences: usize, micro_batch: usize, context: usize) -> Setting {
    Setting {
        micro_batch,
        context,
        dtype: "int8".into(),
        ..Setting::new(model_named("deepseek-v3").unwrap(), mesh, sequences)
    }
}

/// 16,384 tokens of 4096 each a package, experts over 32 dies; 1.18 is what the paper's own runs lose to uneven experts.
#[test]
fn cloudmatrix_prefill() {
    for (imbalance, truth) in [("1", 6688.0), ("1.18", 5655.0)] {
        let setting = serving(Mesh::new([("ep", 32)]), 64, 2, 4096);
        let machine = cloudmatrix(imbalance);
        let served = setting.serve(Phase::Prefill, &machine).unwrap();
        let rate = served.tokens / served.step_seconds / 16.0;
        println!(
            "prefill, imbalance {imbalance}: {rate:.0} tokens/s a package, was {truth}, {:+.1} %",
            100.0 * (rate / truth - 1.0)
        );
        println!("  {:?} {:?}", served.compute_seconds, served.exposed);
    }
}

/// Sequences a package, tokens in the cache, milliseconds to the next token: 160 packages, one further token verified of which 0.7
/// hold.
#[test]
fn cloudmatrix_decode() {
    for (each, context, truth) in [
        (96, 4096, 49.4),
        (128, 1536, 46.8),
        (112, 2176, 47.4),
        (24, 4224, 24.6),
        (8, 4224, 14.9),
    ] {
        for parts in [1, 2] {
            let setting = serving(
                Mesh::new([("ep", 320)]),
                each * 160,
                each / 2 / parts,
                context,
            );
            let phase = Phase::Decode {
                speculated: 1,
                accepted: 0.7,
            };
            let served = setting.serve(phase, &cloudmatrix("1")).unwrap();
            let ms = 1e3 * served.token_seconds.unwrap();
            println!(
                "decode, {each} a package in {parts}, {context} tokens: {ms:.1} ms, was {truth}, {:+.1} %; {:?} {:?}",
                100.0 * (ms / truth - 1.0),
                served.compute_seconds,
                served.exposed
            );
        }
    }
}
