//! `slb explain` says what the packet path does.

use std::{net::SocketAddr, sync::Arc};

use proptest::{
    prelude::*,
    strategy::ValueTree as _,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use slb_common::{
    abi::{
        self, ACL_ALLOW, ACL_DENY, Address, BACKEND_CLOSED, BACKEND_IN_USE, BACKEND_SHARED,
        BACKEND_USABLE, Backend, LISTENER_CHOOSES, LISTENER_GUARDED, LISTENER_LIMITED, Limits,
        MODE_DSR, MODE_FULL, MODE_NAT, NO_BACKEND, NextHop, RevNat, SCHEDULER_HASH,
        SCHEDULER_LEAST, SCHEDULER_QUIC, SCHEDULER_RING, SCHEDULER_SOURCE, SLOT_KEEP, SLOT_LOOK,
    },
    verdict::Verdict,
};
use slb_user::{
    datapath::{Capacities, Explainer, Question},
    state::{Acl, ListenerState, Policy, Schedule, State},
};

use crate::{
    fixture::{
        FAMILIES, Slb, at, backend, client_of, datagram, endpoint, id, port, sender, syn, vip,
        with_capacities, with_slb,
    },
    fragments::fragments,
    frame::{ACK, Frame, L3, SYN, Transport, tagged},
    lab::{FIRST, LAN, SECOND, WAN},
};

const LISTENERS: u16 = 16;
const FIRST_PORT: u16 = 1_000;
const FLOWS: usize = 10_000;

/// A listener, and its backends.
#[derive(Clone, Debug)]
struct Drawn {
    is_tcp: bool,
    scheduler: u16,
    /// Weight, flags, mode and whether the way is known.
    backends: Vec<(u16, u32, u32, bool)>,
    /// What is or'ed to the slots.
    slots: u32,
    previous: bool,
    acl: u32,
    is_sticky: bool,
    is_limited: bool,
}

fn drawn() -> impl Strategy<Value = Drawn> {
    const USABLE: u32 = BACKEND_IN_USE | BACKEND_USABLE;
    let scheduler = prop::sample::select(vec![
        SCHEDULER_HASH,
        SCHEDULER_SOURCE,
        SCHEDULER_RING,
        SCHEDULER_LEAST,
        SCHEDULER_QUIC,
    ]);
    let flags = prop::sample::select(vec![USABLE, USABLE, BACKEND_IN_USE, USABLE | BACKEND_CLOSED]);
    let mode = prop::sample::select(vec![MODE_NAT, MODE_NAT, MODE_NAT, MODE_DSR, MODE_FULL]);
    let backend = (0_u16..=100, flags, mode, prop::bool::weighted(0.9));
    let slots = prop::sample::select(vec![0, 0, SLOT_LOOK, SLOT_LOOK | SLOT_KEEP]);
    let acl = prop::sample::select(vec![0, 0, 0, ACL_ALLOW, ACL_DENY]);
    let rest = (slots, any::<bool>(), acl, any::<bool>(), prop::bool::weighted(0.2));
    (any::<bool>(), scheduler, prop::collection::vec(backend, 0..5), rest).prop_map(
        |(is_tcp, scheduler, backends, (slots, previous, acl, is_sticky, is_limited))| Drawn {
            is_tcp,
            // Which is UDP.
            scheduler: if is_tcp && scheduler == SCHEDULER_QUIC {
                SCHEDULER_HASH
            } else {
                scheduler
            },
            backends,
            slots,
            previous,
            acl,
            is_sticky,
            is_limited,
        },
    )
}

/// Installs a listener; its number is also that of its backends, and of its port.
fn install(state: &mut State, number: u16, family: usize, drawn: &Drawn) {
    let id = u32::from(number) * 2 + family as u32;
    let proto = if drawn.is_tcp { abi::TCP } else { abi::UDP };
    let listener = endpoint(vip(family, FIRST_PORT + number), proto);
    let mut ids = Vec::new();
    for (index, &(weight, flags, mode, is_known)) in (0_u32..).zip(&drawn.backends) {
        let backend_id = 1_000 + id * 8 + index;
        let host = 20 + index;
        let addr = [format!("10.0.0.{host}"), format!("2001:db8:a::{host}")];
        let inside = at(&addr[family], 2_000 + number);
        let is_full = mode == MODE_FULL;
        let record = Backend {
            addr: Address::from(inside.ip()),
            port: inside.port().into(),
            flags: flags | if is_full { BACKEND_SHARED } else { 0 },
            idle_jiffies: 1_000_000,
            hop: match (is_known, index % 2) {
                (false, _) => NextHop::UNRESOLVED,
                (true, 0) => FIRST,
                _ => SECOND,
            },
            listener: id as u16,
            weight,
            mode,
            source: if is_full { 1 + 2 * family as u16 } else { 0 },
            sources: if is_full { 2 } else { 0 },
            ..Backend::default()
        };
        state.backends.insert(backend_id, record);
        let origin = RevNat {
            vip: listener.addr,
            port: listener.port,
            backend: backend_id,
            ..RevNat::default()
        };
        state.endpoints.insert(endpoint(inside, proto), origin);
        ids.push(backend_id);
    }
    let is_by_hash = abi::is_by_hash(drawn.scheduler);
    let slot = |slot: usize| {
        let Some(at) = slot.checked_rem(ids.len()) else { return NO_BACKEND };
        let flags = match () {
            () if !is_by_hash => 0,
            // Only an entry says what it sees as source.
            () if drawn.backends[at].2 == MODE_FULL => SLOT_LOOK | SLOT_KEEP,
            () => drawn.slots,
        };
        // One in so many has no backend.
        if slot % 31 == 30 && is_by_hash { NO_BACKEND } else { ids[at] | flags }
    };
    let len = if is_by_hash || drawn.scheduler == SCHEDULER_QUIC { 101 } else { ids.len() };
    let mut schedule = Schedule::new(drawn.scheduler, (0..len).map(slot).collect());
    if drawn.previous && !ids.is_empty() {
        schedule.previous = (0..97).map(|slot| ids[(slot * 7) % ids.len()]).collect();
        schedule.previous_scheduler = SCHEDULER_SOURCE;
    }
    let mut flags = drawn.acl;
    if drawn.is_sticky || matches!(drawn.scheduler, SCHEDULER_LEAST | SCHEDULER_QUIC) {
        flags |= LISTENER_CHOOSES;
    }
    if drawn.is_limited {
        flags |= LISTENER_LIMITED;
        // The next one is not needed.
        let (flow_ns, flow_burst) = (3_600_000_000_000, 50 * 3_600_000_000_000);
        state.limits.insert(id, Limits { flow_ns, flow_burst, ..Limits::default() });
    }
    if flags & (ACL_ALLOW | ACL_DENY | LISTENER_LIMITED) != 0 {
        flags |= LISTENER_GUARDED;
    }
    let sticky_jiffies = if drawn.is_sticky { 1_000_000 } else { 0 };
    let policy = Policy { flags, acl: 1 + family as u32, sticky_jiffies };
    state.listeners.insert(listener, ListenerState { id, schedule: Arc::new(schedule), policy });
}

/// A client's packet.
fn packet() -> impl Strategy<Value = (usize, u16, u16, u32, bool, bool)> {
    // Few clients and ports, so that many packets are of flows that are there.
    let port = prop_oneof![20 => 0..LISTENERS, 1 => LISTENERS..LISTENERS + 3];
    (0..2_usize, port, 0..60_u16, 100..104_u32, any::<bool>(), prop::bool::weighted(0.97))
}

/// Most are plain.
fn form() -> impl Strategy<Value = Form> {
    prop_oneof![
        16 => Just(Form::Plain),
        2 => Just(Form::Tagged),
        1 => Just(Form::FirstFragment),
        1 => Just(Form::LastHop),
    ]
}

/// Long enough to be sent in fragments. For QUIC it is a long header without a connection ID.
fn long(frame: &Frame) -> Frame {
    let mut payload = vec![0; 700];
    payload[0] = 0x80;
    Frame { payload, ..frame.clone() }
}

/// Where a frame went, and from where as its receiver sees it.
fn arrived(bytes: &[u8], family: usize) -> (SocketAddr, SocketAddr) {
    let l4 = L3 + if family == 0 { 20 } else { 40 };
    let port = u16::from_be_bytes([bytes[l4 + 2], bytes[l4 + 3]]);
    let dst: std::net::IpAddr = if family == 0 {
        <[u8; 4]>::try_from(&bytes[L3 + 16..L3 + 20]).expect("4 bytes").into()
    } else {
        <[u8; 16]>::try_from(&bytes[L3 + 24..L3 + 40]).expect("16 bytes").into()
    };
    (SocketAddr::new(dst, port), sender(bytes, family))
}

fn draw<T>(runner: &mut TestRunner, strategy: &impl Strategy<Value = T>) -> T {
    strategy.new_tree(runner).expect("a value").current()
}

/// In which form a frame is sent. What becomes of it is the same, but for its TTL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Plain,
    /// With a VLAN tag, which is taken off and put back.
    Tagged,
    /// As the first fragment of a larger packet.
    FirstFragment,
    /// It may not be sent any further.
    LastHop,
}

