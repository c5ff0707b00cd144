//! Bodies of the local API: an edit, or a file. What was read is written as it is read again.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use slb_api::{ConfigFile, Edit};
use slb_user::config;

const FILE: &str = include_str!("../../configs/good/full.toml");

fuzz_target!(|body: &[u8]| {
    if let Ok(edit) = serde_json::from_slice::<Edit>(body) {
        let text = serde_json::to_string(&edit).expect("an edit has a text");
        assert_eq!(serde_json::from_str::<Edit>(&text).expect("its own text"), edit);
        if let Ok(edited) = config::apply(&edit, FILE) {
            // It may be refused, and says why.
            let _ =
                config::parse(Path::new("slb.toml"), &edited).map_err(|report| report.to_string());
        }
    }
    if let Ok(file) = serde_json::from_slice::<ConfigFile>(body) {
        let _ = config::parse(&file.path, &file.text).map_err(|report| report.to_string());
    }
});
