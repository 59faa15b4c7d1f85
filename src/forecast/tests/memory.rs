//! Bytes by formulas, and published runs on the chips that they ran on.

use super::*;

/// Bytes that a layer keeps, by what is kept.
fn kept(setting: &Setting, machine: &Machine) -> Vec<(&'static str, f64)> {
    let block = setting.model.block(setting.model.layers - 1);
    setting.shape(machine).kept(setting.recompute, block)
}

fn sum(kept: &[(&'static str, f64)]) -> f64 {
    kept.iter().map(|k| k.1).sum()
}

/// Korthikanti et al. 2022 (arXiv:2205.05198), equations 1 to 4 and 6, for a layer of 22B on t = 8 chips.
#[test]
fn a_layer_keeps_what_korthikanti_et_al_count() {
    let machine = a100();
    let (s, b, h, a, t) = (2048.0, 4.0, 6144.0, 64.0, 8.0);
    for (recompute, sequence_parallel, wants) in [
        (
            Recompute::None,
            false,
            10.0 + 24.0 / t + 5.0 * a * s / (h * t),
        ),
        (Recompute::None, true, (34.0 + 5.0 * a * s / h) / t),
        (Recompute::Selective, false, 10.0 + 24.0 / t),
        (Recompute::Selective, true, 34.0 / t),
        (Recompute::Full, false, 2.0),
        (Recompute::Full, true, 2.0 / t),
    ] {
        let setting = Setting {
            recompute,
            sequence_parallel,
            ..megatron("megatron-22b", [1, 1, 4, 4, 1], false)
        };
        let found = sum(&kept(&setting, &machine)) / (s * b * h);
        assert!(
            (found - wants).abs() <= 1e-9 * wants,
            "{recompute:?} {sequence_parallel}: {found}, {wants}"
        );
    }
}

fn deepseek(recompute: Recompute, dtype: &str) -> Setting {
    let mesh = Mesh::new([("pp", 16), ("dp", 2), ("ep", 64)]);
    Setting {
        context: 4096,
        pipeline: Pipeline::DualPipe,
        virtual_stages: 2,
        zero: 1,
        recompute,
        dtype: dtype.into(),
        ..Setting::new(model_named("deepseek-v3").unwrap(), mesh, 15360)
    }
}

/// A token of a mixture layer of DeepSeek-V3: hidden 7168, 128 heads, latents of 1536 and 512 and a key's 64 of position, 8 experts and a
/// shared one of 2048. Written out by hand, experts evenly used.
#[test]
fn a_latent_mixture_keeps_what_its_report_says() {
    let mut machine = Machine::named("dgx-h800").unwrap();
    machine.set("stack.imbalance", "1").unwrap();
    let (width, heads, down, rope) = (7168.0, 128.0, 1536.0 + 512.0, 64.0);
    let (q, kv, o) = (heads * 192.0, heads * (128.0 + 64.0 + 128.0), heads * 128.0);
    let (copies, between) = (8.0 * width, (8.0 + 1.0) * 2048.0);
    let narrow = 1.0 + 4.0 / 128.0;
    let all = |dtype: f64, result: f64, inputs: f64| {
        let stream = 4.0 * width + 4.0 * heads + 2.0 * (down + rope);
        stream
            + dtype * (2.0 * width + down + copies + between)
            + 2.0 * (q + kv)
            + result * o
            + 2.0 * inputs * between
    };
    let selective = |input: f64, result: f64| {
        let stream = 4.0 * width + 4.0 * heads + 2.0 * (down + rope);
        stream + input * (copies + 2.0 * between) + result * o
    };
    for (stored, recompute, dtype, wants) in [
        // As the report has it.
        (
            "narrow",
            Recompute::Selective,
            "fp8",
            selective(narrow, 1.5 + 4.0 / 128.0),
        ),
        // Nothing made again; as Transformer Engine keeps values; in 2 bytes.
        (
            "narrow",
            Recompute::None,
            "fp8",
            all(narrow, 1.5 + 4.0 / 128.0, narrow),
        ),
        (
            "inputs",
            Recompute::None,
            "fp8",
            all(narrow, 2.0 + narrow, 2.0),
        ),
        ("wide", Recompute::None, "fp8", all(2.0, 2.0, 2.0)),
        // Wide products read wide values.
        ("narrow", Recompute::None, "bf16", all(2.0, 2.0, 2.0)),
        ("narrow", Recompute::Selective, "bf16", selective(2.0, 2.0)),
    ] {
        machine.set("stack.stored", stored).unwrap();
        let parts = kept(&deepseek(recompute, dtype), &machine);
        let found = sum(&parts) / 4096.0;
        println!("{stored} {recompute:?} {dtype}: {found:.0} bytes a token and layer, {parts:?}");
        assert!(
            (found - wants).abs() <= 1e-9 * wants,
            "{stored} {recompute:?} {dtype}: {found}, {wants}"
        );
    }
    // Each key by itself: what it saves, and that what it makes again is paid for.
    machine.set("stack.stored", "wide").unwrap();
    let none = deepseek(Recompute::None, "bf16");
    let whole = sum(&kept(&none, &machine)) / 4096.0;
    let keys = [
        "recompute_norms",
        "recompute_up_projections",
        "recompute_activations",
    ];
    for (key, saved) in
        keys.into_iter()
            .zip([2.0 * (2.0 * width + down), 2.0 * (q + kv), 2.0 * between])
    {
        let mut one = machine.clone();
        for other in keys {
            let yes = if key == "recompute_activations" {
                "experts"
            } else {
                "yes"
            };
            one.set(
                &format!("stack.{other}"),
                if other == key { yes } else { "no" },
            )
            .unwrap();
        }
        let setting = deepseek(Recompute::Selective, "bf16");
        let found = whole - sum(&kept(&setting, &one)) / 4096.0;
        assert!(
            (found - saved).abs() <= 1e-6 * saved,
            "{key}: {found}, {saved}"
        );
        let step = |s: &Setting| s.price_only(&one).unwrap().step_seconds;
        assert!(step(&setting) > step(&none), "{key} costs nothing");
    }
}

/// Moments in 2 bytes take 8 of 12 bytes of the optimizer's state, and its time falls; two directions keep two copies.
#[test]
fn moments_and_copies() {
    let mut machine = Machine::named("dgx-h800").unwrap();
    let mut of = |word: &str, pipeline| {
        machine.set("stack.moments", word).unwrap();
        let setting = Setting {
            pipeline,
            ..deepseek(Recompute::Full, "bf16")
        };
        (
            setting.memory(&machine).unwrap(),
            setting.price_only(&machine).unwrap().compute_seconds["optimizer"],
        )
    };
    let ((wide, slow), (narrow, fast)) = (
        of("f32", Pipeline::DualPipe),
        of("bf16", Pipeline::DualPipe),
    );
    assert!((narrow.optimizer / wide.optimizer - 8.0 / 12.0).abs() <= 1e-12 && fast < slow);
    // The fullest chip is that of both ends, whose embedding, head and predicting layer are there once.
    let (folded, _) = of("bf16", Pipeline::Listed(crate::pipeline::Schedule::ZbV));
    let setting = deepseek(Recompute::Full, "bf16");
    let ends = setting.end_parameters(&setting.layers().unwrap(), 0);
    assert!(ends > 2.0 * 129_280.0 * 7168.0);
    for (copies, once, size) in [
        (narrow.parameters, folded.parameters, 2.0),
        (narrow.gradients, folded.gradients, 4.0),
    ] {
        assert!(
            (copies - (2.0 * once - size * ends)).abs() <= 1e-9 * copies,
            "{copies}, {once}, {ends}"
        );
    }
}

/// Runs of hardware whose split is published, on the chip that they ran on. Llama 3's FSDP keeps gradients split (its section 3.3.2; here
/// `zero` 2) and how many chunks a stage has is not stated: with one it fits, with more only where SwiGLU's results are made again.
#[test]
fn published_runs_fit_where_they_ran() {
    let rows = published::KORTHIKANTI
        .iter()
        .flat_map(|(model, sizes, ..)| {
            [false, true].map(|new| ("dgx-a100", megatron(model, *sizes, new)))
        });
    let mut rows: Vec<(&str, Setting)> = rows.collect();
    rows.extend([256, 1024].map(|chips| {
        (
            "dgx-a100",
            megatron("gpt3-175b", [8, chips / 64, 768, 1, 6], true),
        )
    }));
    let llama = |[cp, dp, context]: [usize; 3], chunks, recompute| {
        let mesh = Mesh::new([("pp", 16), ("dp", dp), ("cp", cp), ("tp", 8)]);
        Setting {
            context,
            zero: 2,
            virtual_stages: chunks,
            recompute,
            sequence_parallel: true,
            context_parallel: ContextParallel::AllGather,
            ..Setting::new(
                model_named("llama3-405b").unwrap(),
                mesh,
                (16 << 20) / context,
            )
        }
    };
    let llamas = [[1, 64, 8192], [1, 128, 8192], [16, 8, 131_072]];
    rows.extend(llamas.map(|sizes| ("dgx-h100", llama(sizes, 1, Recompute::None))));
    let ascend = |model: &str, mesh: Mesh, batch, micro_batch, chunks| Setting {
        micro_batch,
        zero: 1,
        virtual_stages: chunks,
        sequence_parallel: true,
        ..Setting::new(model_named(model).unwrap(), mesh, batch)
    };
    rows.push((
        "atlas-800t-a2",
        ascend(
            "pangu-ultra-135b",
            Mesh::new([("pp", 8), ("dp", 128), ("tp", 8)]),
            2048,
            1,
            6,
        ),
    ));
    rows.push((
        "atlas-800t-a2",
        ascend(
            "pangu-ultra-moe",
            Mesh::new([("pp", 16), ("dp", 12), ("ep", 4), ("tp", 8)]),
            2688,
            2,
            2,
        ),
    ));
    rows.push(("dgx-h800", deepseek(Recompute::Selective, "fp8")));
    let gib = |bytes: f64| bytes / (1u64 << 30) as f64;
    let line = |name: &str, setting: &Setting, machine: &Machine| {
        let (memory, capacity) = (
            setting.memory(machine).unwrap(),
            machine.chip.value("memory.capacity").unwrap(),
        );
        println!(
            "{name}, {} layers of {}, {}, {} chunks, {:?}: {:.1} GiB of {:.1} ({:.1} activations)",
            setting.model.layers,
            setting.model.hidden,
            setting.mesh,
            setting.virtual_stages,
            setting.recompute,
            gib(memory.total()),
            gib(capacity),
            gib(memory.activations)
        );
        memory.total() <= capacity
    };
    for (name, setting) in &rows {
        let machine = Machine::named(name).unwrap();
        assert!(line(name, setting, &machine), "{name} {}", setting.mesh);
    }
    let mut h100 = Machine::named("dgx-h100").unwrap();
    for chunks in [4, 8] {
        line(
            "dgx-h100",
            &llama(llamas[0], chunks, Recompute::None),
            &h100,
        );
    }
    h100.set("stack.recompute_activations", "all").unwrap();
    h100.set("stack.recompute_norms", "yes").unwrap();
    for chunks in [4, 8] {
        assert!(line(
            "dgx-h100, SwiGLU and norms again",
            &llama(llamas[0], chunks, Recompute::Selective),
            &h100
        ));
    }
}
