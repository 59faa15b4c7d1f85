//! What a model is made of beyond its sizes: mixtures of experts, and latent attention.

use supernode::model::{Balance, Config, Latent, Mixture, Score};
use supernode::{Error, ErrorKind, Result};

/// Options of the architecture.
#[derive(Debug, clap::Args)]
pub(super) struct Architecture {
    /// Experts of a mixture in place of each feed-forward part
    #[arg(long, value_name = "N", help_heading = "Mixture of experts")]
    experts: Option<usize>,
    /// Experts that a token goes to
    #[arg(
        long,
        value_name = "K",
        default_value_t = 2,
        help_heading = "Mixture of experts"
    )]
    experts_per_token: usize,
    /// Experts that every token goes to
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        help_heading = "Mixture of experts"
    )]
    shared_experts: usize,
    /// Width of an expert; by default that of the feed-forward part
    #[arg(long, value_name = "N", help_heading = "Mixture of experts")]
    expert_ffn: Option<usize>,
    /// Blocks, from the first on, that keep an ordinary feed-forward part
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        help_heading = "Mixture of experts"
    )]
    dense_layers: usize,
    /// How many times its fair share of a sequence an expert takes, the rest is dropped; 0 to drop nothing
    #[arg(
        long,
        value_name = "FACTOR",
        default_value_t = 1.25,
        help_heading = "Mixture of experts"
    )]
    capacity_factor: f32,
    /// What becomes of the router's logits
    #[arg(
        long,
        value_enum,
        default_value = "softmax",
        help_heading = "Mixture of experts"
    )]
    router_score: RouterScore,
    /// What a token's weights are multiplied by
    #[arg(
        long,
        value_name = "FACTOR",
        default_value_t = 1.0,
        help_heading = "Mixture of experts"
    )]
    router_scale: f32,
    /// What keeps the experts' loads even
    #[arg(
        long,
        value_enum,
        default_value = "aux",
        help_heading = "Mixture of experts"
    )]
    balance: BalanceBy,
    /// The auxiliary loss's weight (0.01), or how far a bias moves in a step (0.001)
    #[arg(long, value_name = "NUMBER", help_heading = "Mixture of experts")]
    balance_rate: Option<f32>,

    /// Heads of keys and values of their own, or all from one latent
    #[arg(
        long,
        value_enum,
        default_value = "grouped",
        help_heading = "Attention"
    )]
    attention: AttentionKind,
    /// Elements of the latent that queries come from; without it they come from the residual stream
    #[arg(long, value_name = "N", help_heading = "Attention")]
    q_lora_rank: Option<usize>,
    /// Elements of the latent that keys and values come from
    #[arg(long, value_name = "N", help_heading = "Attention")]
    kv_lora_rank: Option<usize>,
    /// Elements of a head that are turned by their position
    #[arg(long, value_name = "N", help_heading = "Attention")]
    rope_head_dim: Option<usize>,
    /// Elements of a head that are not
    #[arg(long, value_name = "N", help_heading = "Attention")]
    nope_head_dim: Option<usize>,
    /// Elements of a head of values; by default those that are not turned
    #[arg(long, value_name = "N", help_heading = "Attention")]
    v_head_dim: Option<usize>,
}

/// What becomes of the router's logits.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum RouterScore {
    /// Probabilities over all experts
    Softmax,
    /// Each expert by itself
    Sigmoid,
}

/// What keeps loads even.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum BalanceBy {
    /// An auxiliary loss of each sequence
    Aux,
    /// A bias of the choice that moves between steps
    Bias,
    /// Nothing
    Nothing,
}

/// How keys and values are made.
#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
enum AttentionKind {
    /// Heads of their own, each for a group of query heads
    Grouped,
    /// One latent for all heads, as DeepSeek-V2 and V3
    Mla,
}

impl Architecture {
    /// `config` with what these options say.
    pub(super) fn apply(&self, mut config: Config) -> Result<Config> {
        if let Some(experts) = self.experts {
            config.mixture = Some(self.mixture(experts, &config)?);
        } else if let Some(flag) = self.stray_mixture_flag() {
            return Err(Error::new(
                ErrorKind::Input,
                format!("{flag} belongs to a mixture of experts; give --experts too"),
            ));
        }
        match self.attention {
            AttentionKind::Mla => config.latent = Some(self.latent(&config)),
            AttentionKind::Grouped => {
                if let Some(flag) = self.stray_latent_flag() {
                    return Err(Error::new(
                        ErrorKind::Input,
                        format!("{flag} belongs to latent attention; give --attention mla too"),
                    ));
                }
            }
        }
        Ok(config)
    }

    fn stray_mixture_flag(&self) -> Option<&'static str> {
        let given = [
            ("--expert-ffn", self.expert_ffn.is_some()),
            ("--shared-experts", self.shared_experts > 0),
            ("--dense-layers", self.dense_layers > 0),
            ("--balance-rate", self.balance_rate.is_some()),
        ];
        given
            .iter()
            .find(|(_, given)| *given)
            .map(|(flag, _)| *flag)
    }

    fn stray_latent_flag(&self) -> Option<&'static str> {
        let given = [
            ("--q-lora-rank", self.q_lora_rank),
            ("--kv-lora-rank", self.kv_lora_rank),
            ("--rope-head-dim", self.rope_head_dim),
            ("--nope-head-dim", self.nope_head_dim),
            ("--v-head-dim", self.v_head_dim),
        ];
        let found = given.iter().find(|(_, given)| given.is_some());
        found.map(|(flag, _)| *flag)
    }

    fn mixture(&self, experts: usize, config: &Config) -> Result<Mixture> {
        let rate = |standard: f32| self.balance_rate.unwrap_or(standard);
        if let Some(rate) = self.balance_rate.filter(|r| !(r.is_finite() && *r >= 0.0)) {
            return Err(Error::new(
                ErrorKind::Input,
                format!("--balance-rate {rate}: at least 0"),
            ));
        }
        Ok(Mixture {
            shared_experts: self.shared_experts,
            dense_layers: self.dense_layers,
            capacity_factor: (self.capacity_factor != 0.0).then_some(self.capacity_factor),
            score: match self.router_score {
                RouterScore::Softmax => Score::Softmax,
                RouterScore::Sigmoid => Score::Sigmoid,
            },
            scale: self.router_scale,
            balance: match self.balance {
                BalanceBy::Aux => Balance::Auxiliary { weight: rate(0.01) },
                BalanceBy::Bias => Balance::Bias { rate: rate(0.001) },
                BalanceBy::Nothing => Balance::Nothing,
            },
            ..Mixture::new(
                experts,
                self.experts_per_token,
                self.expert_ffn.unwrap_or(config.ffn),
            )
        })
    }

    /// Sizes that are not given keep DeepSeek-V3's proportions: a latent of four heads, half as many turned elements as others.
    fn latent(&self, config: &Config) -> Latent {
        let head = config.head_dim();
        let nope_dim = self.nope_head_dim.unwrap_or(head);
        Latent {
            q_rank: self.q_lora_rank,
            kv_rank: self.kv_lora_rank.unwrap_or(4 * head),
            rope_dim: self
                .rope_head_dim
                .unwrap_or((nope_dim / 2).next_multiple_of(2)),
            nope_dim,
            v_dim: self.v_head_dim.unwrap_or(nope_dim),
        }
    }
}
