//! A model of a Hugging Face `config.json`, dense or a mixture, by the names that the families of GPT-2, Llama, Mixtral, Qwen,
//! DeepSeek and their like use.

use super::super::architecture::{Architecture, Latent, Mixture, Window};
use crate::error::{Error, ErrorKind, Result};
use serde_json::Value;

fn wrong(why: String) -> Error {
    Error::new(ErrorKind::Input, why)
}

/// The entries of a file. Those of a model that also sees or hears stand one level deeper.
struct Entries<'a>(&'a Value);

impl Entries<'_> {
    fn find(&self, keys: &[&str]) -> Result<Option<usize>> {
        let present = |key: &&&str| self.0.get(**key).is_some_and(|v| !v.is_null());
        let Some(key) = keys.iter().find(present) else {
            return Ok(None);
        };
        let value = &self.0[*key];
        match value.as_u64() {
            Some(n) => Ok(Some(n as usize)),
            None => Err(wrong(format!("{key} = {value} is no whole number"))),
        }
    }

    fn need(&self, keys: &[&str]) -> Result<usize> {
        self.find(keys)?
            .ok_or_else(|| wrong(format!("has no {}", keys.join(" or "))))
    }

    fn flag(&self, key: &str) -> Option<bool> {
        self.0.get(key).and_then(Value::as_bool)
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(Value::as_str)
    }
}

/// Reads the text of a `config.json`.
///
/// # Errors
/// [`ErrorKind::Input`] with the entry that is missing or not understood.
pub(super) fn read(text: &str) -> Result<Architecture> {
    let json: Value = serde_json::from_str(text).map_err(|e| wrong(format!("is no JSON: {e}")))?;
    if !json.is_object() {
        return Err(wrong("is no JSON object".into()));
    }
    let inner = json.get("text_config").filter(|v| v.is_object());
    let e = Entries(inner.unwrap_or(&json));
    let layers = e.need(&["num_hidden_layers", "n_layer", "num_layers", "n_layers"])?;
    let hidden = e.need(&["hidden_size", "n_embd", "d_model"])?;
    let heads = e.need(&["num_attention_heads", "n_head", "n_heads"])?;
    let vocab = e.need(&["vocab_size"])?;
    let context = e.need(&[
        "max_position_embeddings",
        "n_positions",
        "n_ctx",
        "seq_length",
        "max_seq_len",
    ])?;
    let old = e.0.get("n_embd").is_some();
    let kv_heads = match e.find(&["num_key_value_heads", "n_head_kv", "num_kv_heads"])? {
        Some(n) => n,
        None if e.flag("multi_query") == Some(true) => 1,
        None => heads,
    };
    let head_dim = match e.find(&["head_dim"])? {
        Some(d) => d,
        None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let why =
                format!("has no head_dim, and hidden {hidden} is not divisible by {heads} heads");
            return Err(wrong(why));
        }
    };
    let mixture = mixture(&e)?;
    let ffn = match e.find(&["intermediate_size", "n_inner", "ffn_dim"])? {
        Some(ffn) => ffn,
        None if old => 4 * hidden,
        None => match mixture {
            Some(m) => m.ffn,
            None => e.need(&["intermediate_size"])?,
        },
    };
    let tied = e.flag("tie_word_embeddings").unwrap_or(old);
    let architecture = Architecture {
        layers,
        hidden,
        heads,
        kv_heads,
        head_dim,
        ffn,
        gated: gated(&e, old)?,
        vocab,
        context,
        bias: old || e.flag("attention_bias").unwrap_or(false),
        tied,
        rotary: !old,
        latent: latent(&e)?,
        mixture,
        window: window(&e)?,
        predicted: e.find(&["num_nextn_predict_layers"])?.unwrap_or(0),
    };
    architecture.check()?;
    Ok(architecture)
}

/// Whether the activation stands behind a gate: the families that use SiLU always have one, those with other activations not.
fn gated(e: &Entries<'_>, old: bool) -> Result<bool> {
    let family = e.text("model_type").unwrap_or("");
    let names = ["hidden_act", "activation_function", "hidden_activation"];
    match names.iter().find_map(|n| e.text(n)) {
        None => Ok(!old),
        Some("silu" | "swish" | "swiglu") => Ok(true),
        Some("gelu" | "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" | "gelu_tanh") => {
            Ok(family.starts_with("gemma"))
        }
        Some("relu" | "relu2") => Ok(false),
        Some(other) => Err(wrong(format!(
            "hidden_act '{other}' is not known; silu, gelu, gelu_new, gelu_pytorch_tanh, relu and relu2 are"
        ))),
    }
}

fn latent(e: &Entries<'_>) -> Result<Option<Latent>> {
    let Some(kv_rank) = e.find(&["kv_lora_rank"])? else {
        return Ok(None);
    };
    Ok(Some(Latent {
        q_rank: e.find(&["q_lora_rank"])?.unwrap_or(0),
        kv_rank,
        nope: e.need(&["qk_nope_head_dim"])?,
        rope: e.need(&["qk_rope_head_dim"])?,
        value: e.need(&["v_head_dim"])?,
    }))
}

