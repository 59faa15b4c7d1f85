//! The sheets that are part of the crate.

pub(super) const CHIPS: [(&str, &str); 13] = [
    ("a100", include_str!("chips/a100.toml")),
    ("ascend-910b", include_str!("chips/ascend-910b.toml")),
    ("ascend-910c", include_str!("chips/ascend-910c.toml")),
    ("ascend-920", include_str!("chips/ascend-920.toml")),
    ("ascend-950dt", include_str!("chips/ascend-950dt.toml")),
    ("ascend-950pr", include_str!("chips/ascend-950pr.toml")),
    ("ascend-960", include_str!("chips/ascend-960.toml")),
    ("ascend-970", include_str!("chips/ascend-970.toml")),
    ("gb200", include_str!("chips/gb200.toml")),
    ("h100", include_str!("chips/h100.toml")),
    ("h200", include_str!("chips/h200.toml")),
    ("h800", include_str!("chips/h800.toml")),
    ("rubin", include_str!("chips/rubin.toml")),
];

pub(super) const SYSTEMS: [(&str, &str); 12] = [
    ("dgx-a100", include_str!("systems/dgx-a100.toml")),
    ("dgx-h100", include_str!("systems/dgx-h100.toml")),
    ("dgx-h200", include_str!("systems/dgx-h200.toml")),
    ("dgx-h800", include_str!("systems/dgx-h800.toml")),
    ("gb200-nvl72", include_str!("systems/gb200-nvl72.toml")),
    (
        "vera-rubin-nvl144",
        include_str!("systems/vera-rubin-nvl144.toml"),
    ),
    ("atlas-800t-a2", include_str!("systems/atlas-800t-a2.toml")),
    (
        "cloudmatrix-384",
        include_str!("systems/cloudmatrix-384.toml"),
    ),
    (
        "atlas-950-superpod",
        include_str!("systems/atlas-950-superpod.toml"),
    ),
    (
        "atlas-950-supercluster",
        include_str!("systems/atlas-950-supercluster.toml"),
    ),
    (
        "atlas-960-superpod",
        include_str!("systems/atlas-960-superpod.toml"),
    ),
    (
        "atlas-960-supercluster",
        include_str!("systems/atlas-960-supercluster.toml"),
    ),
];

pub(super) const STACKS: [(&str, &str); 5] = [
    ("deepep-2025", include_str!("stacks/deepep-2025.toml")),
    ("ideal", include_str!("stacks/ideal.toml")),
    ("megatron-2022", include_str!("stacks/megatron-2022.toml")),
    (
        "megatron-core-2025",
        include_str!("stacks/megatron-core-2025.toml"),
    ),
    ("mindspeed-2025", include_str!("stacks/mindspeed-2025.toml")),
];
