//! Builds the eBPF object that `loader.rs` embeds.

#[path = "../xtask/src/toolchain.rs"]
mod toolchain;

use anyhow::{Context as _, Result, bail};

fn main() -> Result<()> {
    println!("cargo:rerun-if-changed=../xtask/src/toolchain.rs");
    let Some(name) = toolchain::find() else {
        bail!("no toolchain can build the eBPF object: run `cargo xtask setup`");
    };
    if name == toolchain::LINKED {
        // SAFETY: a build script has one thread at this point.
        unsafe { std::env::set_var("RUSTC_BOOTSTRAP", "1") };
    }
    // 32-bit arithmetic and jumps, which every kernel from 5.1 on has: without them each 32-bit number costs
    // two instructions more. `aya_build` sets the flags of the compiler itself, so they go with the profile.
    for (name, value) in [
        ("CARGO_UNSTABLE_PROFILE_RUSTFLAGS", "true"),
        ("CARGO_PROFILE_RELEASE_RUSTFLAGS", "-Ctarget-cpu=v3"),
        ("CARGO_PROFILE_RELEASE_BUILD_OVERRIDE_RUSTFLAGS", "-Cdebuginfo=0"),
    ] {
        // SAFETY: as above.
        unsafe { std::env::set_var(name, value) };
    }
    let features: &[&str] =
        if std::env::var_os("CARGO_FEATURE_TRACE").is_some() { &["trace"] } else { &[] };
    let root_dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../slb-ebpf");
    aya_build::build_ebpf(
        [aya_build::Package { name: "slb-ebpf", root_dir, features, ..Default::default() }],
        aya_build::Toolchain::Custom(name),
    )
    .context("building the eBPF object (`cargo xtask setup` installs what it needs)")
}
