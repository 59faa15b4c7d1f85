//! A trace says how the products of a graphics processor were cut up.

use super::gpu;
use supernode::mesh::Mesh;
use supernode::placement::Placement::{Replicate, Shard};
use supernode::spmd::{Chip, Device, FromIndex, Init, World};
use supernode::trace::{Product, Tiles, Trace};

/// Products of sizes for which tables choose unlike: large, small, and of few rows and a long k, with their gradients.
fn program(chip: &Chip) {
    for (name, [m, k, n]) in [
        ("large", [256, 64, 256]),
        ("small", [6, 8, 4]),
        ("long", [8, 4096, 8]),
    ] {
        let loss = chip.record(|| {
            let x = chip.input("x", [m, k], [Shard(0)], &FromIndex(|i| (i % 5) as f32));
            let w = chip.parameter(name, [k, n], [Replicate], Init::ones());
            x.matmul(&w).sum()
        });
        loss.backward();
    }
}

fn traced(device: Device) -> Trace {
    let world = World::threads(&Mesh::new([("dp", 2)]), device).expect("it was opened before");
    world.run(program).expect("a run").trace().clone()
}

/// The tile that takes the least time by the table's rates, and the parts of k, worked out again from what the trace says.
fn best(tiles: &Tiles, product: &Product) -> (String, usize) {
    let [m, n, k] = product.sizes;
    let groups = |tile: &str| {
        let covers = tile.split([' ', ',']).nth(1).expect("its size");
        let (down, across) = covers.split_once('x').expect("down x across");
        let [down, across] = [down, across].map(|n| n.parse::<usize>().expect("a number"));
        let groups = product.batch * m.div_ceil(down) * n.div_ceil(across);
        (groups, down * across)
    };
    let time = |tile: &str, rate: f64| {
        let (groups, area) = groups(tile);
        (groups.div_ceil(tiles.fill) * area) as f64 / rate
    };
    let mut shapes = tiles.shapes.iter();
    let mut best = shapes.next().expect("a table has shapes");
    for shape in shapes {
        if time(&shape.tile, shape.rate) < time(&best.tile, best.rate) {
            best = shape;
        }
    }
    let (groups, _) = groups(&best.tile);
    let parts = match 2 * groups <= tiles.fill {
        true => (tiles.fill / groups).min(k / tiles.part).max(1),
        false => 1,
    };
    (best.tile.clone(), parts)
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn each_product_has_the_tables_tile_in_the_trace() {
    let Some(gpu) = gpu() else { return };
    let trace = traced(gpu.clone());
    for rank in 0..2 {
        let chip = trace.chip(rank);
        let tiles = chip.tiles.as_ref().expect("a table");
        assert!(tiles.adapter.starts_with("gpu:0 "), "{tiles}");
        // A product, and its two gradients or the one that is asked for.
        let forward = [[128, 256, 64], [3, 4, 8], [4, 8, 4096]];
        let events = chip.events().filter(|e| &*e.op == "matmul");
        let cut: Vec<&Product> = events.flat_map(|e| chip.products_of(e)).collect();
        let sizes: Vec<[usize; 3]> = cut.iter().map(|p| p.sizes).collect();
        assert_eq!(sizes, forward);
        let calls: u64 = chip.products.iter().map(|p| p.calls).sum();
        assert_eq!(calls, 6, "with the gradients of w: {:?}", chip.products);
        for product in &chip.products {
            let (tile, parts) = best(tiles, product);
            assert_eq!((&product.tile, product.parts), (&tile, parts), "{product}");
        }
    }
    let again = traced(gpu);
    assert_eq!(trace.difference(&again), None);
    let ghost = World::ghost(&trace.mesh).trace(program).expect("a trace");
    assert_eq!(trace.difference(&ghost), None, "a ghost is of no device");
    let summary = trace.summary();
    let row = "1 of [4, 4096] [4096, 8]";
    assert!(
        summary.contains(row) && summary.contains("cut up as"),
        "{summary}"
    );
}

#[test]
#[cfg_attr(
    no_adapter,
    ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
)]
fn traces_of_the_processor_and_of_ghosts_say_nothing_of_tiles() {
    let Some(gpu) = gpu() else { return };
    let text = |trace: &Trace| serde_json::to_string(trace).expect("JSON");
    let ghost = World::ghost(&Mesh::new([("dp", 2)])).trace(program);
    for (trace, told) in [
        (traced(Device::cpu()), false),
        (ghost.expect("a trace"), false),
        (traced(gpu), true),
    ] {
        for key in ["\"tiles\":", "\"products\":"] {
            assert_eq!(text(&trace).contains(key), told, "{key} in {}", trace.world);
        }
        assert_eq!(trace.summary().contains("cut up as"), told);
    }
}