impl Form {
    const TAG: (u16, u16) = (0x8100, 7);

    fn bytes(self, frame: &Frame) -> Vec<u8> {
        match self {
            Self::Plain => frame.bytes(),
            Self::Tagged => tagged(&frame.bytes(), &[Self::TAG]),
            Self::FirstFragment => fragments(&long(frame), 0x77)[0].clone(),
            Self::LastHop => frame.clone().ttl(1).bytes(),
        }
    }

    /// What arrived, without what only this form has.
    fn plain(self, mut bytes: Vec<u8>, family: usize) -> Vec<u8> {
        match self {
            Self::Tagged => {
                assert_eq!(bytes[12..16], [0x81, 0, 0, 7], "the tag is put back");
                bytes.drain(12..16);
            }
            Self::FirstFragment if family == 1 => {
                bytes.drain(L3 + 40..L3 + 48);
            }
            _ => {}
        }
        bytes
    }

    /// What may become of it, given the verdict on a plain frame.
    fn verdicts(self, plain: Verdict) -> Vec<Verdict> {
        match (self, plain) {
            (Self::LastHop, Verdict::Forwarded) => vec![Verdict::TtlExpired],
            // Both the schedule and the backend that it names can be why a frame is reset; its TTL is looked at
            // between them.
            (Self::LastHop, Verdict::Reset | Verdict::Closed) => vec![plain, Verdict::TtlExpired],
            // No reset answers a fragment.
            (Self::FirstFragment, Verdict::Reset) => vec![Verdict::NoFlow],
            (Self::FirstFragment, Verdict::Closed) => vec![Verdict::ClosedDropped],
            _ => vec![plain],
        }
    }
}

