//! The model and the machine, as `forecast` and `plan` take them.

use supernode::cluster::Machine;
use supernode::forecast::{Architecture, Latent, Mixture, Window, model_named};
use supernode::{Error, ErrorKind, Result};

/// The model, as `forecast` and `plan` take it.
#[derive(Debug, clap::Args)]
pub(in super::super) struct Model {
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
    /// Elements of a head; by default hidden / heads
    #[arg(long, value_name = "N", help_heading = "Model")]
    head_dim: Option<usize>,
    /// Width of the feed-forward part
    #[arg(long, value_name = "N", help_heading = "Model")]
    ffn: Option<usize>,
    /// Whether the feed-forward part is gated (SwiGLU)
    #[arg(long, value_name = "true|false", help_heading = "Model")]
    gated: Option<bool>,
    /// Tokens of the vocabulary
    #[arg(long, value_name = "N", help_heading = "Model")]
    vocab: Option<usize>,
    /// Whether the head is the embedding
    #[arg(long, value_name = "true|false", help_heading = "Model")]
    tied: Option<bool>,
    /// Experts of a mixture; 0 or 1 for a dense model
    #[arg(long, value_name = "N", help_heading = "Model")]
    experts: Option<usize>,
    /// Experts that a token visits
    #[arg(long, value_name = "N", help_heading = "Model")]
    experts_per_token: Option<usize>,
    /// Experts that every token visits
    #[arg(long, value_name = "N", help_heading = "Model")]
    shared_experts: Option<usize>,
    /// Width of an expert; by default that of the dense part
    #[arg(long, value_name = "N", help_heading = "Model")]
    expert_ffn: Option<usize>,
    /// Layers in front that are dense
    #[arg(long, value_name = "N", help_heading = "Model")]
    dense_layers: Option<usize>,
    /// Layers that predict tokens beyond the next
    #[arg(long, value_name = "N", help_heading = "Model")]
    predicted_tokens: Option<usize>,
    /// Latent attention: width of the keys' and values' vector, 0 for none
    #[arg(long, value_name = "N", help_heading = "Model")]
    kv_rank: Option<usize>,
    /// Latent attention: width of the queries' vector, 0 for none
    #[arg(long, value_name = "N", help_heading = "Model")]
    q_rank: Option<usize>,
}

/// Sizes that `--set` may change as well as the machine's fields.
const SIZES: [&str; 19] = [
    "layers",
    "hidden",
    "heads",
    "kv-heads",
    "head-dim",
    "ffn",
    "gated",
    "vocab",
    "tied",
    "experts",
    "experts-per-token",
    "shared-experts",
    "expert-ffn",
    "dense-layers",
    "predicted-tokens",
    "kv-rank",
    "q-rank",
    "window",
    "context",
];

impl Model {
    /// The model with what was changed: first by options, then by `--set model.SIZE=VALUE`.
    pub(in super::super) fn architecture(&self, on: &On) -> Result<Architecture> {
        let mut m = model_named(&self.model)?;
        // Heads share the width unless the model says otherwise.
        let shared = m.head_dim * m.heads == m.hidden;
        let mut changed = vec![];
        let numbers = [
            ("layers", self.layers),
            ("hidden", self.hidden),
            ("heads", self.heads),
            ("kv-heads", self.kv_heads),
            ("head-dim", self.head_dim),
            ("ffn", self.ffn),
            ("gated", self.gated.map(usize::from)),
            ("vocab", self.vocab),
            ("tied", self.tied.map(usize::from)),
            ("experts", self.experts),
            ("experts-per-token", self.experts_per_token),
            ("expert-ffn", self.expert_ffn),
            ("shared-experts", self.shared_experts),
            ("dense-layers", self.dense_layers),
            ("predicted-tokens", self.predicted_tokens),
            ("kv-rank", self.kv_rank),
            ("q-rank", self.q_rank),
        ];
        let mut kv_rank = m.latent.map(|l| l.kv_rank);
        let mut q_rank = None;
        let mut resize = |m: &mut Architecture, name: &str, value: usize| {
            match name {
                "kv-rank" => kv_rank = Some(value).filter(|n| *n > 0),
                "q-rank" => q_rank = Some(value),
                _ => {}
            }
            resize(m, name, value);
        };
        for (name, value) in numbers {
            if let Some(value) = value {
                resize(&mut m, name, value);
                changed.push(name.to_string());
            }
        }
        for (field, value) in on.sets()? {
            let Some(name) = field.strip_prefix("model.") else {
                continue;
            };
            let name = name.replace('_', "-");
            if !SIZES.contains(&name.as_str()) {
                let why = format!(
                    "--set {field}={value}: a model has no '{name}'; it has {}",
                    SIZES.join(", ")
                );
                return Err(Error::new(ErrorKind::Input, why));
            }
            let number = match value {
                "true" | "yes" => Some(1),
                "false" | "no" => Some(0),
                text => text.parse().ok(),
            };
            let number = number.ok_or_else(|| {
                let why = format!("--set {field}={value}: '{value}' is no whole number");
                Error::new(ErrorKind::Input, why)
            })?;
            resize(&mut m, &name, number);
            changed.push(name);
        }
        let is = |name: &str| changed.iter().any(|c| c == name);
        if shared && (is("hidden") || is("heads")) && !is("head-dim") {
            share_width(&mut m)?;
        }
        if m.latent.is_some() && is("kv-heads") && m.kv_heads != m.heads {
            let why = format!(
                "--kv-heads {}: latent attention makes keys and values for all {} heads; leave it out, or give --kv-rank 0",
                m.kv_heads, m.heads
            );
            return Err(Error::new(ErrorKind::Input, why));
        }
        if let (Some(rank), None) = (q_rank, kv_rank) {
            let why = format!(
                "--q-rank {rank}: queries come from a vector of their own in latent attention alone; give --kv-rank too"
            );
            return Err(Error::new(ErrorKind::Input, why));
        }
        if m.mixture.is_some_and(|x| x.experts == 1) && self.experts.is_none_or(|n| n <= 1) {
            let why = "--experts-per-token, --expert-ffn, --shared-experts and --dense-layers belong to a mixture; give --experts too";
            return Err(Error::new(ErrorKind::Input, why));
        }
        m.check()?;
        Ok(m)
    }

