//! Continuing texts: prefill runs all prompts at once, then every step draws a token for each and runs it alone, over the
//! cache of what came before.
//!
//! A text longer than the model's context continues from its last tokens, whose positions move with every token: the cache is
//! of no use then, and the window runs again as a whole.

use super::checkpoint::{self, Loaded};
use super::data::{Sampler, Vocabulary};
use super::stages::Stages;
use super::trainer::Training;
use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result};
use crate::mesh::Mesh;
use crate::model::{Config, Part, Past, Transformer};
use crate::pipeline::layers_of_parts;
use crate::spmd::{Chip, Ghost, Run, Threads, Zero};
use crate::trace::Trace;
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// A trained model, as its checkpoint has it. Any mesh may have written it, and any can run it.
#[derive(Debug)]
pub struct Trained {
    config: Config,
    dtype: DType,
    vocabulary: Vocabulary,
    loaded: Arc<Loaded>,
}

/// How to continue texts.
#[derive(Clone, Copy, Debug)]
pub struct Generate {
    /// Tokens to add to each text.
    pub tokens: usize,
    /// What is drawn from the logits.
    pub sampler: Sampler,
}

/// Continued texts, and how long they took.
#[derive(Clone, Debug)]
pub struct Generated {
    /// Token numbers of each text, those of its prompt included.
    pub texts: Vec<Vec<u32>>,
    /// Milliseconds of the prompts, up to the first drawn token.
    pub prefill_ms: f64,
    /// Milliseconds of the other tokens.
    pub decode_ms: f64,
    /// Bytes of keys and values that the chip keeps.
    pub cached_bytes: u64,
}

/// The mesh axes that generating splits over.
const AXES: [&str; 6] = ["dp", "fsdp", "ep", "cp", "tp", "pp"];

/// Draws of several texts are so far apart.
const TEXT: u64 = 1 << 32;

impl Trained {
    /// Opens a checkpoint and reads what the model is and how its tokens are written.
    ///
    /// # Errors
    /// If there is none, it is damaged, or it says nothing of a model or vocabulary that this version knows.
    pub fn open(dir: &Path) -> Result<Self> {
        let loaded = checkpoint::load(dir)?;
        let unknown = |what: &str, why: String| {
            Error::new(
                ErrorKind::Checkpoint,
                format!(
                    "the checkpoint in {} has no {what} that this version knows: {why}",
                    dir.display()
                ),
            )
        };
        fn read<T: serde::de::DeserializeOwned>(value: &Value) -> std::result::Result<T, String> {
            serde_json::from_value(value.clone()).map_err(|e| e.to_string())
        }
        let state = &loaded.state;
        let config = read(&state.model).map_err(|e| unknown("model", e))?;
        let vocabulary = read(&state.data["vocabulary"]).map_err(|e| unknown("vocabulary", e))?;
        let dtype = read(&state.other["dtype"]).map_err(|e| unknown("type of activations", e))?;
        Ok(Trained {
            config,
            dtype,
            vocabulary,
            loaded: Arc::new(loaded),
        })
    }

    /// The model's configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// How tokens are written.
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// The training steps that the model has seen.
    pub fn steps(&self) -> u64 {
        self.loaded.state.step
    }

    /// Activations in another type than in training.
    pub fn with_dtype(mut self, dtype: DType) -> Self {
        self.dtype = dtype;
        self
    }

    /// The model on a mesh.
    ///
    /// # Errors
    /// [`ErrorKind::Mesh`] if the mesh has an axis that inference does not split over, or one that the model does not divide.
    pub fn model(&self, mesh: &Mesh) -> Result<Transformer> {
        let known = |name: &str| AXES.contains(&name);
        let axes = mesh.axes().iter();
        if let Some(axis) = axes.filter(|a| a.size() > 1).find(|a| !known(a.name())) {
            return Err(Error::new(
                ErrorKind::Mesh,
                format!(
                    "generating splits over {}; it does not know mesh axis {}={}",
                    AXES.join(", "),
                    axis.name(),
                    axis.size()
                ),
            ));
        }
        self.parts(mesh)?;
        let model = Transformer::new(self.config.clone(), mesh)?;
        Ok(model.with_dtype(self.dtype).without_capacity())
    }

