//! `cargo xtask docs`: the tables of `docs/reference`, and manual pages and shell completions in `target/docs`.
//!
//! `slb-user/src/reference.rs` makes them from the code, in a test, because this program must not depend on
//! `slb-user`: that can be built only after set-up.

use anyhow::Result;

use crate::{process, setup};

/// Writes all of them, or compares the tables with the code.
///
/// # Errors
///
/// It does not compile, or a table that is compared is out of date.
pub(crate) fn run(is_writing: bool) -> Result<()> {
    setup::ensure(&setup::Options::default())?;
    // The same packages as for the tests, so that cargo picks the same features and builds them once.
    let mut command = process::cargo(["test", "--quiet", "--lib"]);
    if is_writing {
        command.env("SLB_WRITE_REFERENCE", "1");
    }
    process::run(command.arg("reference::"))
}