    pub(in super::super) fn name(&self) -> &str {
        &self.model
    }
}

/// Gives each head its share of the width.
fn share_width(m: &mut Architecture) -> Result<()> {
    if m.heads == 0 || m.hidden == 0 {
        // Refused with the other sizes.
        return Ok(());
    }
    if !m.hidden.is_multiple_of(m.heads) {
        let why = format!(
            "{} hidden are not divisible by {} heads; {} is, or give --head-dim",
            m.hidden,
            m.heads,
            m.hidden.next_multiple_of(m.heads)
        );
        return Err(Error::new(ErrorKind::Input, why));
    }
    m.head_dim = m.hidden / m.heads;
    Ok(())
}

/// Changes one size and what follows from it: as many keys as queries stay as many.
fn resize(m: &mut Architecture, name: &str, value: usize) {
    let mixture = |m: &Architecture| {
        m.mixture.unwrap_or(Mixture {
            experts: 1,
            per_token: 1,
            shared: 0,
            ffn: m.ffn,
            shared_ffn: 0,
            dense_layers: 0,
            every: 1,
            groups: 1,
            groups_per_token: 1,
        })
    };
    match name {
        "layers" => m.layers = value,
        "hidden" => m.hidden = value,
        "heads" => {
            if m.kv_heads == m.heads {
                m.kv_heads = value;
            }
            m.heads = value;
        }
        "kv-heads" => m.kv_heads = value,
        "head-dim" => m.head_dim = value,
        "ffn" => m.ffn = value,
        "gated" => m.gated = value != 0,
        "vocab" => m.vocab = value,
        "tied" => m.tied = value != 0,
        "context" => m.context = value,
        "window" => {
            let (tokens, share) = (value, 1.0);
            m.window = (value > 0).then_some(Window { tokens, share });
        }
        "experts" if value <= 1 => m.mixture = None,
        "experts" => {
            let (old, experts) = (mixture(m), value);
            m.mixture = Some(Mixture { experts, ..old });
        }
        "predicted-tokens" => m.predicted = value,
        "kv-rank" if value == 0 => m.latent = None,
        "kv-rank" | "q-rank" => {
            let mut l = m.latent.unwrap_or(Latent {
                q_rank: 0,
                kv_rank: 512,
                nope: m.head_dim,
                rope: 64,
                value: m.head_dim,
            });
            match name {
                "kv-rank" => l.kv_rank = value,
                _ => l.q_rank = value,
            }
            m.latent = Some(l);
        }
        _ => {
            let mut x = mixture(m);
            match name {
                "experts-per-token" => x.per_token = value,
                "expert-ffn" => {
                    x.ffn = value;
                    x.shared_ffn = x.shared * value;
                }
                "shared-experts" => {
                    x.shared = value;
                    x.shared_ffn = value * x.ffn;
                }
                _ => x.dense_layers = value,
            }
            m.mixture = Some(x);
        }
    }
}

/// The machine, as `forecast` and `plan` take it.
#[derive(Debug, clap::Args)]
pub(in super::super) struct On {
    /// A system, NAME or NAME:GRADE, or a file by its path
    #[arg(long, value_name = "NAME|FILE.toml")]
    machine: String,
    /// The software: a named stack, or a file by its path; by default the machine's
    #[arg(long, value_name = "NAME|FILE.toml")]
    stack: Option<String>,
    /// Change an entry of machine, chip or stack, in SI units, or of the model (model.layers=80)
    #[arg(long, value_name = "FIELD=VALUE")]
    set: Vec<String>,
}

impl On {
    /// The machine with what was changed.
    pub(in super::super) fn machine(&self) -> Result<Machine> {
        let mut machine = Machine::named(&self.machine)?;
        if let Some(stack) = &self.stack {
            machine = machine.with_stack(stack)?;
        }
        for (field, value) in self.sets()? {
            if !field.starts_with("model.") {
                machine.set(field, value)?;
            }
        }
        Ok(machine)
    }

    /// Fields and values of `--set`.
    fn sets(&self) -> Result<Vec<(&str, &str)>> {
        let all = self.set.iter().map(|set| {
            set.split_once('=').ok_or_else(|| {
                Error::new(
                    ErrorKind::Input,
                    format!("--set {set}: write it as FIELD=VALUE"),
                )
            })
        });
        all.collect()
    }
}
