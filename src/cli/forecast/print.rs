//! A forecast as JSON and as text.

use crate::cli::output::print_text;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use supernode::Result;
use supernode::cluster::Machine;
use supernode::forecast::{Failures, Forecast, Memory, Served, Setting};

/// Joules of a step at the system's rated power, or why nobody knows.
fn energy(setting: &Setting, machine: &Machine, seconds: f64) -> Result<f64> {
    let watts = machine.system.value("power.total")? / machine.chips() as f64;
    Ok(watts * setting.mesh.chips() as f64 * seconds)
}

/// What depends on numbers that a machine may lack: null, and the reason beside it.
fn add_doubtful(
    object: &mut Value,
    setting: &Setting,
    machine: &Machine,
    memory: &Memory,
    seconds: f64,
) {
    let causes: serde_json::Map<String, Value> = memory
        .causes()
        .iter()
        .map(|(k, v)| (k.to_string(), json!(v)))
        .collect();
    object["memory_bytes_per_chip"] = Value::Object(causes);
    object["memory_bytes_per_chip_total"] = json!(memory.total());
    match machine.chip.value("memory.capacity") {
        Ok(capacity) => object["fits"] = json!(memory.total() <= capacity),
        Err(why) => (object["fits"], object["fits_reason"]) = (Value::Null, json!(why.to_string())),
    }
    match energy(setting, machine, seconds) {
        Ok(joules) => object["energy_joules"] = json!(joules),
        Err(why) => {
            (object["energy_joules"], object["energy_reason"]) =
                (Value::Null, json!(why.to_string()));
        }
    }
    let goodput = Failures::default().goodput(setting.mesh.chips());
    object["goodput"] = json!(goodput.share);
    object["checkpoint_every_seconds"] = json!(goodput.interval);
    object["assumed"] = json!(machine.assumed());
}

const RULE: &str = "6 per matmul parameter and token + 12 layers context width per token (no causal mask), over the dense matmul peak of the dtype";

/// A step of inference as one object.
pub(super) fn served_json(
    mode: &str,
    setting: &Setting,
    machine: &Machine,
    s: &Served,
    (low, high): (f64, f64),
) -> Value {
    let chips = setting.mesh.chips() as f64;
    let mut object = json!({
        "mode": mode,
        "step_seconds": s.step_seconds,
        "step_seconds_low": low,
        "step_seconds_high": high,
        "mfu": s.model_flops / (s.step_seconds * s.peak),
        "mfu_rule": "2 per matmul parameter and token + the scores that a token sees, over the dense matmul peak of the dtype",
        "model_flops": s.model_flops,
        "peak_flops": s.peak,
        "dtype": setting.dtype,
        "tflops_per_chip": s.model_flops / s.step_seconds / chips / 1e12,
        "tokens_per_second": s.tokens / s.step_seconds,
        "tokens_per_second_per_chip": s.tokens / s.step_seconds / chips,
        "time_per_token_seconds": s.token_seconds,
        "chips": chips as usize,
        "mesh": setting.mesh.to_string(),
        "compute_seconds": s.compute_seconds,
        "exposed_communication_seconds": s.exposed,
        "bubble_seconds": s.bubble_seconds,
    });
    add_doubtful(&mut object, setting, machine, &s.memory, s.step_seconds);
    object
}

/// A step of inference as text.
pub(super) fn served(
    name: &str,
    setting: &Setting,
    machine: &Machine,
    s: &Served,
    (low, high): (f64, f64),
) {
    let chips = setting.mesh.chips();
    let mut text = format!(
        "{name} on {chips} chips of {} ({}), {} sequences of {} tokens\n",
        machine.system.title, setting.mesh, setting.global_batch, setting.context
    );
    text += &format!(
        "  step          {:.4} s (80 %: {low:.4} to {high:.4})\n",
        s.step_seconds
    );
    if let Some(seconds) = s.token_seconds {
        text += &format!("  a token       {:.1} ms to the next\n", seconds * 1e3);
    }
    text += &format!(
        "  rate          {:.0} tokens/s, {:.0} a chip\n",
        s.tokens / s.step_seconds,
        s.tokens / s.step_seconds / chips as f64
    );
    text += &kernels_and_network(&s.compute_seconds, &s.exposed);
    text += &format!("  bubble        {:.4} s\n", s.bubble_seconds);
    text += &memory_line(machine, &s.memory);
    text += &assumed_line(machine);
    print_text(&text);
}

