//! Segments by which a hostile client could get its own bytes to a backend before the header that names it, or
//! its own option beside ours: `docs/adr/0021-client-address-cannot-be-forged.md` has the states.

use slb_common::{
    abi::{BackendFlags, ConnState, Flow, REFRESH_JIFFIES},
    verdict::Verdict,
};

use crate::{
    connection::{
        Connection, HEADERS, OPTIONS, everywhere, headed, with_ack, with_mss, with_option,
    },
    fixture::Slb,
    frame::{ACK, FIN, Frame, PSH, RST, SYN, Transport, URG},
    lab::{LAN, WAN},
    receiver::Segment,
};

/// How a flow's backend stands to its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It has not answered the SYN.
    Offered,
    /// Its SYN-ACK was seen.
    Accepted,
    /// It has acknowledged the header, or a byte behind the option.
    Told,
}

/// A connection in some state. `shift` is the header's length, or 0 for the option.
fn brought_to(slb: &mut Slb<'_>, open: &Connection, state: State, shift: u32) {
    if state != State::Offered {
        open.accept(slb, shift);
    }
    if state == State::Told {
        let missing = if shift == 0 { 1_u32.wrapping_neg() } else { 0 };
        let reply = open.reply(ACK, missing);
        open.hears(slb, "told", &reply, &reply);
    }
    assert_eq!(state_of(&flow(slb, open)), state);
}

fn flow(slb: &Slb<'_>, open: &Connection) -> Flow {
    slb.flow(&open.syn).expect("an entry")
}

fn state_of(flow: &Flow) -> State {
    match flow.state() & (ConnState::ANSWERED | ConnState::PROXY_PENDING) {
        ConnState::PROXY_PENDING => State::Offered,
        ConnState::ANSWERED => State::Told,
        both if both == ConnState::ANSWERED | ConnState::PROXY_PENDING => State::Accepted,
        neither => panic!("state {neither:?}"),
    }
}

fn is_dropped(slb: &mut Slb<'_>, case: &str, frame: &Frame) {
    let verdict = slb.run(WAN, &frame.bytes()).verdict;
    assert_eq!(verdict, Verdict::BeforeClientAddress, "{case}");
}

/// A frame with these options in place of its own.
fn with_options(frame: &Frame, options: &[u8]) -> Frame {
    let Transport::Tcp { flags, .. } = frame.transport else { panic!("not TCP") };
    Frame { transport: Transport::Tcp { flags, options: options.to_vec() }, ..frame.clone() }
}

