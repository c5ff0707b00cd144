//! What the kernel says about its network, or what another program could have it say.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| slb_user::net::fuzz_messages(bytes));
