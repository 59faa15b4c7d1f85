//! `supernode forecast`.

use super::progress::print_text;
use serde_json::{Value, json};
use supernode::cluster::Machine;
use supernode::forecast::{Failures, Forecast, Recompute, Setting, model_named};
use supernode::mesh::Mesh;
use supernode::model::{Config, FeedForward};
use supernode::pipeline::Schedule;
use supernode::{Error, ErrorKind, Result};

/// The model, as `forecast` and `plan` take it.
#[derive(Debug, clap::Args)]
pub(super) struct Model {
    /// A named model, or a config.json by its path
    #[arg(long, value_name = "NAME|config.json")]
    model: String,
    /// Blocks
    #[arg(long, value_name = "N", help_heading = "Model")]
    layers: Option<usize>,
    /// Width of the residual stream
    #[arg(long, value_name = "N", help_heading = "Model")]
    hidden: Option<usize>,
    /// Query heads
    #[arg(long, value_name = "N", help_heading = "Model")]
    heads: Option<usize>,
    /// Key and value heads
    #[arg(long, value_name = "N", help_heading = "Model")]
    kv_heads: Option<usize>,
    /// Width of the feed-forward part
    #[arg(long, value_name = "N", help_heading = "Model")]
    ffn: Option<usize>,
    /// Whether the feed-forward part is gated (SwiGLU)
    #[arg(long, value_name = "true|false", help_heading = "Model")]
    gated: Option<bool>,
    /// Tokens of the vocabulary
    #[arg(long, value_name = "N", help_heading = "Model")]
    vocab: Option<usize>,
}

impl Model {
    /// The model with what was changed.
    pub(super) fn config(&self) -> Result<Config> {
        let mut c = model_named(&self.model)?;
        if let (Some(heads), None) = (self.heads, self.kv_heads) {
            c.kv_heads = if c.kv_heads == c.heads {
                heads
            } else {
                c.kv_heads
            };
        }
        c.layers = self.layers.unwrap_or(c.layers);
        c.hidden = self.hidden.unwrap_or(c.hidden);
        c.heads = self.heads.unwrap_or(c.heads);
        c.kv_heads = self.kv_heads.unwrap_or(c.kv_heads);
        c.ffn = self.ffn.unwrap_or(c.ffn);
        c.vocab = self.vocab.unwrap_or(c.vocab);
        match self.gated {
            Some(true) => c.feed_forward = FeedForward::SwiGlu,
            Some(false) if c.feed_forward == FeedForward::SwiGlu => {
                c.feed_forward = FeedForward::GeluTanh;
            }
            _ => {}
        }
        Ok(c)
    }

    pub(super) fn name(&self) -> &str {
        &self.model
    }
}

/// The machine, as `forecast` and `plan` take it.
#[derive(Debug, clap::Args)]
pub(super) struct On {
    /// A system, NAME or NAME:GRADE, or a file by its path
    #[arg(long, value_name = "NAME|FILE.toml")]
    machine: String,
    /// The software: a named stack, or a file by its path; by default the machine's
    #[arg(long, value_name = "NAME|FILE.toml")]
    stack: Option<String>,
    /// Change a number or word of machine, chip or stack, in SI units
    #[arg(long, value_name = "FIELD=VALUE")]
    set: Vec<String>,
}

impl On {
    /// The machine with what was changed.
    pub(super) fn machine(&self) -> Result<Machine> {
        let mut machine = Machine::named(&self.machine)?;
        if let Some(stack) = &self.stack {
            machine = machine.with_stack(stack)?;
        }
        for set in &self.set {
            let (field, value) = set.split_once('=').ok_or_else(|| {
                Error::new(
                    ErrorKind::Input,
                    format!("--set {set}: write it as FIELD=VALUE"),
                )
            })?;
            machine.set(field, value)?;
        }
        Ok(machine)
    }
}

/// Arguments of `supernode forecast`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    on: On,
    #[command(flatten)]
    model: Model,
    /// Chips along dp, pp and tp, in any order: neighbours lie along tp, then dp, then pp
    #[arg(long, value_name = "tp=8,pp=16,dp=64")]
    mesh: String,
    /// Sequences of a step
    #[arg(long, value_name = "N")]
    global_batch: usize,
    /// Sequences that a chip computes at a time
    #[arg(long, default_value_t = 1, value_name = "N")]
    micro_batch: usize,
    /// Tokens of a sequence; by default the model's
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Order of forwards and backwards: gpipe, 1f1b, zb-h1 or zb-v
    #[arg(long, default_value = "1f1b", value_name = "SCHEDULE")]
    schedule: Schedule,
    /// Chunks of layers on a stage; by default 1, for zb-v 2; 1f1b with more than one is interleaved
    #[arg(long, value_name = "N")]
    virtual_stages: Option<usize>,
    /// What is computed again instead of kept: none, selective or full
    #[arg(long, default_value = "none", value_parser = ["none", "selective", "full"])]
    recompute: String,
    /// What is split over dp: 1 optimizer, 2 gradients too, 3 parameters too
    #[arg(long, default_value_t = 0, value_name = "0..3")]
    zero: u8,
    /// Split norms and dropout over tp
    #[arg(long)]
    sequence_parallel: bool,
    /// Type of matmuls
    #[arg(long, default_value = "bf16", value_parser = ["f32", "bf16", "fp8", "int8", "fp4"])]
    dtype: String,
    /// Write the pipeline's timeline, for Perfetto or Chrome
    #[arg(long, value_name = "OUT.json")]
    trace: Option<std::path::PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(super) fn run(a: &Arguments) -> Result<()> {
    let machine = a.on.machine()?;
    let setting = a.setting()?;
    let forecast = setting.price(&machine)?;
    if let Some(path) = &a.trace {
        let failed = |e: std::io::Error| {
            let why = format!("cannot write the timeline to {}: {e}", path.display());
            Error::new(ErrorKind::Io, why)
        };
        std::fs::write(path, forecast.chrome_trace().to_string()).map_err(failed)?;
    }
    if a.json {
        print_text(&format!("{}\n", as_json(&setting, &machine, &forecast)?));
    } else {
        print_table(a.model.name(), &setting, &machine, &forecast)?;
    }
    Ok(())
}

