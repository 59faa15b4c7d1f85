//! Tells tests whether this machine can have a graphics processor at all: what is ignored is decided before tests run.
//! Where it cannot, `no_adapter` is set, and the cases that need one are reported as ignored. With SUPERNODE_REQUIRE_GPU it is
//! never set: then they run, and fail.

use std::path::{Path, PathBuf};

/// Where Vulkan's loader looks for drivers on Linux.
const FOLDERS: [&str; 4] = [
    "/usr/share/vulkan/icd.d",
    "/usr/local/share/vulkan/icd.d",
    "/etc/vulkan/icd.d",
    "/usr/local/etc/vulkan/icd.d",
];
/// What names drivers instead.
const VARIABLES: [&str; 3] = ["VK_DRIVER_FILES", "VK_ICD_FILENAMES", "VK_ADD_DRIVER_FILES"];

fn main() {
    println!("cargo::rustc-check-cfg=cfg(no_adapter)");
    println!("cargo::rerun-if-changed=build.rs");
    for name in VARIABLES.iter().chain(&["SUPERNODE_REQUIRE_GPU", "HOME"]) {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let set = |name: &&str| std::env::var_os(name).is_some_and(|v| !v.is_empty());
    let linux = std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux");
    let home = std::env::var_os("HOME").map(|h| Path::new(&h).join(".local/share/vulkan/icd.d"));
    let folders = FOLDERS.iter().map(PathBuf::from).chain(home);
    let mut found = false;
    for folder in folders {
        // Cargo would walk all of a folder above, or build anew each time for one that is not there: after a machine's first
        // driver is installed, `touch build.rs`.
        if folder.is_dir() {
            println!("cargo::rerun-if-changed={}", folder.display());
        }
        let listed = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        found |= listed
            .map(|entry| entry.path())
            .any(|path| path.extension().is_some_and(|e| e == "json"));
    }
    let named = VARIABLES.iter().any(set);
    if linux && !found && !named && !set(&"SUPERNODE_REQUIRE_GPU") {
        println!("cargo::rustc-cfg=no_adapter");
    }
}
