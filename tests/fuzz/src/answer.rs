//! What a backend answers to an HTTP probe.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| slb_user::health::fuzz_answer(bytes));