fn mixture(e: &Entries<'_>) -> Result<Option<Mixture>> {
    let names = [
        "num_local_experts",
        "num_experts",
        "n_routed_experts",
        "num_routed_experts",
        "moe_num_experts",
    ];
    let Some(experts) = e.find(&names)?.filter(|n| *n > 1) else {
        return Ok(None);
    };
    let per_token = e.need(&[
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_k",
        "top_k",
    ])?;
    let ffn = e.need(&[
        "moe_intermediate_size",
        "expert_ffn_size",
        "intermediate_size",
    ])?;
    let shared = e
        .find(&[
            "n_shared_experts",
            "num_shared_experts",
            "num_shared_expert",
        ])?
        .unwrap_or(0);
    let shared_ffn = e.find(&["shared_expert_intermediate_size"])?;
    let every = e.find(&[
        "decoder_sparse_step",
        "moe_layer_freq",
        "interleave_moe_layer_step",
    ])?;
    Ok(Some(Mixture {
        experts,
        per_token,
        shared,
        ffn,
        shared_ffn: shared_ffn.unwrap_or(shared * ffn),
        dense_layers: e
            .find(&["first_k_dense_replace", "moe_layer_start_index"])?
            .unwrap_or(0),
        every: every.unwrap_or(1).max(1),
        groups: e.find(&["n_group"])?.unwrap_or(1).max(1),
        groups_per_token: e.find(&["topk_group"])?.unwrap_or(1).max(1),
    }))
}

/// A window counts if the model uses it, on the layers whose type says so.
fn window(e: &Entries<'_>) -> Result<Option<Window>> {
    let Some(tokens) = e.find(&["sliding_window"])? else {
        return Ok(None);
    };
    let types = e.0.get("layer_types").and_then(Value::as_array);
    let share = match types {
        Some(types) if !types.is_empty() => {
            let near = types
                .iter()
                .filter(|t| t.as_str() == Some("sliding_attention"))
                .count();
            near as f64 / types.len() as f64
        }
        _ if e.flag("use_sliding_window") == Some(false) => 0.0,
        _ => 1.0,
    };
    Ok((share > 0.0 && tokens > 0).then_some(Window { tokens, share }))
}

#[cfg(test)]
mod tests {
    use super::super::named;
    use super::*;

    const LLAMA: &str = r#"{"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192, "hidden_act": "silu"}"#;

    fn with(more: &str) -> Result<Architecture> {
        read(&LLAMA.replacen('{', &format!("{{{more}, "), 1))
    }

    #[test]
    fn dense_files_are_read() {
        assert_eq!(read(LLAMA).unwrap(), named("llama3-8b").unwrap());
        let gpt2 = r#"{"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024,
            "activation_function": "gelu_new"}"#;
        let parameters = read(gpt2).unwrap().parameters() / 1e6;
        assert!((parameters / 124.4 - 1.0).abs() <= 0.01, "{parameters}");
        let wide = with(r#""head_dim": 256"#).unwrap();
        assert_eq!(wide.head_dim, 256);
        let near = with(
            r#""sliding_window": 4096, "layer_types": ["sliding_attention", "full_attention"]"#,
        )
        .unwrap();
        assert_eq!(near.window.unwrap().share, 0.5);
        assert!(near.seen(8192, false) < 4096.0);
    }

    #[test]
    fn mixtures_are_read() {
        let mixtral = r#"{"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 14336, "vocab_size": 32000, "max_position_embeddings": 32768, "hidden_act": "silu",
            "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": null}"#;
        let mixtral = read(mixtral).unwrap();
        let (all, active) = (
            mixtral.parameters() / 1e9,
            mixtral.active_parameters() / 1e9,
        );
        assert!((all / 46.7 - 1.0).abs() <= 0.01, "{all}");
        assert!((active / 12.9 - 1.0).abs() <= 0.01, "{active}");
        let deepseek = r#"{"num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128, "num_key_value_heads": 128,
            "intermediate_size": 18432, "moe_intermediate_size": 2048, "vocab_size": 129280, "max_position_embeddings": 4096,
            "hidden_act": "silu", "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1,
            "first_k_dense_replace": 3, "moe_layer_freq": 1, "n_group": 8, "topk_group": 4, "q_lora_rank": 1536,
            "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "head_dim": 128,
            "num_nextn_predict_layers": 1}"#;
        assert_eq!(read(deepseek).unwrap(), named("deepseek-v3").unwrap());
    }

    #[test]
    fn mistakes_name_the_entry() {
        for (text, word) in [
            (LLAMA.replace("\"vocab_size\": 128256, ", ""), "vocab_size"),
            (LLAMA.replace("silu", "cosine"), "cosine"),
            (LLAMA.replace("4096", "\"wide\""), "hidden_size"),
            (LLAMA.replace("4096", "4095"), "head_dim"),
            ("[]".into(), "object"),
            (
                LLAMA.replacen('{', "{\"num_experts\": 8, ", 1),
                "num_experts_per_tok",
            ),
        ] {
            let why = read(&text).unwrap_err().to_string();
            assert!(why.contains(word), "{why}");
        }
        let why = named("llama4").unwrap_err().to_string();
        assert!(why.contains("llama3-8b"), "{why}");
    }
}
