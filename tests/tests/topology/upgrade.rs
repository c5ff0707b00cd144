//! An agent of another build takes over.

use std::{collections::BTreeSet, fs};

use aya::{
    EbpfLoader,
    programs::{
        Xdp,
        links::{FdLink, PinnedLink},
        xdp::XdpLink,
    },
};
use slb_tests::{Gateway, Load, Sessions};

use crate::support::{
    Lab, answers_more, expect_unscathed,
    maps::{links, names, programs, tag, version},
    plan::{self, vips},
};

/// New connections per second.
const RATE: u32 = 500;
/// Answers that show that the load goes on: a second of it.
const GOES_ON: u64 = 500;

#[test]
#[ignore = "needs root"]
fn given_the_program_of_another_build_when_an_agent_starts_under_load_then_it_replaces_it_unnoticed()
 {
    let mut lab = Lab::start();
    let own_tag = tag(&lab.gateway);
    let kept = vips(plan::WEB_PORT).map(|to| Sessions::open(&lab.client, to, 20).unwrap());
    let [to, _] = vips(plan::WEB_PORT);
    let load = Load::start(&lab.client, to, RATE).unwrap();
    answers_more(&load, 100);

    lab.gateway.terminate().unwrap();
    leave_another_build(&lab.gateway);
    let others = programs(&lab.gateway);
    assert_ne!(tag(&lab.gateway), own_tag, "the other build is another program");
    answers_more(&load, GOES_ON);
    lab.gateway.start().unwrap();
    answers_more(&load, GOES_ON);

    let own = programs(&lab.gateway);
    assert_eq!(tag(&lab.gateway), own_tag);
    assert_eq!(own.iter().collect::<BTreeSet<_>>().len(), 1, "everywhere the same: {own:?}");
    assert!(!others.contains(&own[0]), "{others:?} became {own:?}");
    expect_unscathed(load);
    for session in kept.into_iter().flat_map(|kept| kept.stop().unwrap()) {
        assert_eq!(session.failure, None, "{session:?}");
    }
}

/// Puts another build's program, with the maps that are there, into the links.
fn leave_another_build(gateway: &Gateway) {
    let maps = version(gateway).join("maps");
    let pins: Vec<_> = names(&maps).into_iter().map(|name| (maps.join(&name), name)).collect();
    let mut loader = EbpfLoader::new();
    for (path, name) in &pins {
        loader.map_pin_path(name, path);
    }
    let object = another_build(slb_user::datapath::OBJECT);
    let mut ebpf = loader.load(&object).unwrap();
    let program: &mut Xdp = ebpf.program_mut("slb").unwrap().try_into().unwrap();
    program.load().unwrap();
    for path in links(gateway) {
        let link = FdLink::from(PinnedLink::from_pin(path).unwrap());
        let id = program.attach_to_link(XdpLink::try_from(link).unwrap()).unwrap();
        // Owned by its pin.
        drop(program.take_link(id).unwrap());
    }
    let pin = version(gateway).join("progs/slb");
    fs::remove_file(&pin).unwrap();
    program.pin(&pin).unwrap();
}

/// The object with one instruction written in another way, so that it does the same and yet is
/// another program to the kernel.
///
/// `r = imm` on 64 bits and on 32 bits, which clears the upper half, are the same for an `imm` that
/// is not negative.
fn another_build(object: &[u8]) -> Vec<u8> {
    const MOV64: u8 = 0xb7;
    const MOV32: u8 = 0xb4;
    const LOAD64: u8 = 0x18;
    let mut object = object.to_vec();
    let mut at = section(&object, "xdp.frags");
    loop {
        let instruction: [u8; 8] = object[at..at + 8].try_into().unwrap();
        let [code, _, off_low, off_high, imm @ ..] = instruction;
        let is_plain = (off_low, off_high) == (0, 0) && i32::from_le_bytes(imm) >= 0;
        match code {
            MOV64 | MOV32 if is_plain => {
                object[at] = MOV64 ^ MOV32 ^ code;
                return object;
            }
            LOAD64 => at += 16,
            _ => at += 8,
        }
    }
}

/// Where a section of a 64-bit ELF file begins.
fn section(elf: &[u8], name: &str) -> usize {
    let u64_at = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap());
    let u32_at = |at: usize| u32::from_le_bytes(elf[at..at + 4].try_into().unwrap());
    let u16_at = |at: usize| u16::from_le_bytes(elf[at..at + 2].try_into().unwrap());
    let header = |index: u16| {
        let first = usize::try_from(u64_at(0x28)).unwrap();
        first + usize::from(index) * usize::from(u16_at(0x3a))
    };
    let offset = |index: u16| usize::try_from(u64_at(header(index) + 0x18)).unwrap();
    let names = offset(u16_at(0x3e));
    let index = (0..u16_at(0x3c))
        .find(|&index| {
            let at = names + usize::try_from(u32_at(header(index))).unwrap();
            elf[at..].starts_with(name.as_bytes()) && elf[at + name.len()] == 0
        })
        .unwrap();
    offset(index)
}
