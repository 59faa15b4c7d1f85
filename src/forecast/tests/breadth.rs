//! Every machine, model, split and schedule gives a sane number, or a sentence that says what does not divide.

use super::*;

/// Splits of 64 chips, and what they need: an axis of the model, a schedule.
const SPLITS: [&str; 10] = [
    "dp=64",
    "fsdp=64",
    "dp=8,tp=8",
    "fsdp=16,tp=4",
    "dp=4,pp=4,tp=4",
    "dp=2,cp=4,tp=8",
    "pp=4,dp=2,cp=2,tp=4",
    "ep=8,dp=8",
    "pp=4,ep=8,dp=2",
    "pp=2,ep=4,dp=2,cp=2,tp=2",
];

fn settings(model: &str) -> Vec<Setting> {
    let architecture = model_named(model).unwrap();
    let mut all = vec![];
    for split in SPLITS {
        let asked = Mesh::parse(split).unwrap();
        let mesh = Mesh::new(AXES.map(|axis| (axis, asked.size_of(axis))));
        for pipeline in Pipeline::ALL {
            for (recompute, zero, sequence_parallel) in [
                (Recompute::None, 0, false),
                (Recompute::Selective, 1, true),
                (Recompute::Full, 3, true),
            ] {
                all.push(Setting {
                    pipeline,
                    virtual_stages: pipeline.chunks(),
                    context_parallel: match recompute {
                        Recompute::None => ContextParallel::Ring,
                        Recompute::Selective => ContextParallel::Usp { exchange: None },
                        Recompute::Full => ContextParallel::AllGather,
                    },
                    recompute,
                    zero,
                    sequence_parallel,
                    context: 4096,
                    ..Setting::new(architecture.clone(), mesh.clone(), 512)
                });
            }
        }
    }
    all
}

#[test]
fn every_combination_has_a_sane_price() {
    let mut priced = 0;
    for (i, name) in Machine::names().enumerate() {
        let machine = Machine::named(name).unwrap();
        for (j, model) in model_names().into_iter().enumerate() {
            // Every machine meets every model, but not all their settings.
            let settings = settings(model);
            for setting in settings.iter().skip((i + j) % 7).step_by(7) {
                let what = || format!("{name} {model} {} {:?}", setting.mesh, setting.pipeline);
                let f = match setting.price(&machine) {
                    Ok(f) => f,
                    Err(e) => {
                        let fine = setting.mesh.size_of("ep") > 1
                            && setting.model.mixture.is_none()
                            || e.to_string().contains("tp=")
                            || e.to_string().contains("at most");
                        assert!(fine, "{}: {e}", what());
                        continue;
                    }
                };
                priced += 1;
                let (low, high) = setting.interval(&machine).unwrap();
                assert!(
                    low <= f.step_seconds && f.step_seconds <= high,
                    "{}",
                    what()
                );
                assert!(f.mfu > 0.001 && f.mfu < 0.95, "{}: {}", what(), f.mfu);
                // No faster than all operations at the peak that is highest.
                assert!(
                    f.step_seconds >= 0.99 * f.causal_flops / f.peak,
                    "{}",
                    what()
                );
                let parts: f64 = f.compute_seconds.values().sum::<f64>()
                    + f.exposed.values().sum::<f64>()
                    + f.bubble_seconds
                    + f.straggler_seconds;
                assert!(
                    (parts / f.step_seconds - 1.0).abs() <= 1e-6,
                    "{}: {parts}",
                    what()
                );
                assert!(f.memory.total() > 0.0 && f.memory.total().is_finite());
            }
        }
    }
    assert!(priced >= 2000, "{priced} were priced");
}

#[test]
fn narrow_types_are_faster_where_there_are_units() {
    let mesh = Mesh::new([("fsdp", 64)]);
    for (name, dtype) in [
        ("dgx-h100", "fp8"),
        ("atlas-950-superpod", "fp8"),
        ("gb200-nvl72", "fp4"),
    ] {
        let machine = Machine::named(name).unwrap();
        let step = |dtype: &str| {
            let model = model_named("llama3-8b").unwrap();
            let setting = Setting {
                dtype: dtype.into(),
                ..Setting::new(model, mesh.clone(), 128)
            };
            setting.price(&machine).unwrap().step_seconds
        };
        let (wide, narrow) = (step("bf16"), step(dtype));
        assert!(
            narrow < wide && narrow > wide / 4.0,
            "{name}: {wide} and {narrow}"
        );
    }
}

#[test]
fn experts_cost_less_than_a_dense_model_of_their_size() {
    let machine = Machine::named("dgx-h800").unwrap();
    let mesh = Mesh::new([("pp", 16), ("dp", 2), ("ep", 64)]);
    let setting = Setting {
        pipeline: Pipeline::DualPipe,
        virtual_stages: 2,
        dtype: "fp8".into(),
        ..Setting::new(model_named("deepseek-v3").unwrap(), mesh, 15360)
    };
    let f = setting.price(&machine).unwrap();
    let full = Setting {
        recompute: Recompute::Full,
        ..setting.clone()
    };
    assert!(full.memory(&machine).unwrap().total() < f.memory.total());
    assert!(f.compute_seconds.contains_key("attention"));
    let narrower = Setting {
        dtype: "bf16".into(),
        ..setting
    };
    assert!(narrower.price(&machine).unwrap().step_seconds > f.step_seconds);
}

/// A chip's memory and work fall as an axis grows.
#[test]
fn every_axis_splits_something() {
    let machine = Machine::named("dgx-h100").unwrap();
    let price = |mesh: &str, batch: usize| {
        let asked = Mesh::parse(mesh).unwrap();
        let mesh = Mesh::new(AXES.map(|axis| (axis, asked.size_of(axis))));
        let setting = Setting {
            context: 8192,
            sequence_parallel: true,
            ..Setting::new(model_named("deepseek-v3").unwrap(), mesh, batch)
        };
        setting.price(&machine).unwrap()
    };
    let one = price("dp=2", 64);
    for mesh in ["dp=2,tp=4", "dp=2,cp=4", "dp=2,pp=4", "dp=2,ep=4", "dp=8"] {
        let four = price(mesh, 64);
        assert!(
            four.step_seconds < 0.7 * one.step_seconds,
            "{mesh}: {}",
            four.step_seconds
        );
        let lighter = mesh == "dp=8" || four.memory.total() < one.memory.total();
        assert!(lighter, "{mesh}");
    }
}
