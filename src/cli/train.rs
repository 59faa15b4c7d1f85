//! `supernode train`.

use super::architecture::Architecture;
use super::chips::Chips;
use super::preset::{Preset, Recipe};
use super::progress::Progress;
use super::shares::Wish;
use super::signals::stop_when_asked;
use super::text::Source;
use std::path::PathBuf;
use supernode::mesh::Mesh;
use supernode::model::{Config, ContextMethod, MOST_CONTEXT, Transformer};
use supernode::pipeline::Schedule;
use supernode::spmd::{BUCKET_BYTES, Device, Zero};
use supernode::train::data::{Batches, Split, TRAIN_SHARE, Tokens};
use supernode::train::schedule::LearningRate;
use supernode::train::{AdamW, Options, Training};
use supernode::{DType, Error, ErrorKind, Result};

/// Arguments of `supernode train`. Without a value, a number is the preset's.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    source: Source,
    /// Model and recipe
    #[arg(long, value_enum, default_value = "nanogpt-cpu")]
    preset: Preset,
    /// Chips along each axis: dp (data), fsdp (fully sharded data), ep (experts), cp (context), tp (tensor), pp (stages of a
    /// pipeline); without it one chip
    #[arg(long, value_name = "dp=2,tp=2")]
    mesh: Option<String>,
    /// Sequences that each chip along dp takes, as parts of the batch: for chips of unlike speed, one number for each, or
    /// 'measured' to time a forward and backward first; the same as --mesh dp=3:1. A run that goes on takes its
    /// checkpoint's unless this names others
    #[arg(long, value_name = "3,1|measured")]
    pub(super) shares: Option<Wish>,
    /// ZeRO's stage over fsdp, or over dp without one: 1 splits optimizer state, 2 also gradients, 3 also parameters; by
    /// default 3 over fsdp, 0 over dp
    #[arg(long, value_name = "0|1|2|3")]
    zero: Option<usize>,
    /// Bytes of gradients that are summed over chips at once, while the backward goes on; 0 for each parameter by itself
    #[arg(long, value_name = "N", default_value_t = BUCKET_BYTES)]
    bucket_bytes: u64,
    /// Split over tp also the tokens of what lies between its matrices: norms, dropout, the residual stream
    #[arg(long)]
    sequence_parallel: bool,
    /// With --sequence-parallel: multiply chunk by chunk while the next tokens, or sums, travel over tp
    #[arg(long)]
    collective_matmul: bool,
    /// How attention is split over cp; by default ulysses where cp divides the heads that tp leaves, else ring
    #[arg(long, value_enum)]
    cp_method: Option<ContextWord>,
    /// With --cp-method usp: neighbours that exchange heads; by default as many as cp and the heads allow
    #[arg(long, value_name = "N", requires = "cp_method")]
    cp_exchange: Option<usize>,
    /// How micro-batches pass through the stages of pp: gpipe, 1f1b, zb-h1 or zb-v
    #[arg(long, default_value = "1f1b", value_name = "SCHEDULE")]
    schedule: Schedule,
    /// Chunks of layers of each stage of pp; by default 1, for zb-v 2; 1f1b with more than one is interleaved
    #[arg(long, value_name = "N")]
    virtual_stages: Option<usize>,
    /// What chips are: cpu, gpu, gpu:1, or a list that they take in turn (see `supernode devices`)
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: String,
    #[command(flatten)]
    pub(super) chips: Chips,

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
    /// Tokens of the vocabulary; by default the text's, or the preset's
    #[arg(long, value_name = "N", help_heading = "Model")]
    vocab: Option<usize>,
    /// Tokens of a sequence
    #[arg(long, value_name = "N", help_heading = "Model")]
    context: Option<usize>,
    /// Probability of dropout
    #[arg(long, value_name = "P", help_heading = "Model")]
    dropout: Option<f32>,

    #[command(flatten)]
    architecture: Architecture,

    /// Sequences per step, over the whole mesh
    #[arg(long, value_name = "N", help_heading = "Recipe")]
    batch: Option<usize>,
    /// Sequences hold documents that end in this token: a character or byte (\n is a line's end), for --tokens a number. Attention
    /// stays inside of each, positions begin at 0 in each
    #[arg(long, value_name = "TOKEN", help_heading = "Recipe")]
    document_end: Option<String>,
    /// Sequences that a chip computes at a time; by default all of its share, or one where pp has several stages
    #[arg(long, value_name = "N", help_heading = "Recipe")]
    micro_batch: Option<usize>,
    /// Steps in all
    #[arg(long, value_name = "N", help_heading = "Recipe")]
    steps: Option<u64>,
    /// Highest learning rate; it falls to a tenth by a cosine
    #[arg(long, value_name = "RATE", help_heading = "Recipe")]
    lr: Option<f64>,
    /// Steps of linear warm-up; by default the preset's, at most a tenth of all
    #[arg(long, value_name = "N", help_heading = "Recipe")]
    warmup: Option<u64>,
    /// Type of activations and of the operands of matmuls; master weights stay in f32
    #[arg(
        long,
        default_value = "f32",
        value_name = "f32|bf16",
        help_heading = "Recipe"
    )]
    dtype: DType,
    /// Compute each block again in the backward instead of keeping its values
    #[arg(long, help_heading = "Recipe")]
    recompute: bool,
    /// Seed of weights, batches, dropout and samples
    #[arg(
        long,
        default_value_t = 1337,
        value_name = "N",
        help_heading = "Recipe"
    )]
    pub(super) seed: u64,

    /// Directory of the checkpoint; written at evaluations, at the end, and on Ctrl-C
    #[arg(long, value_name = "DIR", help_heading = "Results")]
    checkpoint: Option<PathBuf>,
    /// Go on from the checkpoint
    #[arg(long, requires = "checkpoint", help_heading = "Results")]
    pub(super) resume: bool,
    /// Validate after every so many steps and at the end; 0 for never
    #[arg(long, value_name = "N", help_heading = "Results")]
    eval_every: Option<u64>,
    /// Sample this many tokens at the end
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Results")]
    sample: usize,
    /// Write the trace, for this crate and for Perfetto or Chrome
    #[arg(long, value_name = "OUT.json", help_heading = "Results")]
    trace: Option<PathBuf>,
    /// Trace one step without running it: peak bytes and traffic per chip of any mesh; with --device gpu also what goes through host
    /// memory
    #[arg(long, help_heading = "Results")]
    pub(super) ghost: bool,
    /// With --ghost: print which chip keeps what of each parameter, and what moves in each phase of a step
    #[arg(long, requires = "ghost", help_heading = "Results")]
    layout: bool,
    /// Print one JSON object a line
    #[arg(long, help_heading = "Results")]
    json: bool,
}