#[test]
#[ignore = "needs root"]
fn given_an_untold_backend_when_a_segment_is_urgent_then_the_urgent_pointer_is_cleared() {
    everywhere(BackendFlags::PROXY, HEADERS, |slb, family, crosses, len| {
        let case = |what: &str| format!("{what}, family {family}, crosses: {crosses}");
        let open = Connection::open(slb, family, crosses, 1_000, len);
        brought_to(slb, &open, State::Accepted, len);
        let urgent =
            |frame: &Frame, pointer| Frame { urgent: pointer, ..frame.clone() }.flags(ACK | URG);
        for at in [0, 5] {
            for pointer in [1, 0, u16::MAX] {
                let data = open.segment(ACK, at, b"odd");
                let expected = if at == 0 { headed(&data) } else { data.clone() };
                open.sends(slb, &case("cleared"), &urgent(&data, pointer), &expected);
                // Without the flag it means nothing, to most.
                let quiet = Frame { urgent: pointer, ..data };
                open.sends(slb, &case("no flag"), &quiet, &expected);
            }
        }

        let reply = open.reply(ACK, 0);
        open.hears(slb, &case("header received"), &reply, &reply);
        let data = urgent(&open.segment(ACK, 0, b"odd"), 2);
        open.sends(slb, &case("stays when told"), &data, &data);
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_flow_when_another_connection_is_accepted_then_its_entry_is_removed() {
    for (flag, lens) in [(BackendFlags::PROXY, HEADERS), (BackendFlags::OPTION, OPTIONS)] {
        everywhere(flag, lens, |slb, family, crosses, len| {
            let shift = if flag == BackendFlags::PROXY { len } else { 0 };
            let mut sport = 2_000;
            for state in [State::Accepted, State::Told] {
                for [first, own] in [[1, 0], [0, 1], [0, 1 << 31], [u32::MAX, 0], [9, 9]] {
                    let case = format!("{state:?}, {first} and {own}, family {family}, {crosses}");
                    sport += 1;
                    let open = Connection::open(slb, family, crosses, sport, shift);
                    brought_to(slb, &open, state, shift);
                    let again = open.reply(SYN | ACK, shift);
                    let seen = with_mss(with_ack(&again, open.first()), 1_460 - len as u16);
                    open.hears(slb, &format!("again, {case}"), &again, &seen);
                    assert_eq!(state_of(&flow(slb, &open)), state, "{case}");

                    let ack = again.ack.wrapping_add(first);
                    let other = Frame { ack, seq: again.seq.wrapping_add(own), ..again };
                    let run = slb.run(LAN, &other.bytes());
                    assert_eq!(run.verdict, Verdict::BeforeClientAddress, "{case}");
                    assert_eq!(slb.flow(&open.syn), None, "{case}");
                    let data = open.segment(ACK, 0, b"odd");
                    assert_eq!(slb.run(WAN, &data.bytes()).verdict, Verdict::Reset, "{case}");
                }
            }
        });
    }
}

#[test]
#[ignore = "needs root"]
fn given_a_connection_that_was_reset_when_its_ports_are_used_again_then_all_begins_anew() {
    everywhere(BackendFlags::PROXY, HEADERS, |slb, family, crosses, len| {
        let case = |what: &str| format!("{what}, family {family}, crosses: {crosses}");
        let mut sources = Vec::new();
        for isn in [70_000, 70_000, 5] {
            // The reply's entry of the one before is still there.
            let open = Connection::open_at(slb, family, crosses, 3_000, len, [isn, 9]);
            sources.push(open.source);
            let data = open.segment(ACK | PSH, 0, b"odd");
            is_dropped(slb, &case("no SYN-ACK yet"), &data);
            is_dropped(slb, &case("own header"), &open.segment(ACK, len.wrapping_neg(), &[7; 80]));
            brought_to(slb, &open, State::Accepted, len);
            open.sends(slb, &case("data"), &data, &headed(&data));
            let reply = open.reply(ACK, 0);
            open.hears(slb, &case("header received"), &reply, &reply);
            // By the backend: anyone may send in the client's name.
            let reset = open.reply(RST | ACK, 0);
            open.hears(slb, &case("reset"), &reset, &reset);
        }
        sources.sort_unstable();
        sources.dedup();
        assert!(sources.len() > 1, "{}: {sources:?}", case("a port at random"));
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_lost_reply_entry_when_the_client_goes_on_then_only_the_backend_s_syn_ack_brings_it_back()
{
    everywhere(BackendFlags::PROXY, HEADERS, |slb, family, crosses, len| {
        let case = |what: &str| format!("{what}, family {family}, crosses: {crosses}");
        let open = Connection::open(slb, family, crosses, 4_000, len);
        brought_to(slb, &open, State::Accepted, len);
        let (data, later) = (open.segment(ACK, 0, b"odd"), open.segment(ACK, 3, b"more"));
        let ready = open.reply(ACK, 0);
        slb.flows.remove(&open.reply_key());
        // Another flow's by now.
        slb.tamper(&open.syn, |flow| flow.peer = 0);

        is_dropped(slb, &case("whose acknowledgement?"), &later);
        open.sends(slb, &case("the header"), &data, &headed(&data));
        assert_eq!(slb.run(LAN, &ready.bytes()).verdict, Verdict::NotOurs, "{}", case("not known"));

        // The client's packets make it again, without the backend's number.
        slb.age(&open.syn, REFRESH_JIFFIES + 10);
        open.sends(slb, &case("made again"), &data, &headed(&data));
        assert_eq!(slb.flows.get(&open.reply_key()).expect("an entry").sequence, 0);
        is_dropped(slb, &case("no number"), &later);
        is_dropped(slb, &case("the number 0"), &with_ack(&later, 0));
        open.hears(slb, &case("no proof"), &ready, &ready);
        assert_eq!(state_of(&flow(slb, &open)), State::Accepted);

        let again = open.reply(SYN | ACK, len);
        let seen = with_mss(with_ack(&again, open.first()), 1_460 - len as u16);
        open.hears(slb, &case("the SYN-ACK again"), &again, &seen);
        open.sends(slb, &case("its number is known"), &later, &later);
        open.hears(slb, &case("proof"), &ready, &ready);
        assert_eq!(state_of(&flow(slb, &open)), State::Told);
    });
}

#[test]
#[ignore = "needs root"]
fn given_numbers_that_wrap_around_when_a_connection_begins_then_nothing_changes() {
    everywhere(BackendFlags::PROXY, HEADERS, |slb, family, crosses, len| {
        let numbers = [u32::MAX, u32::MAX - 1, 0, 5, len - 1, len, i32::MAX as u32, 1 << 31];
        let pairs = numbers.into_iter().flat_map(|isn| [[isn, 1 << 31], [77, isn], [isn, isn]]);
        // A backend that counts from 0 is one whose number is not known.
        for (sport, [isn, own]) in (5_000..).zip(pairs.filter(|[_, own]| *own != u32::MAX)) {
            let case = |what: &str| format!("{what}, {isn} and {own}, family {family}, {crosses}");
            let open = Connection::open_at(slb, family, crosses, sport, len, [isn, own]);
            let reply = open.reply(SYN | ACK, len);
            let seen = with_mss(with_ack(&reply, open.first()), 1_460 - len as u16);
            open.hears(slb, &case("SYN-ACK"), &reply, &seen);
            let data = open.segment(ACK | PSH, 0, b"odd");
            open.sends(slb, &case("data"), &data, &headed(&data));
            for at in [1, 0xffff] {
                let later = open.segment(ACK, at, b"later");
                open.sends(slb, &case("behind"), &later, &later);
            }
            for at in [1 << 16, len.wrapping_neg(), 1 << 31, 2_u32.wrapping_neg()] {
                is_dropped(slb, &case("elsewhere"), &open.segment(ACK, at, b"a"));
            }
            for missing in [len, 1] {
                let reply = open.reply(ACK, missing);
                open.hears(slb, &case("raised"), &reply, &with_ack(&reply, open.first()));
            }
            // Neither before its first byte, nor too far behind it.
            for (ack, seq) in [(len + 1, 0), (0, u32::MAX), (0, 1 << 20), (u32::MAX << 17, 0)] {
                let other = open.reply(ACK, ack);
                let other = Frame { seq: other.seq.wrapping_add(seq), ..other };
                open.hears(slb, &case("no proof"), &other, &other);
                assert_eq!(state_of(&flow(slb, &open)), State::Accepted, "{ack} {seq}");
            }
            let reply = open.reply(ACK, 3_u32.wrapping_neg());
            open.hears(slb, &case("proof"), &reply, &reply);
            open.sends(slb, &case("told"), &data, &data);
            is_dropped(slb, &case("again"), &open.segment(ACK, len.wrapping_neg(), b"a"));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_backend_without_a_window_when_its_client_probes_then_the_header_stays_first() {
    everywhere(BackendFlags::PROXY, HEADERS, |slb, family, crosses, len| {
        let case = |what: &str| format!("{what}, family {family}, crosses: {crosses}");
        let open = Connection::open(slb, family, crosses, 6_000, len);
        let closed = |frame: &Frame| Frame { window: 0, ..frame.clone() };
        let reply = closed(&open.reply(SYN | ACK, len));
        let seen = with_mss(with_ack(&reply, open.first()), 1_460 - len as u16);
        open.hears(slb, &case("SYN-ACK"), &reply, &seen);
        let ack = open.segment(ACK, 0, b"");
        open.sends(slb, &case("ACK"), &ack, &headed(&ack));
        // It takes the header byte by byte.
        for missing in [len, len - 1, 1] {
            let reply = closed(&open.reply(ACK, missing));
            open.hears(slb, &case("no window"), &reply, &with_ack(&reply, open.first()));
            let probe = open.segment(ACK, u32::MAX, b"");
            open.sends(slb, &case("an empty probe"), &probe, &probe);
            is_dropped(slb, &case("not empty"), &open.segment(ACK, u32::MAX, b"a"));
            is_dropped(slb, &case("a FIN"), &open.segment(FIN | ACK, u32::MAX, b""));
            is_dropped(slb, &case("earlier"), &open.segment(ACK, u32::MAX - 1, b""));
            let byte = open.segment(ACK, 0, b"a");
            open.sends(slb, &case("a byte"), &byte, &headed(&byte));
            assert_eq!(state_of(&flow(slb, &open)), State::Accepted);
        }
        let reply = closed(&open.reply(ACK, 0));
        open.hears(slb, &case("header received"), &reply, &reply);
        let byte = open.segment(ACK, 0, b"a");
        open.sends(slb, &case("told"), &byte, &byte);
    });
}

#[test]
#[ignore = "needs root"]
fn given_an_untold_backend_when_a_keepalive_acknowledges_more_than_the_syn_ack_then_it_is_dropped()
{
    everywhere(BackendFlags::PROXY, HEADERS, |slb, family, crosses, len| {
        let open = Connection::open(slb, family, crosses, 6_500, len);
        brought_to(slb, &open, State::Accepted, len);
        let probe = open.segment(ACK, u32::MAX, b"");
        open.sends(slb, "a keepalive", &probe, &probe);
        // To a backend with SYN cookies that is the end of a handshake.
        for more in [len - 1, 1, u32::MAX] {
            let other = with_ack(&probe, open.own.wrapping_add(more));
            is_dropped(slb, &format!("{more} more, family {family}, {crosses}"), &other);
        }
        let reply = open.reply(ACK, 0);
        open.hears(slb, "header received", &reply, &reply);
        let later = with_ack(&probe, open.own.wrapping_add(9_999));
        open.sends(slb, "told", &later, &later);
    });
}

#[test]
#[ignore = "needs root"]
fn given_both_sides_that_open_when_their_segments_cross_then_the_flow_does_not_move_on() {
    for (flag, lens) in [(BackendFlags::PROXY, HEADERS), (BackendFlags::OPTION, OPTIONS)] {
        everywhere(flag, lens, |slb, family, crosses, len| {
            let shift = if flag == BackendFlags::PROXY { len } else { 0 };
            let case = |what: &str| format!("{what}, family {family}, crosses: {crosses}");
            let open = Connection::open(slb, family, crosses, 7_000, shift);
            // The backend calls the client, which answers that.
            let call = Frame { payload: Vec::new(), ..open.reply(SYN, 0) };
            open.hears(slb, &case("a SYN of the backend's"), &call, &call);
            assert_eq!(state_of(&flow(slb, &open)), State::Offered);
            for at in [u32::MAX, 0, shift.wrapping_neg().wrapping_sub(1)] {
                is_dropped(slb, &case("its answer"), &open.segment(SYN | ACK, at, b""));
            }
            assert_eq!(state_of(&flow(slb, &open)), State::Offered);
            if flag == BackendFlags::PROXY {
                is_dropped(slb, &case("data"), &open.segment(ACK, 0, b"odd"));
            }

            for state in [State::Accepted, State::Told] {
                let open = Connection::open(slb, family, crosses, 7_001, shift);
                brought_to(slb, &open, state, shift);
                for flags in [SYN | ACK, SYN | FIN, SYN | RST] {
                    is_dropped(slb, &case("no plain SYN"), &open.segment(flags, u32::MAX, b""));
                }
                let early = Frame { payload: b"early".to_vec(), ..open.syn.clone() };
                is_dropped(slb, &case("data"), &early);
                slb.flows.clear();
            }
        });
    }
}

#[test]
#[ignore = "needs root"]
fn given_a_told_backend_when_numbers_are_those_of_a_syn_cookie_then_they_cannot_begin_a_connection()
{
    everywhere(BackendFlags::PROXY, HEADERS, |slb, family, crosses, len| {
        let open = Connection::open(slb, family, crosses, 8_000, len);
        brought_to(slb, &open, State::Told, len);
        // From the header's number on, and from the backend's.
        let segment = |at: u32, answers: u32| {
            let data = open.segment(ACK | PSH, at.wrapping_sub(len), b"forged");
            with_ack(&data, open.own.wrapping_add(answers))
        };
        for at in [0, 1, 2, 3, len, len + 1, 1_000, 1 << 31, u32::MAX] {
            for off in -5_i32..=5 {
                let answers = at.wrapping_add_signed(off);
                let case = format!("{at} and {answers}, family {family}, crosses: {crosses}");
                let data = segment(at, answers);
                if off.abs() > 3 {
                    open.sends(slb, &case, &data, &data);
                } else if answers == 0 {
                    is_dropped(slb, &case, &data);
                } else {
                    let less = with_ack(&data, data.ack.wrapping_sub(7));
                    open.sends(slb, &case, &data, &less);
                    let end = Frame { payload: Vec::new(), ..data }.flags(FIN | ACK);
                    open.sends(slb, &case, &end, &with_ack(&end, less.ack));
                    let alone = end.flags(ACK);
                    let more = Frame { seq: alone.seq.wrapping_add(7), ..alone.clone() };
                    open.sends(slb, &case, &alone, &more);
                }
            }
        }
        let reset = segment(9, 9).flags(RST | ACK);
        open.sends(slb, "a reset", &reset, &reset);
        let none = segment(9, 9).flags(PSH);
        open.sends(slb, "no acknowledgement", &none, &none);
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_told_backend_when_no_syn_cookie_can_be_good_any_more_then_all_numbers_pass() {
    everywhere(BackendFlags::PROXY, HEADERS, |slb, family, crosses, len| {
        let case = |what: &str| format!("{what}, family {family}, crosses: {crosses}");
        let open = Connection::open(slb, family, crosses, 8_500, len);
        brought_to(slb, &open, State::Told, len);
        let data = with_ack(&open.segment(ACK, 0, b"odd"), open.own.wrapping_add(len));
        let less = with_ack(&data, data.ack.wrapping_sub(7));
        open.sends(slb, &case("young"), &data, &less);
        let mut minutes = 0;
        slb.set(|settings| minutes = 2 * settings.opening_jiffies);
        let age = |slb: &mut Slb<'_>, jiffies: u32| {
            let units = (jiffies >> 8) as u16;
            slb.flows
                .change(&open.reply_key(), |reply| reply.port = reply.port.wrapping_sub(units));
        };
        age(slb, minutes - 1_024);
        open.sends(slb, &case("nearly two minutes"), &data, &less);
        age(slb, 2_048);
        open.sends(slb, &case("old"), &data, &data);

        // A lost entry does not say how old it was.
        slb.flows.remove(&open.reply_key());
        slb.tamper(&open.syn, |flow| flow.peer = 0);
        open.sends(slb, &case("not known"), &data, &less);
        slb.age(&open.syn, REFRESH_JIFFIES + 10);
        open.sends(slb, &case("made again"), &data, &less);
        let replayed = open.segment(ACK, len.wrapping_neg(), b"forged");
        let less = with_ack(&replayed, replayed.ack.wrapping_sub(7));
        open.sends(slb, &case("made again, the first number"), &replayed, &less);
    });
}

#[test]
#[ignore = "needs root"]
fn given_an_accepted_connection_when_a_client_begins_another_then_it_does_not_know_its_number() {
    everywhere(BackendFlags::PROXY, HEADERS, |slb, family, crosses, len| {
        for (sport, state) in [(9_000, State::Accepted), (9_001, State::Told)] {
            let case = |what: &str| format!("{what}, {state:?}, family {family}, {crosses}");
            let open = Connection::open(slb, family, crosses, sport, len);
            brought_to(slb, &open, state, len);
            if state == State::Accepted {
                let shifted = Frame { seq: open.syn.seq.wrapping_sub(len), ..open.syn.clone() };
                open.sends(slb, &case("its own again"), &open.syn, &shifted);
            }
            let mut seen = Vec::new();
            for at in [len, len + 1, 1, 1 << 31, len] {
                let other = Frame { seq: open.syn.seq.wrapping_add(at), ..open.syn.clone() };
                let run = slb.run(WAN, &other.bytes());
                let seq = Segment::read(&run.bytes).seq;
                open.is_sent(&run, &other, &Frame { seq, ..other.clone() }, &case("another"));
                seen.push(seq);
                assert_eq!(state_of(&flow(slb, &open)), state);
            }
            let near = |seq: &u32| seq.wrapping_sub(open.syn.seq).wrapping_add(1 << 20) < 1 << 21;
            assert!(seen.iter().filter(|seq| near(seq)).count() < 2, "{}: {seen:x?}", case("near"));
            assert_ne!(seen[0], seen[4], "{}", case("at random"));
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_syn_with_options_for_fast_open_when_it_is_sent_on_then_they_are_blanked() {
    let mss = [2, 4, 0x05, 0xb4];
    let cookie = [34, 10, 1, 2, 3, 4, 5, 6, 7, 8];
    // RFC 6994: the experiment 0xf989 is TCP Fast Open.
    let experiment = [254, 12, 0xf9, 0x89, 1, 2, 3, 4, 5, 6, 7, 8];
    let foreign = [254, 8, 1, 2, 3, 4, 5, 6];
    let none = |len: usize| vec![1; len];
    let cases: [(&str, Vec<u8>, Vec<u8>); 5] = [
        ("a request", [&mss[..], &[34, 2, 1, 1]].concat(), [&mss[..], &none(4)].concat()),
        ("a cookie", [&mss[..], &cookie, &[1, 1]].concat(), [&mss[..], &none(12)].concat()),
        ("an experiment", [&experiment[..], &mss].concat(), [&none(12)[..], &mss].concat()),
        ("a client", [&mss[..], &foreign].concat(), [&mss[..], &none(8)].concat()),
        (
            "all",
            [&cookie[..], &[1, 1], &experiment, &foreign, &mss].concat(),
            [&none(32)[..], &mss].concat(),
        ),
    ];
    for (flag, lens) in [(BackendFlags::PROXY, HEADERS), (BackendFlags::OPTION, OPTIONS)] {
        everywhere(flag, lens, |slb, family, crosses, len| {
            let shift = if flag == BackendFlags::PROXY { len } else { 0 };
            let open = Connection::open(slb, family, crosses, 9_500, shift);
            let again = |options: &[u8], shift: u32| {
                let syn = with_options(&open.syn, options);
                Frame { seq: syn.seq.wrapping_sub(shift), ..syn }
            };
            for state in [State::Offered, State::Accepted] {
                if state == State::Accepted {
                    brought_to(slb, &open, state, shift);
                }
                for (what, found, made) in &cases {
                    let case = format!("{what}, {state:?}, family {family}, crosses: {crosses}");
                    open.sends(slb, &case, &again(found, 0), &again(made, shift));
                }
            }
        });
    }
}

#[test]
#[ignore = "needs root"]
fn given_the_option_when_the_first_byte_is_sent_again_then_its_client_is_told_again() {
    everywhere(BackendFlags::OPTION, OPTIONS, |slb, family, crosses, _| {
        let case = |what: &str| format!("{what}, family {family}, crosses: {crosses}");
        let open = Connection::open(slb, family, crosses, 9_700, 0);
        // Even what comes before the SYN-ACK.
        let data = open.segment(ACK, 0, b"odd");
        open.sends(slb, &case("offered"), &data, &with_option(&data));
        brought_to(slb, &open, State::Accepted, 0);
        // What the backend acknowledges of the SYN alone is no proof.
        let reply = open.reply(ACK, 0);
        open.hears(slb, &case("no byte"), &reply, &reply);
        let later = open.segment(ACK, 70_000, b"odd");
        open.sends(slb, &case("untold"), &later, &with_option(&later));
        brought_to(slb, &open, State::Told, 0);
        open.sends(slb, &case("told"), &data, &with_option(&data));
        let plain = with_options(&data, &[]);
        open.sends(slb, &case("told, no options"), &plain, &with_option(&plain));
        open.sends(slb, &case("told, later"), &later, &later);
    });
}
