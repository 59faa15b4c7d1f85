//! Models with a name, and those of a Hugging Face `config.json`.

use crate::error::{Error, ErrorKind, Result};
use crate::model::{Config, FeedForward, Norm};
use serde_json::Value;

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
    names
}

/// A model by its name, or of a `config.json` by its path.
///
/// # Errors
/// [`ErrorKind::Input`] with the names that there are, or with the file and the entry that is missing or not understood;
/// [`ErrorKind::Io`] for a file that cannot be read.
pub fn named(name: &str) -> Result<Config> {
    if name.ends_with(".json") {
        let text = std::fs::read_to_string(name)
            .map_err(|e| Error::new(ErrorKind::Io, format!("cannot read the model {name}: {e}")))?;
        return from_json(&text).map_err(|e| e.within(name));
    }
    if name == "gpt3-175b" {
        return Ok(Config::gpt2(96, 12288, 96, 51200, 2048));
    }
    if let Some((_, layers, hidden, heads)) = MEGATRON.iter().find(|m| m.0 == name) {
        return Ok(Config::gpt2(*layers, *hidden, *heads, 51200, 2048));
    }
    if let Some((_, [l, c, h, kv, f, v, t])) = LLAMA.iter().find(|m| m.0 == name) {
        return Ok(Config {
            ffn: *f,
            ..Config::llama(*l, *c, *h, *kv, *v, *t)
        });
    }
    if let Some((_, [l, c, h, kv, f, v, t])) = NEMOTRON.iter().find(|m| m.0 == name) {
        let llama = Config {
            ffn: *f,
            ..Config::llama(*l, *c, *h, *kv, *v, *t)
        };
        return Ok(Config {
            feed_forward: FeedForward::Relu2,
            norm: Norm::LayerNorm,
            ..llama
        });
    }
    let why = match name {
        "deepseek-v3" | "pangu-ultra-moe" => {
            format!("'{name}' is a mixture of experts, which the forecast does not price yet")
        }
        _ => format!("there is no model '{name}'"),
    };
    Err(Error::new(
        ErrorKind::Input,
        format!(
            "{why}; there are {}, or a config.json by its path",
            names().join(", ")
        ),
    ))
}

/// Reads the text of a `config.json`, by the names of Llama's and of GPT-2's family.
fn from_json(text: &str) -> Result<Config> {
    let wrong = |why: String| Error::new(ErrorKind::Input, why);
    let json: Value = serde_json::from_str(text).map_err(|e| wrong(format!("is no JSON: {e}")))?;
    let find = |keys: &[&str]| {
        keys.iter()
            .find_map(|k| json.get(*k)?.as_u64())
            .map(|n| n as usize)
    };
    let need =
        |keys: &[&str]| find(keys).ok_or_else(|| wrong(format!("has no {}", keys.join(" or "))));
    let experts = ["num_local_experts", "num_experts", "n_routed_experts"];
    if find(&experts).is_some_and(|n| n > 1) {
        let why = "is a mixture of experts, which the forecast does not price yet";
        return Err(wrong(why.into()));
    }
    let layers = need(&["num_hidden_layers", "n_layer"])?;
    let hidden = need(&["hidden_size", "n_embd"])?;
    let heads = need(&["num_attention_heads", "n_head"])?;
    let vocab = need(&["vocab_size"])?;
    let context = need(&["max_position_embeddings", "n_positions"])?;
    if heads == 0 || find(&["head_dim"]).is_some_and(|d| d * heads != hidden) {
        return Err(wrong(format!(
            "{heads} heads of head_dim {:?} do not make hidden {hidden}, which the forecast needs",
            find(&["head_dim"])
        )));
    }
    let tied = json.get("tie_word_embeddings").and_then(Value::as_bool);
    if json.get("n_embd").is_some() {
        let ffn = find(&["n_inner"]).unwrap_or(4 * hidden);
        let gpt2 = Config::gpt2(layers, hidden, heads, vocab, context);
        return Ok(Config {
            ffn,
            tied: tied.unwrap_or(true),
            ..gpt2
        });
    }
    let kv_heads = find(&["num_key_value_heads"]).unwrap_or(heads);
    let ffn = need(&["intermediate_size"])?;
    let feed_forward = match json.get("hidden_act").and_then(Value::as_str) {
        None | Some("silu" | "swish") => FeedForward::SwiGlu,
        Some("relu2") => FeedForward::Relu2,
        Some("gelu") => FeedForward::GeluErf,
        Some("gelu_new" | "gelu_pytorch_tanh") => FeedForward::GeluTanh,
        Some(other) => return Err(wrong(format!("hidden_act '{other}' is not known"))),
    };
    let llama = Config::llama(layers, hidden, heads, kv_heads, vocab, context);
    Ok(Config {
        ffn,
        feed_forward,
        tied: tied.unwrap_or(false),
        ..llama
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
        ] {
            let parameters = named(name).unwrap().parameters() as f64 / 1e9;
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
        assert_eq!(all.len(), 18);
    }

    #[test]
    fn config_files_are_read() {
        let text = r#"{"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192, "hidden_act": "silu"}"#;
        assert_eq!(from_json(text).unwrap(), named("llama3-8b").unwrap());
        let without = text.replace("\"vocab_size\": 128256, ", "");
        assert!(
            from_json(&without)
                .unwrap_err()
                .to_string()
                .contains("vocab_size")
        );
        let experts = text.replace('{', "{\"num_local_experts\": 8, ");
        assert!(
            from_json(&experts)
                .unwrap_err()
                .to_string()
                .contains("mixture")
        );
        assert!(
            named("llama4")
                .unwrap_err()
                .to_string()
                .contains("llama3-8b")
        );
    }
}