    /// Which blocks run on which stage of a mesh.
    fn parts(&self, mesh: &Mesh) -> Result<Vec<Part>> {
        let (stages, layers) = (mesh.size_of("pp"), self.config.layers);
        let cut = layers_of_parts(layers, stages).map_err(|_| {
            Error::new(
                ErrorKind::Mesh,
                format!(
                    "mesh axis pp={stages} cuts the model into {stages} stages; its {layers} layers, the embedding and the head \
                     are only {}: pp={} would do",
                    layers + 2,
                    layers + 2
                ),
            )
        })?;
        let part = |(stage, layers)| Part { stage, layers };
        Ok(cut.into_iter().enumerate().map(part).collect())
    }

    /// Continues texts of token numbers on the chips of a world. Every chip draws the same tokens.
    ///
    /// # Errors
    /// What [`Trained::model`] finds; [`ErrorKind::Input`] for a prompt without tokens or with numbers beyond the vocabulary;
    /// logits that are not finite; any chip's failure.
    pub fn generate(
        &self,
        world: &Threads,
        prompts: &[Vec<u32>],
        how: &Generate,
    ) -> Result<Run<Generated>> {
        let (model, parts) = (self.model(world.mesh())?, self.parts(world.mesh())?);
        self.check(prompts)?;
        world.run(|chip| {
            let source = self.loaded.clone();
            chip.restore_from(move |name, shape| {
                let bytes = source.expect(name, DType::F32, shape)?;
                // The file is little endian, and nothing says that it is aligned.
                let number = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                Ok(Some(bytes.chunks_exact(4).map(number).collect()))
            });
            continue_all((&model, &parts), chip, prompts, how)
        })
    }

    /// Traces the same on a ghost of any mesh: its tokens are all 0.
    ///
    /// # Errors
    /// As [`Trained::generate`].
    pub fn trace(&self, ghost: &Ghost, prompts: &[Vec<u32>], how: &Generate) -> Result<Trace> {
        let (model, parts) = (self.model(ghost.mesh())?, self.parts(ghost.mesh())?);
        self.check(prompts)?;
        ghost.trace(|chip| drop(continue_all((&model, &parts), chip, prompts, how)))
    }

    fn check(&self, prompts: &[Vec<u32>]) -> Result<()> {
        let refuse = |why: String| Err(Error::new(ErrorKind::Input, why));
        if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
            return refuse(
                "a prompt without tokens has nothing to continue; give it at least one".into(),
            );
        }
        let v = self.config.vocab;
        match prompts.iter().flatten().find(|&&t| t as usize >= v) {
            Some(token) => refuse(format!(
                "token {token} of a prompt lies beyond the model's vocabulary of {v}"
            )),
            None => Ok(()),
        }
    }
}

fn continue_all(
    model: (&Transformer, &[Part]),
    chip: &Chip,
    prompts: &[Vec<u32>],
    how: &Generate,
) -> Generated {
    if chip.size_of("fsdp") > 1 {
        chip.split_parameters(Zero::Parameters, "fsdp");
    }
    let mut texts = Texts::new(model, chip, prompts.to_vec(), how.tokens);
    let began = Instant::now();
    let since = |began: Instant| began.elapsed().as_secs_f64() * 1e3;
    let mut prefill_ms = 0.0;
    for number in 0..how.tokens {
        texts.add(&how.sampler, number);
        if number == 0 {
            prefill_ms = since(began);
        }
    }
    let generated = Generated {
        decode_ms: since(began) - prefill_ms,
        prefill_ms,
        cached_bytes: chip.cached_bytes(),
        texts: texts.texts,
    };
    chip.forget_caches();
    generated
}

/// Texts under way.
struct Texts<'a> {
    model: &'a Transformer,
    parts: &'a [Part],
    chip: &'a Chip,
    texts: Vec<Vec<u32>>,
    /// Lengths of the texts when the cache was begun; none before the first step, and where windows move.
    cached: Option<Arc<[usize]>>,
    capacity: usize,
}

