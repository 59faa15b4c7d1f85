//! `supernode bench --backend gpu --tune FILE`: how products are best cut up on an adapter.

use super::input;
use crate::cli::output::{Output, print_text};
use std::path::Path;
use supernode::Result;
use supernode::mesh::Mesh;
use supernode::spmd::{Device, World};

/// A product that keeps a card busy for some milliseconds, and a processor for less than a second.
const SIZES: [usize; 2] = [2048, 512];

/// Times every shape and writes the table.
pub(super) fn run(device: &Device, path: &Path) -> Result<()> {
    if device.is_cpu() {
        return Err(input(
            "--tune is for graphics processors: say --backend gpu",
        ));
    }
    let world = World::threads(&Mesh::single(), device.clone())?;
    let output = Output::new(path)?;
    let run = world.run(|chip| {
        let adapter = chip
            .memory()
            .gpu_chip()
            .expect("the device is no processor");
        let size = SIZES[(adapter.adapter().kind == "software") as usize];
        let tuned = adapter.tune(size, |shape, rate| {
            print_text(&format!("{shape:<44} {rate:>9.1} GFLOP/s\n"));
        });
        tuned.unwrap_or_else(|e| chip.fail(e))
    })?;
    output.write(&run.outputs()[0])?;
    print_text(&format!(
        "written to {}; SUPERNODE_TILES names it to later runs\n",
        path.display()
    ));
    Ok(())
}
