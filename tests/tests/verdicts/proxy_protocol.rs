//! Backends that see a source of the gateway get the address of the client, by the PROXY protocol or a TCP option.

use slb_common::{
    abi::{BackendFlags, ConnState},
    verdict::Verdict,
};

use crate::{
    connection::{
        Connection, HEADERS, ISN, OPTIONS, everywhere, headed, with_ack, with_mss, with_option,
    },
    fixture::{IDLE_JIFFIES, Run, Slb, backend, client, id, port, replied, syn, vip},
    frame::{ACK, Extension, FIN, Frame, PSH, RST, SYN, Transport, icmp},
    icmp::quote,
    lab::{FIRST, LAN, LAN_MAC, ROUTER, WAN},
};

const FIRST_BYTE: u32 = ISN.wrapping_add(1);

#[test]
#[ignore = "needs root"]
fn given_a_proxy_header_when_a_connection_begins_then_it_stands_before_what_the_client_sends() {
    everywhere(BackendFlags::PROXY, HEADERS, |slb, family, crosses, len| {
        let case = |what: &str| format!("{what}, family {family}, crosses: {crosses}");
        let open = Connection::open(slb, family, crosses, 1_000, len);
        let reply = open.reply(SYN | ACK, len);
        let seen = with_mss(with_ack(&reply, FIRST_BYTE), 1_460 - len as u16);
        open.hears(slb, &case("SYN-ACK"), &reply, &seen);
        let ack = open.segment(ACK, 0, b"");
        open.sends(slb, &case("ACK"), &ack, &headed(&ack));
        let data = open.segment(ACK | PSH, 0, b"odd");
        open.sends(slb, &case("data"), &data, &headed(&data));
        open.sends(slb, &case("data again"), &data, &headed(&data));
        let later = open.segment(ACK | PSH, 3, b"more");
        open.sends(slb, &case("more data"), &later, &later);
        let alive = open.segment(ACK, u32::MAX, b"");
        open.sends(slb, &case("a keepalive"), &alive, &alive);
        for missing in [len, 4, 1] {
            let reply = open.reply(ACK, missing);
            open.hears(slb, &case("header missing"), &reply, &with_ack(&reply, FIRST_BYTE));
        }
        open.sends(slb, &case("still untold"), &data, &headed(&data));

        let both = ConnState::PROXY_PENDING | ConnState::ESTABLISHED;
        let before = slb.flow(&data).expect("an entry");
        assert_eq!(before.state() & both, ConnState::PROXY_PENDING, "{}", case("not yet"));
        let reply = open.reply(ACK, 0);
        open.hears(slb, &case("header received"), &reply, &reply);
        let flow = slb.flow(&data).expect("an entry");
        assert_eq!(flow.state() & both, ConnState::ESTABLISHED, "{}", case("established"));
        let longer = flow.expires.wrapping_sub(before.expires);
        assert!(longer > IDLE_JIFFIES / 2, "{}", case("as long as others"));
        let answer = slb.flows.get(&open.reply_key());
        assert_eq!(answer.expect("an entry").expires, flow.expires, "{}", case("its answers"));
        open.sends(slb, &case("told"), &data, &data);
        let reply = open.reply(ACK, 5);
        open.hears(slb, &case("an old number"), &reply, &reply);
        let reply = open.reply(ACK, 7_u32.wrapping_neg());
        open.hears(slb, &case("data received"), &reply, &reply);
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_proxy_header_when_a_connection_is_short_then_it_ends_as_it_would_without() {
    everywhere(BackendFlags::PROXY, HEADERS, |slb, family, crosses, len| {
        let case = |what: &str| format!("{what}, family {family}, crosses: {crosses}");
        let open = Connection::open(slb, family, crosses, 2_000, len);
        let reply = open.reply(RST | ACK, len);
        open.hears(slb, &case("refused"), &reply, &with_ack(&reply, FIRST_BYTE));

        let open = Connection::open(slb, family, crosses, 2_001, len);
        let reset = open.segment(RST, 0, b"");
        open.sends(slb, &case("given up"), &reset, &headed(&reset));

        let open = Connection::open(slb, family, crosses, 2_002, len);
        open.accept(slb, len);
        let end = open.segment(FIN | ACK, 0, b"");
        open.sends(slb, &case("closed at once"), &end, &headed(&end));

        let open = Connection::open(slb, family, crosses, 2_003, len);
        let early = Frame { payload: b"early".to_vec(), ..open.syn.clone() };
        let run = slb.run(WAN, &early.bytes());
        assert_eq!(run.verdict, Verdict::BeforeClientAddress, "{}", case("data in the SYN"));

        // The same ports once more, from other numbers on.
        let open = Connection::open(slb, family, crosses, 2_004, len);
        let anew = Frame { seq: 77, ..open.syn.clone() };
        let expected = Frame { seq: 77_u32.wrapping_sub(len), ..anew.clone() };
        open.sends(slb, &case("another SYN"), &anew, &expected);
        let reply = Frame { ack: 78_u32.wrapping_sub(len), ..open.reply(SYN | ACK, 0) };
        slb.run(LAN, &reply.bytes());
        let data = Frame { seq: 78, ..open.segment(ACK, 0, b"odd") };
        open.sends(slb, &case("its data"), &data, &headed(&data));
    });
}

#[test]
#[ignore = "needs root"]
fn given_the_option_when_a_connection_begins_then_it_is_in_all_that_the_backend_may_see_first() {
    everywhere(BackendFlags::OPTION, OPTIONS, |slb, family, crosses, len| {
        let case = |what: &str| format!("{what}, family {family}, crosses: {crosses}");
        let open = Connection::open(slb, family, crosses, 3_000, 0);
        let reply = open.reply(SYN | ACK, 0);
        open.hears(slb, &case("SYN-ACK"), &reply, &with_mss(reply.clone(), 1_460 - len as u16));
        let ack = open.segment(ACK, 0, b"");
        open.sends(slb, &case("ACK"), &ack, &with_option(&ack));
        let data = open.segment(ACK | PSH, 3, b"odd");
        open.sends(slb, &case("data"), &data, &with_option(&data));
        let Transport::Tcp { flags, .. } = data.transport else { panic!("not TCP") };
        let options = vec![1; 40 - len as usize + 4];
        let full = Frame { transport: Transport::Tcp { flags, options }, ..data.clone() };
        let none = Frame { transport: Transport::Tcp { flags, options: vec![] }, ..data.clone() };
        open.sends(slb, &case("no room"), &full, &with_option(&none));
        let reset = open.segment(RST, 0, b"");
        open.sends(slb, &case("a reset"), &reset, &reset);

        // The ordinary proof: the client has acknowledged what the backend has sent.
        let flow = slb.flow(&data).expect("an entry");
        let both = ConnState::PROXY_PENDING | ConnState::ESTABLISHED;
        assert_eq!(flow.state() & both, both, "{}", case("established"));

        let open = Connection::open(slb, family, crosses, 3_001, 0);
        open.accept(slb, 0);
        let reply = open.reply(ACK, 1_u32.wrapping_neg());
        open.hears(slb, &case("answered"), &reply, &reply);
        let data = open.segment(ACK | PSH, 1, b"odd");
        open.sends(slb, &case("told"), &data, &data);
    });
}

#[test]
#[ignore = "needs root"]
fn given_the_option_when_a_packet_is_too_big_somewhere_then_the_client_is_told_without_it() {
    everywhere(BackendFlags::OPTION, OPTIONS, |slb, family, crosses, len| {
        if crosses {
            return;
        }
        let open = Connection::open(slb, family, crosses, 3_100, 0);
        let data = open.segment(ACK, 0, b"odd");
        let quoted = 28 + 20 * family;
        let sent = with_option(&Frame { src: open.source, dst: open.inside, ..data.clone() });
        let kind = [[3, 4], [2, 0]][family];
        let router = Frame::tcp(backend(2, family, 0), open.source);
        let router = Frame { src_mac: FIRST.dst_mac, dst_mac: LAN_MAC, ..router };
        let error = icmp(&router, kind, [0, 0, 5, 220], &quote(&sent, quoted));
        let to_client = Frame { dst: open.syn.src, ..router };
        let meant = with_option(&data);
        let less = [0, 0, 5, 220 - len as u8];
        let expected = icmp(&to_client, kind, less, &quote(&meant, quoted));
        slb.backend_sends("too big", &error, &replied(expected, ROUTER));
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_backend_that_waits_for_a_header_when_a_connection_is_unknown_then_it_is_reset() {
    everywhere(BackendFlags::PROXY, HEADERS, |slb, family, crosses, _| {
        let to = if crosses { port::OTHER } else { port::FULL };
        let unknown = syn(client(family, 9_000), vip(family, to)).flags(ACK);
        assert_eq!(slb.run(WAN, &unknown.bytes()).verdict, Verdict::Reset, "family {family}");
    });
}

#[test]
#[ignore = "needs root"]
fn given_headers_of_any_length_when_something_is_inserted_then_it_stands_behind_them() {
    everywhere(BackendFlags::PROXY, HEADERS, |slb, family, crosses, len| {
        let open = Connection::open(slb, family, crosses, 4_000, len);
        open.accept(slb, len);
        for more in 1..=3 {
            let data = open.segment(ACK, 0, &[7; 1_000]);
            let padding = etherparse::IpNumber::IPV6_DESTINATION_OPTIONS;
            let data = if family == 0 {
                Frame { v4_options: vec![1; 12 * more], ..data }
            } else {
                Frame { extensions: vec![Extension::padding(padding); more], ..data }
            };
            let data = Frame { padding: more, ..data };
            open.sends(slb, &format!("{more}, family {family}"), &data, &headed(&data));
        }
        let data = open.segment(ACK, 0, b"");
        let padding = Extension::Raw(etherparse::IpNumber::IPV6_DESTINATION_OPTIONS, vec![0; 214]);
        if family == 1 && !crosses {
            let long = Frame { extensions: vec![padding], ..data };
            assert_eq!(slb.run(WAN, &long.bytes()).verdict, Verdict::Untranslatable);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_way_that_is_narrow_when_something_is_to_be_inserted_then_there_has_to_be_room_for_it() {
    everywhere(BackendFlags::PROXY, HEADERS, |slb, family, crosses, len| {
        let open = Connection::open(slb, family, crosses, 5_000, len);
        open.accept(slb, len);
        let id = if crosses { id::OTHER } else { id::FULL } + family as u32;
        let fits = open.segment(ACK, 0, &[7; 1_000]);
        let longer = open.segment(ACK, 0, &[7; 1_001]);
        let (head, grows) = ([20, 40][family], [20, -20][family] * i32::from(crosses));
        let mtu = head + 32 + 1_000 + grows + len as i32;
        slb.backend(id, |backend| backend.mtu = mtu as u32);
        open.sends(slb, "fits", &fits, &headed(&fits));
        let Run { verdict, bytes, .. } = slb.run(WAN, &longer.bytes());
        assert_eq!(verdict, Verdict::TooBig, "family {family}, crosses: {crosses}");
        let at = [40..42, 60..62][family].clone();
        let stated = u16::from_be_bytes(bytes[at].try_into().expect("2 bytes"));
        let room = mtu - len as i32 - grows;
        assert_eq!(i32::from(stated), room, "family {family}, crosses: {crosses}");
        slb.backend(id, |backend| backend.mtu = 0);
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_first_fragment_when_something_is_to_be_inserted_then_it_is_dropped() {
    everywhere(BackendFlags::PROXY, HEADERS, |slb, family, crosses, len| {
        let open = Connection::open(slb, family, crosses, 6_000, len);
        let data = open.segment(ACK, 0, &[7; 16]);
        let bytes = if family == 0 {
            let mut bytes = data.bytes();
            bytes[20] |= 0x20;
            crate::frame::seal_v4(&mut bytes);
            bytes
        } else {
            Frame { extensions: vec![Extension::Fragment(0, true)], ..data }.bytes()
        };
        assert_eq!(slb.run(WAN, &bytes).verdict, Verdict::Untranslatable, "crosses: {crosses}");
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_tagged_frame_when_something_is_inserted_then_its_tag_stays() {
    everywhere(BackendFlags::PROXY, HEADERS, |slb, family, crosses, len| {
        let open = Connection::open(slb, family, crosses, 7_000, len);
        open.accept(slb, len);
        let data = open.segment(ACK, 0, b"odd");
        let plain = slb.run(WAN, &data.bytes());
        let tag = |bytes: &[u8]| [&bytes[..12], &[0x81, 0, 0, 7], &bytes[12..]].concat();
        let run = slb.run(WAN, &tag(&data.bytes()));
        assert_eq!(run.verdict, Verdict::Forwarded, "family {family}");
        assert_eq!(run.bytes, tag(&plain.bytes), "family {family}");
    });
}

#[test]
#[ignore = "needs root"]
fn given_an_error_about_what_was_told_when_it_comes_then_the_client_hears_of_what_it_has_sent() {
    everywhere(BackendFlags::PROXY, HEADERS, |slb, family, crosses, len| {
        if crosses {
            return;
        }
        let open = Connection::open(slb, family, crosses, 8_000, len);
        open.accept(slb, len);
        let data = open.segment(ACK, 0, b"odd");
        let later = open.segment(ACK, 3, b"more");
        let told = headed(&data);
        let shifted = Frame { seq: open.syn.seq.wrapping_sub(len), ..open.syn.clone() };
        let cases = [
            ("SYN", shifted, open.syn.clone(), len as u16),
            ("data", told.clone(), Frame { seq: data.seq, ..told }, len as u16),
            ("later data", later.clone(), later, 0),
        ];
        let quoted = 28 + 20 * family;
        for (case, sent, meant, less) in cases {
            for (kind, mtu) in
                [([[3, 4], [2, 0]][family], 1_400_u16), ([[3, 3], [1, 4]][family], 0)]
            {
                let sent = Frame { src: open.source, dst: open.inside, ..sent.clone() };
                let head = |mtu: u16| [0, 0, mtu.to_be_bytes()[0], mtu.to_be_bytes()[1]];
                let router = Frame::tcp(backend(2, family, 0), open.source);
                let router = Frame { src_mac: FIRST.dst_mac, dst_mac: LAN_MAC, ..router };
                let error = icmp(&router, kind, head(mtu), &quote(&sent, quoted));
                let to_client = Frame { dst: open.syn.src, ..router };
                let expected =
                    icmp(&to_client, kind, head(mtu.saturating_sub(less)), &quote(&meant, quoted));
                let case = format!("{case}, {kind:?}, family {family}");
                slb.backend_sends(&case, &error, &replied(expected, ROUTER));
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn client_bytes_before_the_header_are_dropped() {
    everywhere(BackendFlags::PROXY, HEADERS, |slb, family, crosses, len| {
        let dropped = |slb: &mut Slb<'_>, what: &str, frame: &Frame| {
            let verdict = slb.run(WAN, &frame.bytes()).verdict;
            let case = format!("{what}, family {family}, crosses: {crosses}");
            assert_eq!(verdict, Verdict::BeforeClientAddress, "{case}");
        };
        let open = Connection::open(slb, family, crosses, 9_100, len);
        let forged = open.segment(ACK | PSH, len.wrapping_neg(), &vec![7; len as usize]);
        let data = open.segment(ACK | PSH, 0, b"odd");
        dropped(slb, "before the SYN-ACK", &data);
        let other = Frame { seq: ISN.wrapping_add(1_000), ..open.syn.clone() };
        slb.run(WAN, &other.bytes());
        open.accept(slb, len);
        dropped(slb, "own header", &forged);
        dropped(slb, "FIN in the header", &open.segment(FIN | ACK, u32::MAX, b""));
        dropped(slb, "overlap", &open.segment(ACK, u32::MAX, b"ab"));
        dropped(slb, "too far", &open.segment(ACK, 1 << 16, b"a"));
        let guess = with_ack(&open.segment(ACK, 5, b"a"), FIRST_BYTE.wrapping_add(1));
        dropped(slb, "another cookie", &guess);
        open.sends(slb, "data", &data, &headed(&data));
        let reply = open.reply(ACK, 0);
        open.hears(slb, "header received", &reply, &reply);
        dropped(slb, "cookie once more", &forged);
    });
}

#[test]
#[ignore = "needs root"]
fn client_made_option_never_reaches_a_backend() {
    everywhere(BackendFlags::OPTION, OPTIONS, |slb, family, crosses, _| {
        let open = Connection::open(slb, family, crosses, 9_200, 0);
        open.accept(slb, 0);
        let foreign: Vec<u8> = [&[254, 8, 1, 2, 3, 4, 5, 6][..], &[30, 32], &[9; 30]].concat();
        let with = |frame: &Frame, flags| {
            let transport = Transport::Tcp { flags, options: foreign.clone() };
            Frame { transport, ..frame.clone() }
        };
        let ack = open.segment(ACK, 0, b"");
        let run = slb.run(WAN, &with(&ack, ACK).bytes());
        let ours = with_option(&Frame {
            transport: Transport::Tcp { flags: ACK, options: Vec::new() },
            ..ack.clone()
        });
        let ours = if family == 0 {
            let Transport::Tcp { flags, options } = ours.transport else { panic!("not TCP") };
            let options = [&options[..], &foreign[8..]].concat();
            Frame { transport: Transport::Tcp { flags, options }, ..ack }
        } else {
            ours
        };
        open.is_sent(&run, &open.syn, &ours, "replaced");
        let reply = open.reply(ACK, 1_u32.wrapping_neg());
        open.hears(slb, "told", &reply, &reply);
        let later = open.segment(ACK, 9, b"later");
        let run = slb.run(WAN, &with(&later, ACK).bytes());
        let blank = [&[1; 8][..], &foreign[8..]].concat();
        let transport = Transport::Tcp { flags: ACK, options: blank };
        let blank = Frame { transport, ..later };
        open.is_sent(&run, &open.syn, &blank, "blanked");
    });
}
