//! This crate's own kernels, by name.

use super::shader::Kernel;

macro_rules! kernels {
    ($($constant:ident $name:literal),* $(,)?) => {
        $(pub(crate) const $constant: Kernel = Kernel {
            name: $name,
            source: include_str!(concat!("../../shaders/", $name, ".wgsl")),
        };)*

        /// All of them.
        pub(crate) const ALL: &[Kernel] = &[$($constant),*];
    };
}

kernels! {
    ACTIVATION "activation",
    ACTIVATION_BACKWARD "activation_backward",
    ADAMW "adamw",
    ADD "add",
    ADD_BIAS "add_bias",
    ATTENTION "attention",
    ATTENTION_DELTA "attention_delta",
    ATTENTION_DKV "attention_dkv",
    ATTENTION_DKV_LANES "attention_dkv_lanes",
    ATTENTION_DQ "attention_dq",
    ATTENTION_DQ_LANES "attention_dq_lanes",
    ATTENTION_JOIN "attention_join",
    ATTENTION_LANES "attention_lanes",
    ATTENTION_MERGE "attention_merge",
    BALANCE_BIAS "balance_bias",
    BALANCE_LOSS "balance_loss",
    BALANCE_LOSS_BACKWARD "balance_loss_backward",
    BALANCE_SLOPES "balance_slopes",
    CAST "cast",
    CLIP_FACTOR "clip_factor",
    COLUMN_SUM "column_sum",
    COUNT_LABELS "count_labels",
    CROSS_ENTROPY_GRADIENT "cross_entropy_gradient",
    DROPOUT "dropout",
    EMBEDDING "embedding",
    EMBEDDING_BACKWARD "embedding_backward",
    EXPERT_LOAD "expert_load",
    FILL "fill",
    JOIN_HEADS "join_heads",
    LOSSES "losses",
    MATMUL "matmul",
    MATMUL_LANES "matmul_lanes",
    MATMUL_MATRICES "matmul_matrices",
    MATMUL_MERGE "matmul_merge",
    MIX_BY_ORIGIN "mix_by_origin",
    MIX_BY_SLOT "mix_by_slot",
    MIX_DOTS "mix_dots",
    MULTIPLY "multiply",
    NORM "norm",
    NORM_BACKWARD "norm_backward",
    NORM_WEIGHT "norm_weight",
    PACK "pack",
    PEAK "peak",
    PLACE "place",
    PUT "put",
    RATIO "ratio",
    ROTARY "rotary",
    ROUTE "route",
    ROUTE_BACKWARD "route_backward",
    ROW_EXP_SUM "row_exp_sum",
    ROW_MAX "row_max",
    SCALE "scale",
    SGD "sgd",
    SIGMOID "sigmoid",
    SIGMOID_BACKWARD "sigmoid_backward",
    SLOTS "slots",
    SOFTMAX "softmax",
    SOFTMAX_BACKWARD "softmax_backward",
    SUM "sum",
    SUM_SHARED "sum_shared",
    SWIGLU "swiglu",
    SWIGLU_DGATE "swiglu_dgate",
    SWIGLU_DUP "swiglu_dup",
    TAKE "take",
    TRANSPOSE "transpose",
    WRITE_TOKENS "write_tokens",
}
