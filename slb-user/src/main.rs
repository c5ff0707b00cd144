//! The command `slb`.

use std::process::ExitCode;

use clap::Parser as _;
use slb_user::cli::{Cli, Exit};

fn main() -> ExitCode {
    match Cli::parse().execute() {
        Ok(exit) => exit.into(),
        Err(error) => {
            eprintln!("slb: {error:#}");
            Exit::Failed.into()
        }
    }
}