impl Arguments {
    fn setting(&self) -> Result<Setting> {
        let config = self.model.config()?;
        let asked = Mesh::parse(&self.mesh)?;
        if let Some(axis) = asked
            .axes()
            .iter()
            .find(|a| !["dp", "pp", "tp"].contains(&a.name()))
        {
            let why = format!(
                "--mesh {asked}: axis '{}' is not priced; dp, pp and tp are",
                axis.name()
            );
            return Err(Error::new(ErrorKind::Mesh, why));
        }
        Ok(Setting {
            context: self.context.unwrap_or(config.context),
            config,
            mesh: Mesh::new(["pp", "dp", "tp"].map(|axis| (axis, asked.size_of(axis)))),
            global_batch: self.global_batch,
            micro_batch: self.micro_batch,
            schedule: self.schedule,
            virtual_stages: self.virtual_stages.unwrap_or(self.schedule.chunks()),
            recompute: match self.recompute.as_str() {
                "full" => Recompute::Full,
                "selective" => Recompute::Selective,
                _ => Recompute::None,
            },
            zero: self.zero,
            sequence_parallel: self.sequence_parallel,
            dtype: self.dtype.clone(),
        })
    }
}

/// Joules of a step at the system's rated power, or why nobody knows.
fn energy(setting: &Setting, machine: &Machine, forecast: &Forecast) -> Result<f64> {
    let watts = machine.system.value("power.total")? / machine.chips() as f64;
    Ok(watts * setting.mesh.chips() as f64 * forecast.step_seconds)
}

fn as_json(setting: &Setting, machine: &Machine, f: &Forecast) -> Result<Value> {
    let chips = setting.mesh.chips();
    let (low, high) = f.interval(machine);
    let (layer_forward, layer_backward) = setting.layer_seconds(machine)?;
    let goodput = Failures::default().goodput(chips);
    let memory: serde_json::Map<String, Value> = f
        .memory
        .causes()
        .iter()
        .map(|(k, v)| (k.to_string(), json!(v)))
        .collect();
    let mut object = json!({
        "step_seconds": f.step_seconds,
        "step_seconds_low": low,
        "step_seconds_high": high,
        "mfu": f.mfu,
        "mfu_rule": "6 per matmul parameter and token + 12 layers context width per token, over the dense matmul peak",
        "tflops_per_chip": f.model_flops / f.step_seconds / chips as f64 / 1e12,
        "tokens_per_second": f.tokens / f.step_seconds,
        "chips": chips,
        "mesh": setting.mesh.to_string(),
        "memory_bytes_per_chip": memory,
        "memory_bytes_per_chip_total": f.memory.total(),
        "compute_seconds": f.compute_seconds,
        "exposed_communication_seconds": f.exposed,
        "bubble_seconds": f.bubble_seconds,
        "layer_forward_seconds": layer_forward,
        "layer_backward_seconds": layer_backward,
        "goodput": goodput.share,
        "checkpoint_every_seconds": goodput.interval,
        "assumed": machine.assumed(),
    });
    match machine.chip.value("memory.capacity") {
        Ok(capacity) => object["fits"] = json!(f.memory.total() <= capacity),
        Err(why) => (object["fits"], object["fits_reason"]) = (Value::Null, json!(why.to_string())),
    }
    match energy(setting, machine, f) {
        Ok(joules) => object["energy_joules"] = json!(joules),
        Err(why) => {
            (object["energy_joules"], object["energy_reason"]) =
                (Value::Null, json!(why.to_string()));
        }
    }
    Ok(object)
}

fn print_table(name: &str, setting: &Setting, machine: &Machine, f: &Forecast) -> Result<()> {
    let chips = setting.mesh.chips();
    let (low, high) = f.interval(machine);
    let gb = 1e9;
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
    let list = |items: Vec<String>| {
        if items.is_empty() {
            "none".into()
        } else {
            items.join(", ")
        }
    };
    let kernels = f
        .compute_seconds
        .iter()
        .map(|(k, s)| format!("{k} {s:.4} s"));
    text += &format!("  kernels       {}\n", list(kernels.collect()));
    let waits = f.exposed.iter().map(|(k, s)| format!("{k} {s:.4} s"));
    text += &format!("  network       {}\n", list(waits.collect()));
    text += &format!("  bubble        {:.4} s\n", f.bubble_seconds);
    let causes = f.memory.causes().map(|(k, b)| format!("{k} {:.1}", b / gb));
    let total = f.memory.total();
    let fits = match machine.chip.value("memory.capacity") {
        Ok(c) if total <= c => format!("fits in {:.1}", c / gb),
        Ok(c) => format!("DOES NOT FIT in {:.1}", c / gb),
        Err(why) => why.to_string(),
    };
    text += &format!(
        "  memory, GB    {:.1} a chip, {fits}: {}\n",
        total / gb,
        causes.join(", ")
    );
    match energy(setting, machine, f) {
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
    let assumed = machine.assumed();
    if !assumed.is_empty() {
        text += &format!(
            "  not measured on this machine, stood in for: {}\n",
            assumed.join(", ")
        );
    }
    print_text(&text);
    Ok(())
}
