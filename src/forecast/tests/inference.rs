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
        let served = setting
            .serve(Phase::Prefill, &cloudmatrix(imbalance))
            .unwrap();
        let rate = served.tokens / served.step_seconds / 16.0;
        let error = rate / truth - 1.0;
        println!(
            "prefill, imbalance {imbalance}: {rate:.0} tokens/s a package, was {truth}, {:+.1} %",
            100.0 * error
        );
        assert!(error.abs() <= 0.15, "{imbalance}: {error}");
    }
}

/// Sequences a package, tokens in the cache, milliseconds to the next token: 160 packages, one further token verified of which 0.7
/// hold, two micro-batches one after the other as the paper's pipeline has them. Of the smallest batch a half is 2 sequences a die:
/// its weights would be read twice for nothing, so it is priced whole.
#[test]
fn cloudmatrix_decode() {
    for (each, parts, context, truth) in [
        (96, 2, 4096, 49.4),
        (128, 2, 1536, 46.8),
        (112, 2, 2176, 47.4),
        (24, 2, 4224, 24.6),
        (8, 1, 4224, 14.9),
    ] {
        let mesh = Mesh::new([("ep", 320)]);
        let setting = serving(mesh, each * 160, each / 2 / parts, context);
        let phase = Phase::Decode {
            speculated: 1,
            accepted: 0.7,
        };
        let served = setting.serve(phase, &cloudmatrix("1")).unwrap();
        let ms = 1e3 * served.token_seconds.unwrap();
        let error = truth / ms - 1.0;
        println!(
            "decode, {each} a package, {context} tokens: {ms:.1} ms, was {truth}, rate {:+.1} %",
            100.0 * error
        );
        assert!(error.abs() <= 0.15, "{each}: {error}");
    }
}
