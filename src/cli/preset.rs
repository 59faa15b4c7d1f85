//! Models and recipes with a name.

use clap::ValueEnum;
use supernode::model::Config;

/// A model with the way to train it; every number can be overridden.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Preset {
    /// nanoGPT's CPU recipe: 4 layers, 128 wide, 4 heads, 64 tokens, batch 12, 2000 steps.
    NanogptCpu,
    /// GPT-2 with 124 million parameters: 12 layers, 768 wide, 12 heads, 1024 tokens.
    #[value(name = "gpt2-124m")]
    Gpt2124m,
    /// A small Llama: 4 layers, 256 wide, 8 heads over 4 key heads, 256 tokens.
    LlamaTiny,
    /// nanoGPT's character model: 6 layers, 384 wide, 6 heads, 256 tokens.
    #[value(name = "char-6x384")]
    Char6x384,
    /// GPT-3 with 175 billion parameters: 96 layers, 12288 wide, 96 heads, 2048 tokens. For `--ghost`.
    #[value(name = "gpt3-175b")]
    Gpt3175b,
}

/// What a preset says.
pub(super) struct Recipe {
    pub config: Config,
    /// The model's vocabulary; that of the text if none.
    pub vocab: Option<usize>,
    pub batch: usize,
    pub steps: u64,
    pub lr: f64,
    pub warmup: u64,
    pub beta2: f32,
    pub eval_every: Option<u64>,
}

impl Preset {
    /// The recipe. Its learning rate falls to a tenth; decay, clipping and the first beta are the same for all.
    pub(super) fn recipe(self) -> Recipe {
        let any = 1;
        let small = |config, batch| Recipe {
            config,
            vocab: None,
            batch,
            steps: 2000,
            lr: 1e-3,
            warmup: 100,
            beta2: 0.99,
            eval_every: Some(250),
        };
        let large = |config: Config, batch, lr| Recipe {
            vocab: Some(config.vocab),
            config,
            batch,
            steps: 1000,
            lr,
            warmup: 100,
            beta2: 0.95,
            eval_every: None,
        };
        match self {
            Preset::NanogptCpu => small(Config::nanogpt(4, 128, 4, any, 64), 12),
            Preset::LlamaTiny => small(Config::llama(4, 256, 8, 4, any, 256), 8),
            Preset::Char6x384 => small(Config::nanogpt(6, 384, 6, any, 256), 16),
            Preset::Gpt2124m => large(Config::gpt2(12, 768, 12, 50_257, 1024), 4, 6e-4),
            Preset::Gpt3175b => large(Config::gpt2(96, 12_288, 96, 50_257, 2048), 8, 6e-5),
        }
    }
}
