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
use slb_lab::{Gateway, Load, Sessions, ebpf::another_build};

use crate::support::{
    Lab, answers_more, expect_all_go_on, expect_unscathed,
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
    expect_all_go_on(kept);
}

/// Puts another build's program, with the maps that are there, into the links.
fn leave_another_build(gateway: &Gateway) {
    let maps = version(gateway).join("maps");
    let pins: Vec<_> = names(&maps).into_iter().map(|name| (maps.join(&name), name)).collect();
    let mut loader = EbpfLoader::new();
    for (path, name) in &pins {
        loader.map_pin_path(name, path);
    }
    let object = another_build(slb_user::datapath::OBJECT).unwrap();
    let mut ebpf = loader.load(&object).unwrap();
    let program: &mut Xdp = ebpf.program_mut("slb").unwrap().try_into().unwrap();
    program.load().unwrap();
    for path in links(gateway) {
        let link = FdLink::from(PinnedLink::from_pin(path).unwrap());
        let id = program.attach_to_link(XdpLink::try_from(link).unwrap()).unwrap();
        // Owned by its pin.
        drop(program.take_link(id).unwrap());
    }
    let pins = version(gateway).join("progs");
    names(&pins).iter().for_each(|name| fs::remove_file(pins.join(name)).unwrap());
    program.pin(pins.join("slb")).unwrap();
}