/// Ways to split attention over cp.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum ContextWord {
    /// Keys and values travel around the chips; every chip has an early and a late part of the sequence
    Ring,
    /// All tokens of some heads, by all-to-alls
    Ulysses,
    /// Both: neighbours exchange heads, a ring joins them
    Usp,
}

/// How a training run ended.
pub(super) enum Outcome {
    /// All that was asked is done.
    Done,
    /// A signal stopped it; `--resume` goes on.
    Stopped,
}

/// Runs the command.
pub(super) fn run(a: &Arguments) -> Result<Outcome> {
    let mesh = a
        .mesh
        .as_deref()
        .map_or_else(|| Ok(Mesh::single()), Mesh::parse)?;
    let device = Device::parse(&a.device)?;
    if !matches!(a.dtype, DType::F32 | DType::Bf16) {
        return Err(Error::new(
            ErrorKind::Input,
            format!("--dtype {}: training computes in f32 or bf16", a.dtype),
        ));
    }
    let training = a.training(&mesh)?;
    let chosen = a.choose(&training, mesh, &device)?;
    let mesh = &chosen.mesh;
    training.check(mesh)?;
    if a.ghost {
        a.ghost(mesh, &training, device)?;
        return Ok(Outcome::Done);
    }
    let world = a.chips.world(mesh, device, a.seed)?;
    let stop = stop_when_asked()?;
    let progress = Progress::new(&training, a.json);
    progress.begin(&training, &chosen, world.threads_per_chip());
    let run = training.run(&world, &|report| progress.tell(report), &stop);
    progress.end();
    let run = run?;
    if let Some(path) = &a.trace {
        run.trace().save(path)?;
    }
    match progress.done(&run) {
        true => Ok(Outcome::Stopped),
        false => Ok(Outcome::Done),
    }
}

impl Arguments {
    fn training(&self, mesh: &Mesh) -> Result<Training> {
        let recipe = self.preset.recipe();
        let context = self.context.unwrap_or(recipe.config.context);
        let vocab = self.vocab.or(recipe.vocab);
        if context > MOST_CONTEXT {
            let why = format!("--context {context}: at most {MOST_CONTEXT} tokens are possible");
            return Err(Error::new(ErrorKind::Input, why));
        }
        let tokens = self.source.read(vocab, self.ghost, context)?;
        let config = self.config(&recipe, vocab, &tokens, context)?;
        config.check(mesh)?;
        let rows = self.batch.unwrap_or(recipe.batch);
        let share = if self.source.is_empty() {
            1.0
        } else {
            TRAIN_SHARE
        };
        let split = Split::new(tokens.len(), share)?;
        let batches = self.documents(Batches::new(tokens, split, context, rows, self.seed)?)?;
        let model = Transformer::new(config, mesh)?
            .with_dtype(self.dtype)
            .with_recompute(self.recompute)
            .with_sequence_parallel(self.sequence_parallel)
            .with_collective_matmul(self.collective_matmul)
            .with_context_method(self.context_method(mesh)?);
        let options = self.options(&recipe)?;
        Ok(Training {
            model,
            batches,
            options,
        })
    }