/// Explains what a frame would meet, sends it by an interface, and compares. `asked` is the interface that the question
/// names.
fn compare(
    slb: &mut Slb<'_>,
    explainer: &Explainer,
    frame: &Frame,
    form: Form,
    [ingress, asked]: [u32; 2],
) -> Verdict {
    let key = frame.key();
    let is_established =
        matches!(&frame.transport, Transport::Tcp { flags, .. } if flags & SYN == 0);
    let question = Question {
        proto: key.proto,
        src: frame.src,
        dst: frame.dst,
        is_established,
        ingress: asked,
    };
    let now = slb.now();
    let told = explainer.explain(&question, now).expect("the maps");
    let case = format!("{form:?} {frame:?}: {:#?}", told.steps);
    let run = slb.run(ingress, &form.bytes(frame));
    let plain = told.verdict.expect("a verdict");
    assert!(
        form.verdicts(plain).contains(&run.verdict),
        "{:?} and not {plain:?}: {case}",
        run.verdict
    );
    let family = usize::from(frame.src.is_ipv6());
    let is_sent = matches!(run.verdict, Verdict::Forwarded | Verdict::ForwardedByKernel);
    if is_sent {
        let (to, from) = arrived(&form.plain(run.bytes, family), family);
        let is_direct =
            told.backend.is_some_and(|id| slb.maps.installed().backends[&id].mode == MODE_DSR);
        let expected = if is_direct { Some(frame.dst) } else { told.to };
        assert_eq!(expected, Some(to), "{case}");
        if let Some(said) = told.from {
            assert_eq!(said, from, "{case}");
        }
    } else if run.verdict == plain {
        assert_eq!(told.backend, None, "{case}");
    }
    run.verdict
}