#[cfg(feature = "cli")]
mod command {
    use super::gpu;
    use std::path::Path;
    use std::process::{Command, Output};
    use supernode::trace::Trace;

    const ONE: &str = "fill = 4\npart = 512\nlanes = []\ntiles = [\n    { group = [8, 8], each = [2, 1], depth = 32, rate = 1.0 },\n]\n";

    /// A table with the same tile for every adapter.
    fn table() -> String {
        ["software", "discrete", "integrated"]
            .map(|class| format!("[{class}]\n{ONE}"))
            .concat()
    }

    /// A step of a small model, with the table of that file or the one built in.
    fn train(folder: &Path, tiles: Option<&str>, trace: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_supernode"));
        command
            .current_dir(folder)
            .args(["train", "--text", "text"]);
        command.args([
            "--layers",
            "1",
            "--hidden",
            "16",
            "--heads",
            "2",
            "--context",
            "8",
        ]);
        command.args(["--batch", "4", "--eval-every", "0", "--steps", "1"]);
        command.args(["--device", "gpu", "--trace", trace]);
        command.env_remove("SUPERNODE_TILES");
        command.envs(tiles.map(|file| ("SUPERNODE_TILES", file)));
        command.output().expect("the command starts")
    }

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        let text = "the quick brown fox jumps over the lazy dog. ".repeat(20);
        std::fs::write(folder.path().join("text"), text).expect("a text");
        folder
    }

    #[test]
    #[cfg_attr(
        no_adapter,
        ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
    )]
    fn a_stored_trace_says_which_table_made_it() {
        let Some(_) = gpu() else { return };
        let folder = folder();
        std::fs::write(folder.path().join("one.toml"), table()).expect("a table");
        let stored = |tiles: Option<&str>, name: &str| {
            let out = train(folder.path(), tiles, name);
            let told = String::from_utf8_lossy(&out.stdout).into_owned();
            assert!(
                out.status.success(),
                "{}",
                String::from_utf8_lossy(&out.stderr)
            );
            let trace = Trace::load(&folder.path().join(name)).expect("a trace");
            let text = std::fs::read_to_string(folder.path().join(name)).expect("a file");
            (trace, told, text)
        };
        let (plain, _, _) = stored(None, "plain.json");
        let (named, told, text) = stored(Some("one.toml"), "named.json");
        let table = |trace: &Trace| trace.chip(0).tiles.clone().expect("a table");
        assert_eq!(table(&plain).table, "built in");
        assert_eq!(table(&named).table, "one.toml");
        let one = "tile 64x32, group 8x8, depth 32";
        let products = &named.chip(0).products;
        assert!(products.len() > 5, "{products:?}");
        assert!(products.iter().all(|p| p.tile == one), "{products:?}");
        let others = &plain.chip(0).products;
        assert!(others.iter().all(|p| p.tile != one), "{others:?}");
        let difference = plain.difference(&named).expect("other tiles");
        assert!(
            difference.contains("were cut up as") && difference.contains("'one.toml'"),
            "{difference}"
        );
        assert!(told.contains("products by table 'one.toml'"), "{told}");
        // Where a viewer shows it: beside the operands of an event.
        let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let events = json["traceEvents"].as_array().expect("events");
        let shown = |e: &&serde_json::Value| {
            let product = e["args"]["products"][0].as_str();
            e["name"] == "matmul" && product.is_some_and(|p| p.ends_with(one))
        };
        assert!(events.iter().any(|e| shown(&e)), "{text}");
    }

    #[test]
    #[cfg_attr(
        no_adapter,
        ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
    )]
    fn a_broken_table_is_one_sentence_with_file_line_and_field() {
        let Some(_) = gpu() else { return };
        let folder = folder();
        for (from, to, says) in [
            (
                "depth = 32",
                "deep = 32",
                "line 6, field 'deep': unknown field `deep`",
            ),
            (
                "depth = 32",
                "depth = 30",
                "line 6, field 'tiles': group [8, 8]",
            ),
            ("fill = 4", "fill = four", "line 2, field 'fill': "),
        ] {
            let broken = table().replacen(from, to, 1);
            std::fs::write(folder.path().join("broken.toml"), broken).expect("a file");
            let out = train(folder.path(), Some("broken.toml"), "none.json");
            let error = String::from_utf8_lossy(&out.stderr);
            assert_eq!(out.status.code(), Some(1), "{error}");
            let begins = format!(
                "supernode: SUPERNODE_TILES names broken.toml, which is no table of tiles: {says}"
            );
            // Drivers write there too.
            let sentence = error.lines().find(|l| l.starts_with(&begins));
            let sentence = sentence.unwrap_or_else(|| panic!("'{begins}' is missing in: {error}"));
            let ends = "; `supernode bench --backend gpu --tune` writes one";
            assert!(
                sentence.ends_with(ends) && !error.contains(" | "),
                "{error}"
            );
        }
    }
}