fn kernels_and_network(
    kernels: &BTreeMap<&'static str, f64>,
    exposed: &BTreeMap<String, f64>,
) -> String {
    let list = |items: Vec<String>| {
        if items.is_empty() {
            "none".into()
        } else {
            items.join(", ")
        }
    };
    let kernels = kernels.iter().map(|(k, s)| format!("{k} {s:.4} s"));
    let waits = exposed.iter().map(|(k, s)| format!("{k} {s:.4} s"));
    format!(
        "  kernels       {}\n  network       {}\n",
        list(kernels.collect()),
        list(waits.collect())
    )
}

fn memory_line(machine: &Machine, memory: &Memory) -> String {
    let gb = 1e9;
    let causes = memory.causes().map(|(k, b)| format!("{k} {:.1}", b / gb));
    let total = memory.total();
    let fits = match machine.chip.value("memory.capacity") {
        Ok(c) if total <= c => format!("fits in {:.1}", c / gb),
        Ok(c) => format!("DOES NOT FIT in {:.1}", c / gb),
        Err(why) => why.to_string(),
    };
    format!(
        "  memory, GB    {:.1} a chip, {fits}: {}\n",
        total / gb,
        causes.join(", ")
    )
}

fn assumed_line(machine: &Machine) -> String {
    let assumed = machine.assumed();
    match assumed.is_empty() {
        true => String::new(),
        false => format!(
            "  not measured on this machine, stood in for: {}\n",
            assumed.join(", ")
        ),
    }
}

/// A training step as one object.
pub(super) fn as_json(setting: &Setting, machine: &Machine, f: &Forecast) -> Result<Value> {
    let chips = setting.mesh.chips();
    let (low, high) = setting.interval(machine)?;
    let (layer_forward, layer_backward) = setting.layer_seconds(machine)?;
    let mut object = json!({
        "mode": "train",
        "step_seconds": f.step_seconds,
        "step_seconds_low": low,
        "step_seconds_high": high,
        "mfu": f.mfu,
        "mfu_rule": RULE,
        "mfu_causal": f.causal_flops / (f.step_seconds * f.peak),
        "model_flops": f.model_flops,
        "peak_flops": f.peak,
        "dtype": setting.dtype,
        "tflops_per_chip": f.model_flops / f.step_seconds / chips as f64 / 1e12,
        "tokens_per_second": f.tokens / f.step_seconds,
        "tokens_per_second_per_chip": f.tokens / f.step_seconds / chips as f64,
        "chips": chips,
        "mesh": setting.mesh.to_string(),
        "compute_seconds": f.compute_seconds,
        "exposed_communication_seconds": f.exposed,
        "bubble_seconds": f.bubble_seconds,
        "straggler_seconds": f.straggler_seconds,
        "layer_forward_seconds": layer_forward,
        "layer_backward_seconds": layer_backward,
    });
    add_doubtful(&mut object, setting, machine, &f.memory, f.step_seconds);
    Ok(object)
}

/// A training step as text.
pub(super) fn table(name: &str, setting: &Setting, machine: &Machine, f: &Forecast) -> Result<()> {
    let chips = setting.mesh.chips();
    let (low, high) = setting.interval(machine)?;
    let mut text = format!(
        "{name} on {chips} chips of {} ({}), {} sequences of {} tokens a step\n",
        machine.system.title, setting.mesh, setting.global_batch, setting.context
    );
    text += &format!(
        "  step          {:.4} s (80 %: {low:.4} to {high:.4})\n",
        f.step_seconds
    );
    text += &format!(
        "  rate          {:.0} tokens/s, {:.1} TFLOP/s a chip, {:.1} % of the matmul peak\n",
        f.tokens / f.step_seconds,
        f.model_flops / f.step_seconds / chips as f64 / 1e12,
        f.mfu * 100.0
    );
    text += &kernels_and_network(&f.compute_seconds, &f.exposed);
    text += &format!(
        "  bubble        {:.4} s, and {:.4} s for slow chips\n",
        f.bubble_seconds, f.straggler_seconds
    );
    text += &memory_line(machine, &f.memory);
    match energy(setting, machine, f.step_seconds) {
        Ok(j) => {
            text += &format!(
                "  energy        {:.3} MJ a step, {:.2} J a token, at rated power (not validated)\n",
                j / 1e6,
                j / f.tokens
            )
        }
        Err(why) => text += &format!("  energy        unknown: {why}\n"),
    }
    let g = Failures::default().goodput(chips);
    text += &format!(
        "  goodput       {:.1} % (a failure every {:.2} h, a checkpoint every {:.0} s; failure rate of Llama 3's run)\n",
        g.share * 100.0,
        g.mtbf / 3600.0,
        g.interval
    );
    text += &assumed_line(machine);
    print_text(&text);
    Ok(())
}
