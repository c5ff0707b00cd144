//! An edit by command, as JSON in the first line, of the file below it: what was valid TOML stays so.

#![no_main]

use libfuzzer_sys::fuzz_target;
use slb_api::Edit;
use slb_user::config::{self, EditError};

fuzz_target!(|input: &str| {
    let Some((edit, text)) = input.split_once('\n') else { return };
    let Ok(edit) = serde_json::from_str::<Edit>(edit) else { return };
    if let Ok(edited) = config::apply(&edit, text) {
        // The second edit reads what the first has written.
        let again = config::apply(&edit, &edited);
        assert!(!matches!(again, Err(EditError::Toml(_))), "no TOML any more:\n{edited}");
    }
});
