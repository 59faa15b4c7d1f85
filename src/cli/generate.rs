//! `supernode generate`: a trained model continues texts, on any mesh.

use super::chips::Chips;
use super::output::{print_text, tell};
use serde_json::json;
use std::path::PathBuf;
use supernode::files;
use supernode::mesh::Mesh;
use supernode::spmd::Device;
use supernode::train::data::{Sampler, Vocabulary};
use supernode::train::{Generate, Generated, Trained};
use supernode::{DType, Error, ErrorKind, Result};

/// Arguments of `generate`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Directory of the checkpoint, written by `train` on any mesh
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// Text to continue; several are continued together
    #[arg(long, value_name = "TEXT", required_unless_present = "prompt_file")]
    prompt: Vec<String>,
    /// File with a text to continue
    #[arg(long, value_name = "FILE")]
    prompt_file: Vec<PathBuf>,
    /// Tokens to add to each text
    #[arg(long, default_value_t = 100, value_name = "N")]
    tokens: usize,
    /// 1 samples what the model says, less is bolder, 0 takes the likeliest token
    #[arg(
        long,
        default_value_t = 0.8,
        value_name = "T",
        allow_negative_numbers = true
    )]
    temperature: f64,
    /// Sample among so many of the likeliest tokens only
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Seed of the draws: the same text for the same seed, on every mesh
    #[arg(long, default_value_t = 1337, value_name = "N")]
    seed: u64,

    /// Chips by axis, such as `tp=2` or `dp=2,tp=2`: sequences are split over dp, fsdp and ep, heads over tp, a
    /// sequence's tokens over cp, layers over pp
    #[arg(long, value_name = "AXIS=N,..")]
    mesh: Option<String>,
    /// What chips are: cpu
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: String,
    #[command(flatten)]
    chips: Chips,
    /// Type of activations and of the cache; by default that of the training
    #[arg(long, value_name = "f32|bf16")]
    dtype: Option<DType>,
    /// Write the trace, for this crate and for Perfetto or Chrome
    #[arg(long, value_name = "OUT.json")]
    trace: Option<PathBuf>,
    /// Print one JSON object a text
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(super) fn run(a: &Arguments) -> Result<()> {
    let mesh = a
        .mesh
        .as_deref()
        .map_or_else(|| Ok(Mesh::single()), Mesh::parse)?;
    let device = Device::parse(&a.device)?;
    let mut trained = Trained::open(&a.checkpoint)?;
    if let Some(dtype) = a.dtype {
        if !matches!(dtype, DType::F32 | DType::Bf16) {
            return Err(Error::new(
                ErrorKind::Input,
                format!("--dtype {dtype}: a model computes in f32 or bf16"),
            ));
        }
        trained = trained.with_dtype(dtype);
    }
    let prompts = a.prompts(trained.vocabulary())?;
    let how = Generate {
        tokens: a.tokens,
        sampler: Sampler::new(a.seed, a.temperature, a.top_k)?,
    };
    let world = a.chips.world(&mesh, device, a.seed)?;
    let run = trained.generate(&world, &prompts, &how)?;
    if let Some(path) = &a.trace {
        run.trace().save(path)?;
    }
    a.print(trained.vocabulary(), &prompts, &run.outputs()[0]);
    Ok(())
}

impl Arguments {
    fn prompts(&self, vocabulary: &Vocabulary) -> Result<Vec<Vec<u32>>> {
        let mut texts = self.prompt.clone();
        for path in &self.prompt_file {
            let text = files::read_text(path, files::DESCRIPTION).map_err(|e| {
                let what = format!("cannot read the prompt {}: {e}", path.display());
                Error::new(ErrorKind::Io, what)
            })?;
            texts.push(text);
        }
        let encoded = texts.iter().map(|t| vocabulary.encode(t));
        encoded.collect()
    }

    fn print(&self, vocabulary: &Vocabulary, prompts: &[Vec<u32>], done: &Generated) {
        let (texts, more) = (done.texts.len(), self.tokens);
        for (prompt, tokens) in prompts.iter().zip(&done.texts) {
            let text = vocabulary.decode(tokens);
            if self.json {
                let line = json!({
                    "prompt": vocabulary.decode(prompt), "text": text, "tokens": tokens,
                    "new_tokens": more, "prefill_ms": done.prefill_ms, "decode_ms": done.decode_ms,
                });
                print_text(&format!("{line}\n"));
            } else {
                print_text(&format!("{text}\n"));
            }
        }
        let read: usize = prompts.iter().map(Vec::len).sum();
        let later = (more.saturating_sub(1) * texts) as f64;
        tell(&format!(
            "{read} tokens read in {:.1} ms, {} drawn{}; a cache of {} bytes per chip",
            done.prefill_ms,
            more * texts,
            match later > 0.0 {
                true => format!(", {:.1} a second", later / done.decode_ms * 1e3),
                false => String::new(),
            },
            done.cached_bytes
        ));
    }
}