impl<'a> Texts<'a> {
    fn new(
        (model, parts): (&'a Transformer, &'a [Part]),
        chip: &'a Chip,
        texts: Vec<Vec<u32>>,
        more: usize,
    ) -> Self {
        chip.stop_recording();
        chip.forget_caches();
        let longest = texts.iter().map(Vec::len).max().unwrap_or(0) + more;
        Texts {
            model,
            parts,
            chip,
            texts,
            cached: None,
            capacity: longest.min(model.config().context),
        }
    }

    /// Adds a token to each text, the `number`-th drawn.
    fn add(&mut self, sampler: &Sampler, number: usize) {
        let logits = self.logits();
        let vocab = self.model.config().vocab;
        for (b, text) in self.texts.iter_mut().enumerate() {
            // A ghost has no contents, and no token matters to it.
            let token = logits.as_ref().map_or(0, |all| {
                let row: Vec<f32> = all
                    .index_axis(ndarray::Axis(0), b)
                    .iter()
                    .copied()
                    .take(vocab)
                    .collect();
                let drawn = sampler.draw(b as u64 * TEXT + number as u64, &row);
                drawn.unwrap_or_else(|e| self.chip.fail(e))
            });
            text.push(token);
        }
    }

    /// Logits [b, 1, v padded] behind each text.
    fn logits(&mut self) -> Option<ndarray::ArrayD<f32>> {
        let context = self.model.config().context;
        // Room for the token that this step's logits are of.
        let fits = self.texts.iter().all(|t| t.len() <= context);
        let prompts = self.cached.take().filter(|_| fits);
        let step = prompts.is_some();
        let windows: Vec<&[u32]> = self
            .texts
            .iter()
            .map(|t| match step {
                true => &t[t.len() - 1..],
                false => &t[t.len().saturating_sub(context)..],
            })
            .collect();
        let starts: Vec<usize> = match step {
            true => self.texts.iter().map(|t| t.len() - 1).collect(),
            false => vec![0; self.texts.len()],
        };
        if !step {
            self.chip.forget_caches();
        }
        let lengths = || windows.iter().map(|w| w.len()).collect();
        let prompts = prompts.unwrap_or_else(lengths);
        let (b, n) = (
            windows.len(),
            windows.iter().map(|w| w.len()).max().unwrap_or(0),
        );
        let last: Vec<usize> = windows.iter().map(|w| w.len() - 1).collect();
        let padded = windows.iter().flat_map(|w| {
            let padding = std::iter::repeat_n(0, n - w.len());
            w.iter().copied().chain(padding)
        });
        let padded: Vec<u32> = padded.collect();
        self.cached = fits.then(|| prompts.clone());
        let past = Past {
            starts: starts.into(),
            prompts,
            capacity: self.capacity.max(n),
        };
        let (model, chip) = (self.model, self.chip);
        let scope = if step { "decode" } else { "prefill" };
        chip.scope(scope, || {
            let tokens = model.prompts(chip, [b, n], &past, &padded);
            let logits = model.next_logits(chip, &tokens, self.parts, &past, &last);
            logits.gather().read()
        })
    }
}

impl Training {
    /// Tokens that the model continues the validation split's first token with. Every chip draws the same ones.
    pub(super) fn sample(&self, chip: &Chip, stages: &Stages) -> Vec<u32> {
        let sampler = Sampler::new(chip.seed(), self.options.temperature, None)
            .unwrap_or_else(|e| chip.fail(e));
        let start = self
            .batches
            .split()
            .validation
            .start
            .min(self.batches.tokens().len() - 1);
        let mut text = vec![0u32; 1];
        self.batches.tokens().copy(start, &mut text);
        let model = self.model.clone().without_capacity();
        let parts = stages.parts();
        let mut texts = Texts::new((&model, &parts), chip, vec![text], self.options.sample);
        for number in 0..self.options.sample {
            texts.add(&sampler, number);
        }
        chip.forget_caches();
        texts.texts.swap_remove(0)
    }
}
