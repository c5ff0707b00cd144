//! The configuration file: what is valid can be described, and is not different from itself.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use slb_user::config;

fuzz_target!(|text: &str| {
    let _ = config::api(text);
    match config::parse(Path::new("slb.toml"), text) {
        Ok((parsed, _)) => assert!(config::changes(&parsed, &parsed).is_empty()),
        Err(report) => assert!(!report.to_string().is_empty()),
    }
});
