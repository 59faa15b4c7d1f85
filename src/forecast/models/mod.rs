//! Models with a name, and those of a Hugging Face `config.json`.

mod json;

use super::architecture::{Architecture, Latent, Mixture};
use crate::error::{Error, ErrorKind, Result};
use crate::files;

/// Name, layers, hidden, heads of Megatron's models: Narayanan et al. 2021 (arXiv:2104.04473), table 1, and 22B of Korthikanti et
/// al. 2022 (arXiv:2205.05198). GPT-2's architecture, 51200 tokens of vocabulary, context 2048.
const MEGATRON: [(&str, usize, usize, usize); 11] = [
    ("megatron-1.7b", 24, 2304, 24),
    ("megatron-3.6b", 30, 3072, 32),
    ("megatron-7.5b", 36, 4096, 32),
    ("megatron-18b", 40, 6144, 48),
    ("megatron-22b", 48, 6144, 64),
    ("megatron-39b", 48, 8192, 64),
    ("megatron-76b", 60, 10240, 80),
    ("megatron-145b", 80, 12288, 96),
    ("megatron-310b", 96, 16384, 128),
    ("megatron-530b", 105, 20480, 128),
    ("megatron-1t", 128, 25600, 160),
];

/// Name, layers, hidden, heads, kv heads, ffn, vocabulary, context: Llama 3 (arXiv:2407.21783, table 3), Pangu Ultra
/// (arXiv:2504.07866).
const LLAMA: [(&str, [usize; 7]); 4] = [
    ("llama3-8b", [32, 4096, 32, 8, 14336, 128_256, 8192]),
    ("llama3-70b", [80, 8192, 64, 8, 28672, 128_256, 8192]),
    ("llama3-405b", [126, 16384, 128, 8, 53248, 128_256, 8192]),
    ("pangu-ultra-135b", [94, 12288, 96, 8, 28672, 153_376, 8192]),
];

/// Nemotron-4 15B (arXiv:2402.16819) and 340B (arXiv:2406.11704): squared ReLU, no biases.
const NEMOTRON: [(&str, [usize; 7]); 2] = [
    ("nemotron4-15b", [32, 6144, 48, 8, 24576, 256_000, 4096]),
    ("nemotron4-340b", [96, 18432, 96, 8, 73728, 256_000, 4096]),
];

/// The names that [`named`] knows.
pub fn names() -> Vec<&'static str> {
    let mut names = vec!["gpt3-175b"];
    names.extend(MEGATRON.iter().map(|m| m.0));
    names.extend(LLAMA.iter().map(|m| m.0));
    names.extend(NEMOTRON.iter().map(|m| m.0));
    names.extend(["deepseek-v3", "pangu-ultra-moe"]);
    names
}

/// DeepSeek-V3 (arXiv:2412.19437, section 4.2) and Pangu Ultra MoE (arXiv:2505.04519), which is built like it.
fn latent_mixture(name: &str) -> Option<Architecture> {
    let (hidden, vocab, groups, groups_per_token) = match name {
        "deepseek-v3" => (7168, 129_280, 8, 4),
        "pangu-ultra-moe" => (7680, 153_376, 1, 1),
        _ => return None,
    };
    Some(Architecture {
        layers: 61,
        hidden,
        heads: 128,
        kv_heads: 128,
        head_dim: 128,
        ffn: 18432,
        gated: true,
        vocab,
        context: 4096,
        bias: false,
        tied: false,
        rotary: true,
        latent: Some(Latent {
            q_rank: 1536,
            kv_rank: 512,
            nope: 128,
            rope: 64,
            value: 128,
        }),
        mixture: Some(Mixture {
            experts: 256,
            per_token: 8,
            shared: 1,
            ffn: 2048,
            shared_ffn: 2048,
            dense_layers: 3,
            every: 1,
            groups,
            groups_per_token,
        }),
        window: None,
        predicted: 1,
    })
}

/// Layers, hidden, heads, kv heads, ffn, vocabulary, context of a dense model.
fn dense([layers, hidden, heads, kv_heads, ffn, vocab, context]: [usize; 7]) -> Architecture {
    Architecture {
        layers,
        hidden,
        heads,
        kv_heads,
        head_dim: hidden / heads,
        ffn,
        gated: true,
        vocab,
        context,
        bias: false,
        tied: false,
        rotary: true,
        latent: None,
        mixture: None,
        window: None,
        predicted: 0,
    }
}

/// GPT-2's architecture: learned positions, biases, tied embeddings, four times the width in the feed-forward part.
fn gpt(layers: usize, hidden: usize, heads: usize) -> Architecture {
    Architecture {
        gated: false,
        bias: true,
        tied: true,
        rotary: false,
        ..dense([layers, hidden, heads, heads, 4 * hidden, 51200, 2048])
    }
}

/// A model by its name, or of a `config.json` by its path.
///
/// # Errors
/// [`ErrorKind::Input`] with the names that there are, or with the file and the entry that is missing or not understood;
/// [`ErrorKind::Io`] for a file that cannot be read.
pub fn named(name: &str) -> Result<Architecture> {
    if name.ends_with(".json") {
        let text = files::read_text(name.as_ref(), files::DESCRIPTION)
            .map_err(|e| Error::new(ErrorKind::Io, format!("cannot read the model {name}: {e}")))?;
        return json::read(&text).map_err(|e| e.within(name));
    }
    if name == "gpt3-175b" {
        return Ok(gpt(96, 12288, 96));
    }
    if let Some((_, layers, hidden, heads)) = MEGATRON.iter().find(|m| m.0 == name) {
        return Ok(gpt(*layers, *hidden, *heads));
    }
    if let Some((_, sizes)) = LLAMA.iter().find(|m| m.0 == name) {
        return Ok(dense(*sizes));
    }
    if let Some((_, sizes)) = NEMOTRON.iter().find(|m| m.0 == name) {
        return Ok(Architecture {
            gated: false,
            ..dense(*sizes)
        });
    }
    latent_mixture(name).ok_or_else(|| {
        Error::new(
            ErrorKind::Input,
            format!(
                "there is no model '{name}'; there are {}, or a config.json by its path",
                names().join(", ")
            ),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parameters as the papers count them.
    #[test]
    fn named_models_have_their_size() {
        for (name, billions) in [
            ("gpt3-175b", 175.0),
            ("megatron-22b", 22.0),
            ("megatron-530b", 530.0),
            ("megatron-1t", 1008.0),
            ("llama3-8b", 8.03),
            ("llama3-70b", 70.6),
            ("llama3-405b", 405.9),
            ("pangu-ultra-135b", 135.0),
            ("nemotron4-15b", 15.6),
            ("nemotron4-340b", 341.0),
            ("deepseek-v3", 671.0),
            ("pangu-ultra-moe", 718.0),
        ] {
            let parameters = named(name).unwrap().parameters() / 1e9;
            assert!(
                (parameters / billions - 1.0).abs() <= 0.02,
                "{name}: {parameters}"
            );
        }
        let all: Vec<_> = names()
            .into_iter()
            .map(named)
            .collect::<Result<_>>()
            .unwrap();
        assert_eq!(all.len(), 20);
        let active = named("deepseek-v3").unwrap().active_parameters() / 1e9;
        assert!((active / 37.0 - 1.0).abs() <= 0.03, "{active}");
    }
}
