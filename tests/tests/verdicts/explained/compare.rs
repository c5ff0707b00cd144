//! Explains what a packet would meet, sends it, and compares.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
};

use slb_common::{
    abi::{Address, Backend, Mode},
    verdict::Verdict,
};
use slb_user::datapath::{Explainer, Explanation, Kind, Part, Question};

use super::world::CROSSING;
use crate::{
    fixture::{Run, Slb, VIPS, at},
    frame::L3,
};

/// A packet, and the question that describes it.
#[derive(Clone)]
pub(super) struct Sample {
    pub question: Question,
    pub ingress: u32,
    pub bytes: Vec<u8>,
}

/// Where a packet went, as its receiver sees it; without ports where it has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Arrived {
    pub from: SocketAddr,
    pub to: SocketAddr,
}

/// What has been compared up to now.
#[derive(Default)]
pub(super) struct Tally {
    seen: BTreeMap<&'static str, usize>,
    /// What explanations have looked at.
    looks: BTreeSet<&'static str>,
    /// Modes of backends that packets have been sent to, as [`Mode::NAT`] and the others.
    modes: BTreeSet<Mode>,
    /// How often the explanation could not tell the verdict.
    pub unknown: usize,
    last: Option<Arrived>,
}

impl Tally {
    /// Explains a packet, sends it, and compares verdict, backend, and the addresses that it has afterwards.
    pub(super) fn compare(
        &mut self,
        slb: &mut Slb<'_>,
        explainer: &Explainer,
        sample: &Sample,
    ) -> Verdict {
        let Sample { question, ingress, bytes } = sample;
        let told = explainer.explain(question, slb.now()).expect("the maps");
        let run = slb.run(*ingress, bytes);
        *self.seen.entry(run.verdict.label()).or_default() += 1;
        self.looks.extend(told.steps.iter().map(|step| step.what));
        self.last = None;
        let case = format!("{question:#?}: {told:#?}");
        let Some(verdict) = told.verdict else {
            self.unknown += 1;
            assert!(may_be_unknown(question, run.verdict), "{:?}: {case}", run.verdict);
            return run.verdict;
        };
        assert_eq!(run.verdict, verdict, "the packet path and its explanation: {case}");
        if matches!(verdict, Verdict::Forwarded | Verdict::ForwardedByKernel) {
            let id = told.backend.unwrap_or_else(|| panic!("no backend: {case}"));
            let backend = slb.maps.installed().backends[&id];
            self.modes.insert(backend.mode);
            self.last = Some(check(&run, question, &told, &backend, &case));
        } else {
            assert_eq!(told.backend, None, "{case}");
        }
        verdict
    }

    /// Where the last packet went, if to a backend that it was translated for.
    pub(super) const fn last(&self) -> Option<Arrived> {
        self.last
    }

    pub(super) fn samples(&self) -> usize {
        self.seen.values().sum()
    }

    /// What is compared is worth something: these verdicts, each mode and each look are among it.
    pub(super) fn assert_covers(&self, verdicts: &[Verdict], looks: &[&'static str]) {
        for verdict in verdicts {
            assert!(self.seen.contains_key(verdict.label()), "{verdict:?} is not among {self}");
        }
        assert_eq!(self.looks, looks.iter().copied().collect(), "{self}");
        let modes = [Mode::NAT, Mode::DSR, Mode::IPIP, Mode::GUE, Mode::FULL];
        assert_eq!(self.modes, modes.into(), "{self}");
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}, {} not told", self.seen, self.unknown)
    }
}

/// What depends on the kernel's routes, or on the numbers of a segment.
fn may_be_unknown(question: &Question, verdict: Verdict) -> bool {
    let is_to_client = matches!(
        verdict,
        Verdict::Replied
            | Verdict::RepliedByKernel
            | Verdict::NoRoute
            | Verdict::NotOurs
            | Verdict::TtlExpired
    );
    let is_about_header = matches!(verdict, Verdict::Forwarded | Verdict::BeforeClientAddress);
    match question.kind {
        Kind::Error => is_to_client,
        // What a backend sends.
        Kind::Transport if !is_vip(question.dst.ip()) => verdict != Verdict::Martian,
        Kind::Transport => question.is_established && is_about_header,
        Kind::Echo => false,
    }
}

fn is_vip(addr: IpAddr) -> bool {
    VIPS.iter().chain(&CROSSING).any(|vip| at(vip, 0).ip() == addr)
}

/// Compares a packet that was sent to a backend with what was told.
fn check(
    run: &Run,
    question: &Question,
    told: &Explanation,
    backend: &Backend,
    case: &str,
) -> Arrived {
    let bytes = untagged(&run.bytes);
    if run.verdict == Verdict::Forwarded {
        assert_eq!(bytes[..6], backend.hop.dst_mac, "{case}");
    }
    let has_ports = question.kind == Kind::Transport && !matches!(question.part, Part::Later(_));
    let arrived = arrived(&bytes, has_ports);
    let addr = IpAddr::from(backend.addr);
    match backend.mode {
        Mode::NAT | Mode::FULL => {
            let port = if has_ports { backend.port as u16 } else { 0 };
            assert_eq!(arrived.to, SocketAddr::new(addr, port), "{case}");
            assert_eq!(told.to, Some(SocketAddr::new(addr, backend.port as u16)), "{case}");
        }
        Mode::IPIP | Mode::GUE => assert_eq!(arrived.to.ip(), addr, "{case}"),
        Mode::DSR if question.kind == Kind::Error => {}
        Mode::DSR => assert_eq!(arrived.to.ip(), question.dst.ip(), "{case}"),
        mode => panic!("{mode:?}: {case}"),
    }
    if let Some(from) = told.from
        && matches!(backend.mode, Mode::NAT | Mode::FULL | Mode::DSR)
    {
        assert_eq!(from, arrived.from, "{case}");
    }
    arrived
}

/// A frame without the tag that [`super::packets`] may have put there, which comes back.
fn untagged(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if bytes[12..14] == [0x81, 0] {
        bytes.drain(12..16);
    }
    bytes
}

fn arrived(bytes: &[u8], has_ports: bool) -> Arrived {
    let ip = &bytes[L3..];
    let (src, dst, l4) = match bytes[12..14] {
        [0x08, 0x00] => {
            let addr = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&ip[at..at + 4]).expect("4"));
            (addr(12), addr(16), 20)
        }
        [0x86, 0xdd] => {
            let addr = |at: usize| {
                let bytes = ip[at..at + 16].try_into().expect("16");
                IpAddr::from(Address { bytes })
            };
            // Behind a fragment header, if there is one.
            (addr(8), addr(24), if ip[6] == 44 { 48 } else { 40 })
        }
        ref other => panic!("EtherType {other:02x?}"),
    };
    let port = |at: usize| u16::from_be_bytes([ip[l4 + at], ip[l4 + at + 1]]);
    let [sport, dport] = if has_ports { [port(0), port(2)] } else { [0, 0] };
    Arrived { from: SocketAddr::new(src, sport), to: SocketAddr::new(dst, dport) }
}