    /// Batches whose rows hold several documents, if their end was named.
    fn documents(&self, batches: Batches) -> Result<Batches> {
        let Some(end) = &self.document_end else {
            return Ok(batches);
        };
        let plain = end.replace("\\n", "\n").replace("\\0", "\0");
        let refuse = |why: String| {
            let why = format!("--document-end {end:?}: {why}");
            Err(Error::new(ErrorKind::Input, why))
        };
        match batches.tokens().vocabulary().encode(&plain) {
            Ok(tokens) if tokens.len() == 1 => batches.with_separator(tokens[0]),
            Ok(tokens) => refuse(format!(
                "documents end in one token, these are {}; name one",
                tokens.len()
            )),
            Err(why) => refuse(why.to_string()),
        }
    }

    fn context_method(&self, mesh: &Mesh) -> Result<Option<ContextMethod>> {
        let refuse = |why: String| Err(Error::new(ErrorKind::Input, why));
        let Some(word) = self.cp_method else {
            return Ok(None);
        };
        if mesh.size_of("cp") == 1 {
            return refuse(format!(
                "--cp-method is how mesh axis cp splits a sequence, and the mesh {mesh} has none; --mesh cp=2 would do"
            ));
        }
        match (word, self.cp_exchange) {
            (ContextWord::Ring, None) => Ok(Some(ContextMethod::Ring)),
            (ContextWord::Ulysses, None) => Ok(Some(ContextMethod::Ulysses)),
            (ContextWord::Usp, exchange) => Ok(Some(ContextMethod::Usp { exchange })),
            (_, Some(n)) => refuse(format!(
                "--cp-exchange {n} is for --cp-method usp; in a ring nobody exchanges heads, in ulysses all do"
            )),
        }
    }

    fn config(
        &self,
        recipe: &Recipe,
        vocab: Option<usize>,
        tokens: &Tokens,
        context: usize,
    ) -> Result<Config> {
        let base = &recipe.config;
        let text = tokens.vocabulary().len();
        let vocab = vocab.unwrap_or(text);
        if vocab < text && !self.source.is_empty() {
            return Err(Error::new(
                ErrorKind::Input,
                format!(
                    "--vocab {vocab} is smaller than the {text} tokens of {}",
                    tokens.origin()
                ),
            ));
        }
        let heads = self.heads.unwrap_or(base.heads);
        let hidden = self.hidden.unwrap_or(base.hidden);
        // Unless given, what depends on another number keeps its proportion to it.
        let scaled =
            |part: usize, whole: usize, now: usize| part.saturating_mul(now).div_ceil(whole).max(1);
        let ffn = match hidden == base.hidden {
            true => base.ffn,
            false => scaled(base.ffn, base.hidden, hidden),
        };
        let config = Config {
            layers: self.layers.unwrap_or(base.layers),
            hidden,
            heads,
            kv_heads: self
                .kv_heads
                .unwrap_or_else(|| scaled(base.kv_heads, base.heads, heads)),
            ffn: self.ffn.unwrap_or(ffn),
            vocab,
            context,
            dropout: self.dropout.unwrap_or(base.dropout),
            ..base.clone()
        };
        self.architecture.apply(config)
    }

    fn options(&self, recipe: &Recipe) -> Result<Options> {
        let steps = self.steps.unwrap_or(recipe.steps);
        let lr = self.lr.unwrap_or(recipe.lr);
        let learning_rate = LearningRate::Cosine {
            lr,
            min_lr: lr / 10.0,
            warmup: self.warmup.unwrap_or(recipe.warmup.min(steps / 10)),
            decay: steps,
        };
        learning_rate.check()?;
        Ok(Options {
            steps,
            micro_batch: self.micro_batch,
            schedule: self.schedule,
            virtual_stages: self.virtual_stages,
            zero: self.zero.map(Zero::stage).transpose()?,
            bucket_bytes: self.bucket_bytes,
            learning_rate,
            optimizer: AdamW {
                beta2: recipe.beta2,
                ..AdamW::default()
            },
            eval_every: match self.eval_every {
                Some(0) => None,
                given => given.or(recipe.eval_every),
            },
            checkpoint: self.checkpoint.clone(),
            resume: self.resume,
            sample: self.sample,
            temperature: 0.8,
        })
    }

    fn ghost(&self, mesh: &Mesh, training: &Training, device: Device) -> Result<()> {
        let ghost = self.chips.ghost(mesh, device);
        if self.layout {
            super::progress::print_layout(&training.layout(&ghost)?, self.json);
        }
        let trace = training.trace(&ghost)?;
        if let Some(path) = &self.trace {
            trace.save(path)?;
        }
        super::progress::print_ghost(&trace, training.model.config(), self.json);
        Ok(())
    }
}