#[test]
#[ignore = "needs root"]
fn given_a_backend_as_client_when_its_flows_are_explained_then_its_side_of_the_gateway_counts() {
    with_slb(|slb| {
        let explainer = Explainer::open(&slb.pins()).expect("the maps");
        for family in FAMILIES {
            let number = id::HTTP + family as u32;
            slb.backend(number, |backend| {
                backend.source = 1 + 2 * family as u16;
                backend.sources = 2;
            });
            let to = vip(family, port::HTTP);
            let host = backend(0, family, 5_000);
            for ack in [false, true] {
                let frame = if ack { syn(host, to).flags(ACK) } else { syn(host, to) };
                // The agent's maps know the interface of a backend; 0 asks them.
                for asked in [0, LAN] {
                    let verdict = compare(slb, &explainer, &frame, Form::Plain, [LAN, asked]);
                    assert_eq!(verdict, Verdict::Forwarded);
                }
            }
            let question = Question {
                proto: abi::TCP,
                src: backend(0, family, 5_001),
                dst: to,
                is_established: false,
                ingress: 0,
            };
            let told = explainer.explain(&question, slb.now()).expect("the maps");
            let says = |text: &str| told.steps.iter().any(|step| step.found.contains(text));
            assert!(says("sees an address of the gateway"), "{:#?}", told.steps);
            assert_eq!(told.from, None, "the port is drawn later");
            // By another interface it is a client like any other.
            let other = syn(backend(0, family, 6_000), to);
            let verdict = compare(slb, &explainer, &other, Form::Plain, [WAN, WAN]);
            assert_eq!(verdict, Verdict::Forwarded);
        }
    });
}

#[test]
#[ignore = "needs root"]
fn given_a_random_configuration_when_flows_are_explained_then_that_is_what_becomes_of_them() {
    with_capacities(Capacities { flows: 1 << 14, chunks: 512 }, |slb| {
        let seed = std::env::var("SLB_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(7);
        let seed = [seed; 32];
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
        let mut runner = TestRunner::new_with_rng(Config::default(), rng);
        let explainer = Explainer::open(&slb.pins()).expect("the maps");
        let mut seen = std::collections::BTreeMap::<&str, usize>::new();
        for _ in 0..5 {
            let listeners: Vec<Drawn> =
                (0..LISTENERS).map(|_| draw(&mut runner, &drawn())).collect();
            slb.change(|state| {
                for family in 0..2 {
                    let bits = if family == 0 { 96 + 24 } else { 48 };
                    let listed = |net| {
                        let addr = client_of(net, family, 0).ip();
                        (abi::listed_bits(bits), Address::from(addr))
                    };
                    let acl: Acl = [listed(100), listed(102)].into();
                    state.acls.insert(1 + family as u32, Arc::new(acl));
                    for (number, drawn) in (0..).zip(&listeners) {
                        // Of the other protocol before.
                        for proto in [abi::TCP, abi::UDP] {
                            let at = endpoint(vip(family, FIRST_PORT + number), proto);
                            state.listeners.remove(&at);
                        }
                        install(state, number, family, drawn);
                    }
                }
            });
            for _ in 0..FLOWS / 5 {
                let (family, number, sport, net, begins, is_right) = draw(&mut runner, &packet());
                let drawn = listeners.get(usize::from(number));
                let is_tcp = drawn.is_none_or(|drawn| drawn.is_tcp) == is_right;
                let (from, to) =
                    (client_of(net, family, 30_000 + sport), vip(family, FIRST_PORT + number));
                let frame = match (is_tcp, begins) {
                    (true, true) => syn(from, to),
                    (true, false) => syn(from, to).flags(ACK),
                    (false, _) => datagram(from, to),
                };
                let form = draw(&mut runner, &form());
                let verdict = compare(slb, &explainer, &frame, form, [WAN; 2]);
                *seen.entry(verdict.label()).or_default() += 1;
            }
        }
        for verdict in [
            Verdict::Forwarded,
            Verdict::ForwardedByKernel,
            Verdict::NoBackend,
            Verdict::NoNeighbour,
            Verdict::NoListener,
            Verdict::Reset,
            Verdict::Denied,
            Verdict::FlowLimit,
            Verdict::Closed,
            Verdict::TtlExpired,
        ] {
            assert!(seen.contains_key(verdict.label()), "{verdict:?} is not among {seen:?}");
        }
        assert_eq!(seen.values().sum::<usize>(), FLOWS);
    });
}
