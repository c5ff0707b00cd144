//! Which Rust toolchain compiles the eBPF object.
//!
//! `-Z build-std=core` needs the standard library's sources next to the compiler. This file is
//! compiled into `xtask` and into `slb-user/build.rs`, so that set-up and build cannot disagree;
//! it uses nothing but `std` for that reason.

use std::{path::Path, process::Command};

/// The ordinary way: rustup's nightly with the component `rust-src`.
pub(crate) const NIGHTLY: &str = "nightly";

/// Where rustup can fetch nothing: the distribution's compiler, under this name
/// (`rustup toolchain link slb-bpf /usr`).
pub(crate) const LINKED: &str = "slb-bpf";

/// The first of [`NIGHTLY`] and [`LINKED`] that has the sources of `core`.
pub(crate) fn find() -> Option<&'static str> {
    [NIGHTLY, LINKED].into_iter().find(|name| has_sources(name))
}

fn has_sources(toolchain: &str) -> bool {
    let Ok(output) =
        Command::new("rustup").args(["run", toolchain, "rustc", "--print", "sysroot"]).output()
    else {
        return false;
    };
    output.status.success()
        && Path::new(String::from_utf8_lossy(&output.stdout).trim())
            .join("lib/rustlib/src/rust/library/core/src/lib.rs")
            .exists()
}
