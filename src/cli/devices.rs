//! `supernode devices`.

use super::output::print_text;
use serde_json::json;
use supernode::Result;

/// Arguments of `supernode devices`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

/// Runs the command: what chips can be here, by the name that `--device` takes, and what is missing.
pub(super) fn run(a: &Arguments) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if a.json {
        print_text(&format!("{}\n", json!({"device": "cpu", "cores": cores})));
    } else {
        print_text(&format!("cpu: {cores} core(s)\n"));
    }
    graphics(a.json);
    Ok(())
}

#[cfg(feature = "gpu")]
fn graphics(json: bool) {
    let all = supernode::gpu::adapters();
    if all.is_empty() && !json {
        print_text(&format!(
            "no graphics processor: {}\n",
            supernode::gpu::advice()
        ));
    }
    for g in all {
        if json {
            let mut object = json!(g);
            object["device"] = json!(format!("gpu:{}", g.index));
            print_text(&format!("{object}\n"));
            continue;
        }
        let yes = |b: bool| if b { "yes" } else { "no" };
        let matrices = match g.matrices.len() {
            0 => "none".to_string(),
            _ => g.matrices.join(", "),
        };
        print_text(&format!(
            "gpu:{}: {} ({}, {})\n  driver: {}\n  largest tensor: {} MiB, largest buffer: {} MiB\n  \
             groups: {} invocations, {} KiB shared; {} to {} in step\n  timestamps: {}, f16 arithmetic: {}, cooperative matrices: {matrices}\n",
            g.index,
            g.name,
            g.kind,
            g.backend,
            g.driver,
            g.largest_tensor >> 20,
            g.largest_buffer >> 20,
            g.group_size,
            g.group_memory >> 10,
            g.subgroup[0],
            g.subgroup[1],
            yes(g.timestamps),
            yes(g.shader_f16),
        ));
    }
}

#[cfg(not(feature = "gpu"))]
fn graphics(json: bool) {
    if !json {
        print_text("no graphics processor: this build has no feature gpu\n");
    }
}
