//! The command `slb`.

use std::process::ExitCode;

fn main() -> ExitCode {
    slb_user::cli::main()
}
