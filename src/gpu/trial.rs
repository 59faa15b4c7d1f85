//! The first use of a kernel that a driver, or the compiler of shaders, may not survive: on a device of its own, which may be lost.
//!
//! A panic or a lost device is caught there, and the kernel is not used. A crash takes the process along: a file in the user's cache
//! folder, which holds a word while the kernel is tried, makes the next process leave it alone.

use super::adapter::Adapter;
use super::chip::Chip;
use super::kept::folder;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

/// True if `works` says so of a fresh device of this adapter. Otherwise one warning on standard error names the shader.
pub(super) fn passes(about: &Adapter, shader: &str, works: impl FnOnce(&Chip) -> bool) -> bool {
    let mark = Mark::of(about, shader);
    let avoid = |why: String| {
        let said = format!(
            "supernode: {about}: the shader {shader} is not used, a plain one takes its place: {why}"
        );
        // A warning that nobody can read is no reason to stop.
        let _ = writeln!(std::io::stderr().lock(), "{said}");
        false
    };
    if let Some(mark) = &mark
        && mark.is_left_behind
    {
        return avoid(format!(
            "a process ended while it tried it; delete {} to try again",
            mark.path.display()
        ));
    }
    if let Some(mark) = &mark {
        mark.write(b"trying\n");
    }
    let tried = catch_unwind(AssertUnwindSafe(|| {
        let chip = Chip::open_alone(about.index).ok()?;
        Some(works(&chip) && chip.finish().is_ok())
    }));
    if let Some(mark) = &mark {
        mark.write(b"");
    }
    match tried {
        Ok(Some(true)) => true,
        Ok(Some(false)) => avoid("its first results were wrong".into()),
        Ok(None) => avoid("no device could be opened to try it on".into()),
        Err(_) => avoid("compiling or running it failed".into()),
    }
}

/// The file of one shader on one adapter, locked while this process tries it.
struct Mark {
    path: PathBuf,
    file: File,
    is_left_behind: bool,
}

impl Mark {
    /// None where there is no cache folder to write in.
    fn of(about: &Adapter, shader: &str) -> Option<Self> {
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
        let name = format!("{} {} {shader}", about.name, about.driver);
        let name: String = name.chars().map(plain).collect();
        let folder = folder()?;
        std::fs::create_dir_all(&folder).ok()?;
        let path = folder.join(format!("trial-{name}"));
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false);
        let mut file = file.open(&path).ok()?;
        // Another process that is trying it now comes to an end, or lets go of the lock when it dies.
        file.lock().ok()?;
        let mut left = Vec::new();
        file.read_to_end(&mut left).ok()?;
        Some(Mark {
            path,
            file,
            is_left_behind: !left.is_empty(),
        })
    }

    /// Replaces the contents. Where that fails there is no more than no mark.
    fn write(&self, contents: &[u8]) {
        let mut file = &self.file;
        let _ = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(contents))
            .and_then(|()| file.sync_all());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter() -> Option<Adapter> {
        let found = crate::gpu::adapters().into_iter().next();
        let required = std::env::var_os("SUPERNODE_REQUIRE_GPU").is_some();
        assert!(
            found.is_some() || !required,
            "SUPERNODE_REQUIRE_GPU is set, there is no adapter"
        );
        found
    }

    #[test]
    #[cfg_attr(
        no_adapter,
        ignore = "no Vulkan driver is installed; mesa-vulkan-drivers brings a software one"
    )]
    fn what_panics_or_crashed_is_left_alone() {
        let Some(about) = adapter() else { return };
        let shader = format!("test {}", std::process::id());
        assert!(passes(&about, &shader, |_| true));
        assert!(!passes(&about, &shader, |_| false));
        assert!(!passes(&about, &shader, |_| panic!(
            "a compiler of shaders"
        )));
        // What panicked may be tried again; what never came back may not.
        assert!(passes(&about, &shader, |_| true));
        if let Some(mark) = Mark::of(&about, &shader) {
            mark.write(b"trying\n");
            let path = mark.path.clone();
            drop(mark);
            assert!(!passes(&about, &shader, |_| unreachable!(
                "it is not tried"
            )));
            std::fs::remove_file(path).expect("the mark");
            assert!(passes(&about, &shader, |_| true));
            let again = Mark::of(&about, &shader).expect("a folder");
            assert!(!again.is_left_behind);
            std::fs::remove_file(&again.path).expect("the mark");
        }
    }
}
