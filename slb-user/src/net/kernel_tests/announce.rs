//! VIPs: held, announced and withdrawn.

use super::*;

#[test]
#[ignore = "needs root"]
fn given_vips_when_set_twice_then_the_second_time_writes_and_sends_nothing() {
    in_namespace(|peer| async move {
        let network = Network::open().await.unwrap();
        let interfaces = both(&network);
        let vips = ["203.0.113.10", "10.0.0.10", "2001:db8:113::10"].map(addr);
        peer.ip("neigh add 203.0.113.10 dev wan1 lladdr 02:00:00:00:00:ff nud stale");
        peer.ip("neigh add 2001:db8:113::10 dev wan1 lladdr 02:00:00:00:00:ff nud stale");
        let mut announcer = Announcers::new(&network);

        let first = announcer.announce(Announce::Arp, &vips, &interfaces).await.unwrap();

        assert_eq!(first.added, vips);
        assert_eq!(first.announced, vips);
        for vip in vips {
            let hop = until(&network, &vip.to_string(), |hop| *hop == NextHop::Local).await;
            assert_eq!(hop, NextHop::Local);
        }
        settle(&network).await;
        let second = announcer.announce(Announce::Arp, &vips, &interfaces).await.unwrap();
        assert_eq!(second, Announced::default());
        let quiet = tokio::time::timeout(Duration::from_millis(100), network.changed()).await;
        assert!(quiet.is_err(), "{quiet:?}");
        // The peer learns the new MAC from the announcements.
        let pid = std::process::id();
        let namespace = format!("--net=/proc/{pid}/task/{}/ns/net", peer.tid);
        for vip in ["203.0.113.10", "2001:db8:113::10"] {
            let entry =
                || run(Command::new("nsenter").args([&namespace, "ip", "neigh", "show", vip]));
            let learnt = async {
                while !entry().contains("02:00:00:00:00:11") {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            let learnt = tokio::time::timeout(Duration::from_secs(5), learnt).await;
            assert!(learnt.is_ok(), "{}", entry());
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_vips_of_an_earlier_run_when_set_then_old_ones_go_and_foreign_ones_stay() {
    in_namespace(|_peer| async {
        ip("addr add 203.0.113.20/32 dev wan0");
        ip("addr add 203.0.113.99/32 dev wan0");
        let network = Network::open().await.unwrap();
        let interfaces = both(&network);
        let old = ["203.0.113.10", "203.0.113.11", "2001:db8:113::10"].map(addr);
        Announcers::new(&network).announce(Announce::Arp, &old, &interfaces).await.unwrap();
        let vips = ["203.0.113.11", "203.0.113.20"].map(addr);
        let mut announcer = Announcers::new(&network);

        let mut done = announcer.announce(Announce::Arp, &vips, &interfaces).await.unwrap();

        done.removed.sort();
        assert_eq!(done.added, [] as [IpAddr; 0]);
        assert_eq!(done.removed, ["203.0.113.10", "2001:db8:113::10"].map(addr));
        assert_eq!(done.announced, vips, "a new process announces what is there already");
        assert_eq!(announcer.withdraw().await.unwrap(), [addr("203.0.113.11")]);
        let held = run(Command::new("ip").args(["addr", "show", "dev", "wan0"]));
        for (address, expected) in [
            ("203.0.113.1/24", true),
            ("203.0.113.20/32", true),
            ("203.0.113.99/32", true),
            ("203.0.113.10/32", false),
            ("203.0.113.11/32", false),
            ("2001:db8:113::10/128", false),
        ] {
            assert_eq!(held.contains(address), expected, "{address}: {held}");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_vip_when_the_kernel_chooses_a_source_then_it_is_never_the_vip() {
    in_namespace(|_peer| async {
        ip("addr flush dev lan0");
        ip("addr add 2001:db8:10::1/64 dev lan0 nodad");
        ip("route add 10.0.0.0/24 dev lan0");
        let network = Network::open().await.unwrap();
        let interfaces = [network.interface("lan0").unwrap()];
        let vips = ["10.0.0.10", "2001:db8:10::10"].map(addr);

        Announcers::new(&network).announce(Announce::Arp, &vips, &interfaces).await.unwrap();

        for (target, expected) in
            [("10.0.0.9", "203.0.113.1"), ("2001:db8:10::9", "2001:db8:10::1")]
        {
            let route = run(Command::new("ip").args(["route", "get", target]));
            assert!(route.contains(&format!("src {expected} ")), "{target}: {route}");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_link_that_went_down_when_it_is_up_again_then_vips_are_held_and_announced_again() {
    in_namespace(|_peer| async {
        let network = Network::open().await.unwrap();
        let vips = ["203.0.113.10", "2001:db8:113::10"].map(addr);
        let mut announcer = Announcers::new(&network);
        announcer.announce(Announce::Arp, &vips, &both(&network)).await.unwrap();
        ip("link set wan0 down");
        while network.interface("wan0").unwrap().up {
            tokio::time::timeout(BOUND, network.changed()).await.expect("no event");
        }
        let done = announcer.announce(Announce::Arp, &vips, &both(&network)).await.unwrap();
        assert_eq!(done.announced, [] as [IpAddr; 0]);
        let down = VipState::Silent(Silence::LinkDown { interface: "wan0".to_owned() });
        assert_eq!(vips.map(|vip| announcer.state(vip)), [down.clone(), down]);

        ip("link set wan0 up");
        while !network.interface("wan0").unwrap().up {
            tokio::time::timeout(BOUND, network.changed()).await.expect("no event");
        }
        let done = announcer.announce(Announce::Arp, &vips, &both(&network)).await.unwrap();

        assert_eq!(done.announced, vips);
        assert_eq!(
            vips.map(|vip| announcer.state(vip)),
            [VipState::Announced, VipState::Announced]
        );
    });
}

#[test]
#[ignore = "needs root"]
fn vips_are_withdrawn_when_announcing_is_left_to_another_program() {
    in_namespace(|_peer| async {
        let network = Network::open().await.unwrap();
        let interfaces = both(&network);
        let vips = ["203.0.113.10"].map(addr);
        Announcers::new(&network).announce(Announce::Arp, &vips, &interfaces).await.unwrap();
        // Another run of the agent, which has only the marks of the addresses to go by.
        let mut announcers = Announcers::new(&network);
        assert_eq!(announcers.state(vips[0]), VipState::Withdrawn);

        for (way, added, removed, state) in [
            (Announce::None, &[][..], &vips[..], VipState::Unmanaged),
            (Announce::Arp, &vips[..], &[][..], VipState::Announced),
            (Announce::None, &[][..], &vips[..], VipState::Unmanaged),
        ] {
            let done = announcers.announce(way, &vips, &interfaces).await.unwrap();
            assert_eq!((&done.added[..], &done.removed[..]), (added, removed), "{way}");
            assert_eq!(announcers.state(vips[0]), state, "{way}");
        }
    });
}
