//! TCP connections to groups that tell backends the client's address, and what is inserted into them.

use std::net::{IpAddr, SocketAddr};

use slb_common::{
    abi::{BackendFlags, FlowKey},
    verdict::Verdict,
};

use crate::{
    fixture::{FAMILIES, Run, Slb, answer, backend, client, id, port, sender, syn, vip, with_slb},
    frame::{ACK, Frame, SYN, Transport},
    full_nat::between,
    lab::{FIRST, LAN, ROUTER, WAN},
};

/// What a client counts from.
pub(crate) const ISN: u32 = 0xffff_fff0;

/// A client's connection to a VIP, and what its backend sees of it.
#[derive(Clone)]
pub(crate) struct Connection {
    /// Without data.
    pub syn: Frame,
    /// Number of the backend's first byte.
    pub own: u32,
    /// Where the backend is.
    pub inside: SocketAddr,
    /// What it sees as source.
    pub source: SocketAddr,
}

impl Connection {
    /// Through [`port::FULL`], or between families through [`port::OTHER`]. The SYN is to arrive as the
    /// backend counts.
    pub(crate) fn open(
        slb: &mut Slb<'_>,
        family: usize,
        crosses: bool,
        sport: u16,
        shift: u32,
    ) -> Self {
        Self::open_at(slb, family, crosses, sport, shift, [ISN, ISN])
    }

    /// The same, and what the client and the backend count from.
    pub(crate) fn open_at(
        slb: &mut Slb<'_>,
        family: usize,
        crosses: bool,
        sport: u16,
        shift: u32,
        [isn, own]: [u32; 2],
    ) -> Self {
        let (to, inside) = if crosses {
            (port::OTHER, backend(0, 1 - family, port::OTHER_BACKEND))
        } else {
            (port::FULL, backend(0, family, port::FULL_BACKEND))
        };
        let transport = Transport::Tcp { flags: SYN, options: vec![2, 4, 0x05, 0xb4] };
        let from = client(family, sport);
        let syn = Frame { seq: isn, payload: Vec::new(), transport, ..syn(from, vip(family, to)) };
        let run = slb.run(WAN, &syn.bytes());
        let source = sender(&run.bytes, usize::from(inside.is_ipv6()));
        let this = Self { syn, own: own.wrapping_add(1), inside, source };
        let seq = isn.wrapping_sub(shift);
        this.is_sent(&run, &this.syn, &Frame { seq, ..this.syn.clone() }, "SYN");
        this
    }

    /// Number of the client's first byte.
    pub(crate) const fn first(&self) -> u32 {
        self.syn.seq.wrapping_add(1)
    }

    /// A later packet of the client's; `at` counts what it has sent before.
    pub(crate) fn segment(&self, flags: u8, at: u32, payload: &[u8]) -> Frame {
        let seq = self.first().wrapping_add(at);
        // As most have them: no operation twice, and timestamps.
        let options = [&[1, 1, 8, 10][..], &[7; 8]].concat();
        let transport = Transport::Tcp { flags, options };
        Frame { seq, ack: self.own, transport, payload: payload.into(), ..self.syn.clone() }
    }

    /// A packet of the backend's; `missing` is how far its acknowledgement is from the client's first byte.
    pub(crate) fn reply(&self, flags: u8, missing: u32) -> Frame {
        let inside = Frame { src: self.source, dst: self.inside, ..self.syn.clone() };
        let inside = Frame { ack: self.first().wrapping_sub(missing), ..inside };
        let reply = answer(&between(&inside, &self.syn).0);
        let options = vec![1, 2, 4, 0x05, 0xb4, 0, 0, 0];
        let seq = self.own.wrapping_sub(u32::from(flags & SYN != 0));
        Frame { seq, transport: Transport::Tcp { flags, options }, ..reply }
    }

    /// The key of what the backend sends.
    pub(crate) fn reply_key(&self) -> FlowKey {
        self.reply(ACK, 0).key()
    }

    /// The backend accepts; `shift` is how much earlier it counts.
    pub(crate) fn accept(&self, slb: &mut Slb<'_>, shift: u32) {
        let reply = self.reply(SYN | ACK, shift);
        assert_eq!(slb.run(LAN, &reply.bytes()).verdict, Verdict::Replied, "SYN-ACK");
    }

    pub(crate) fn is_sent(&self, run: &Run, frame: &Frame, expected: &Frame, case: &str) {
        assert_eq!(run.verdict, Verdict::Forwarded, "{case}");
        let expected = Frame { src: self.source, dst: self.inside, ..expected.clone() };
        assert_eq!(run.bytes, between(&expected, frame).sent_as(FIRST), "{case}");
    }

    /// The client sends `frame`; but for the addresses, the backend gets `expected`.
    pub(crate) fn sends(&self, slb: &mut Slb<'_>, case: &str, frame: &Frame, expected: &Frame) {
        let run = slb.run(WAN, &frame.bytes());
        self.is_sent(&run, frame, expected, case);
    }

    /// The same the other way.
    pub(crate) fn hears(&self, slb: &mut Slb<'_>, case: &str, frame: &Frame, expected: &Frame) {
        let run = slb.run(LAN, &frame.bytes());
        assert_eq!(run.verdict, Verdict::Replied, "{case}");
        let expected = Frame { src: self.syn.dst, dst: self.syn.src, ..expected.clone() };
        assert_eq!(run.bytes, between(&expected, frame).sent_as(ROUTER), "{case}");
    }
}

/// The header of the PROXY protocol, version 2, for a frame of a client's.
pub(crate) fn header(frame: &Frame) -> Vec<u8> {
    let mut bytes = b"\r\n\r\n\0\r\nQUIT\n\x21".to_vec();
    match (frame.src.ip(), frame.dst.ip()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            bytes.extend([0x11, 0, 12]);
            bytes.extend([src.octets(), dst.octets()].concat());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            bytes.extend([0x21, 0, 36]);
            bytes.extend([src.octets(), dst.octets()].concat());
        }
        families => panic!("two families: {families:?}"),
    }
    bytes.extend(frame.src.port().to_be_bytes());
    bytes.extend(frame.dst.port().to_be_bytes());
    bytes
}

/// A frame with the header before its data.
pub(crate) fn headed(frame: &Frame) -> Frame {
    let header = header(frame);
    Frame {
        seq: frame.seq.wrapping_sub(header.len() as u32),
        payload: [header, frame.payload.clone()].concat(),
        ..frame.clone()
    }
}

/// A frame with the option before its others.
pub(crate) fn with_option(frame: &Frame) -> Frame {
    let Transport::Tcp { flags, options } = &frame.transport else { panic!("not TCP") };
    let options = [&option(frame.src)[..], options].concat();
    Frame { transport: Transport::Tcp { flags: *flags, options }, ..frame.clone() }
}

/// The TCP option that names a client.
pub(crate) fn option(client: SocketAddr) -> Vec<u8> {
    let addr = match client.ip() {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    };
    [&[254, 4 + addr.len() as u8][..], &client.port().to_be_bytes(), &addr].concat()
}

/// With a smaller segment size in the options of [`Connection::reply`].
pub(crate) fn with_mss(frame: Frame, mss: u16) -> Frame {
    let Transport::Tcp { flags, .. } = frame.transport else { panic!("not TCP") };
    let [high, low] = mss.to_be_bytes();
    let options = vec![1, 2, 4, high, low, 0, 0, 0];
    Frame { transport: Transport::Tcp { flags, options }, ..frame }
}

pub(crate) fn with_ack(frame: &Frame, ack: u32) -> Frame {
    Frame { ack, ..frame.clone() }
}

/// Runs `test` for each family and with backends of the same and the other one. `len` is that of what is told.
pub(crate) fn everywhere(
    flag: BackendFlags,
    lens: [u32; 2],
    test: impl Fn(&mut Slb<'_>, usize, bool, u32) + Sync,
) {
    with_slb(|slb| {
        for family in FAMILIES {
            for (crosses, id) in [(false, id::FULL), (true, id::OTHER)] {
                slb.backend(id + family as u32, |backend| backend.flags |= flag);
                test(slb, family, crosses, lens[family]);
            }
        }
    });
}

pub(crate) const HEADERS: [u32; 2] = [28, 52];
pub(crate) const OPTIONS: [u32; 2] = [8, 20];
