//! What segments say about a connection, and which flow gives way where there is no room.
//!
//! A sender that uses another host's address knows no number of the backend's. So what a client says counts as
//! far as it acknowledges such a number; what it says otherwise makes a flow the first to give way, and nothing else.

use crate::{
    abi::{Address, ConnState, Flow, TAG_FREE, TAG_LOCKED, UDP, is_over},
    packet::TcpFlags,
};

/// How far an acknowledgement may be ahead of the number that proves a client: as much as a backend may have sent
/// before the client's first segment gets here. A guess is right once in 2^16 times.
pub const PROOF_WINDOW: u32 = 1 << 16;

/// What is remembered of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// [`crate::abi::Flow::state`].
    pub state: ConnState,
    /// [`crate::abi::Flow::sequence`].
    pub sequence: u32,
}

/// What a TCP segment says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Segment {
    /// Its flags.
    pub flags: TcpFlags,
    /// Number of its first byte.
    pub sequence: u32,
    /// What it acknowledges, if it has [`TcpFlags::ACK`].
    pub acknowledgement: u32,
    /// Bytes of data.
    pub len: u32,
}

impl Segment {
    /// The number behind its last byte, SYN and FIN included: what acknowledges all of it.
    #[must_use]
    #[inline(always)]
    pub const fn end(&self) -> u32 {
        let control = self.flags.intersects(TcpFlags::SYN) as u32
            + self.flags.intersects(TcpFlags::FIN) as u32;
        self.sequence.wrapping_add(self.len).wrapping_add(control)
    }
}

/// Whether a client that acknowledges so much has got the answer that ends at `sequence`: who sends from an address that
/// is not its own does not know the number.
#[must_use]
#[inline(always)]
pub const fn proves(acknowledgement: u32, sequence: u32) -> bool {
    acknowledgement.wrapping_sub(sequence) < PROOF_WINDOW
}

impl Connection {
    /// After a client's segment. `mask`: which bits of `sequence` are known to be the connection's.
    ///
    /// What ends a connection is believed if both sides have closed it, and the client has acknowledged just the
    /// backend's FIN. Otherwise it is a claim, which the client's next segment takes back, unless that is the bare
    /// acknowledgement behind the FIN.
    #[must_use]
    #[inline(always)]
    pub const fn after_client(mut self, segment: &Segment, mask: u32) -> Self {
        let Segment { flags, acknowledgement, .. } = *segment;
        let is_ack =
            flags.contains(TcpFlags::ACK) && !flags.intersects(TcpFlags::SYN.union(TcpFlags::RST));
        let has_claim = self.state.intersects(ConnState::END_CLAIMED);
        if self.state.awaits_proof()
            && mask == u32::MAX
            && is_ack
            && proves(acknowledgement, self.sequence)
        {
            // A backend resets what answers its SYN-ACK wrongly, and goes on waiting.
            let doubts = ConnState::END_CLAIMED.union(ConnState::ENDED).union(ConnState::AGED);
            self.state = self.state.difference(doubts).union(ConnState::ESTABLISHED);
        }
        let is_half_closed = self.state.intersects(ConnState::FIN_REPLY);
        if flags.intersects(TcpFlags::RST) {
            self.state = self.state.union(ConnState::END_CLAIMED);
        } else if flags.intersects(TcpFlags::SYN) {
            // The first one may be sent again.
            if self.state.intersects(ConnState::ESTABLISHED.union(ConnState::AGED)) {
                self.state = self.state.union(ConnState::END_CLAIMED);
            }
        } else if is_half_closed
            && is_ack
            && mask != 0
            && (acknowledgement ^ self.sequence) & mask == 0
            && (flags.intersects(TcpFlags::FIN) || has_claim && segment.len == 0)
        {
            self.state = self.state.union(ConnState::ENDED);
        } else if flags.intersects(TcpFlags::FIN) {
            if !is_half_closed && !self.state.awaits_proof() && mask == u32::MAX {
                self.sequence = segment.end();
            }
            self.state = self.state.union(ConnState::END_CLAIMED);
        } else if segment.len != 0
            || !is_half_closed && mask == u32::MAX && segment.sequence != self.sequence
        {
            self.state = self.state.difference(ConnState::END_CLAIMED);
        }
        self
    }

    /// After a backend's segment, which is believed. `is_due`: the number that the client has to acknowledge is old,
    /// and the client may be past it.
    #[must_use]
    #[inline(always)]
    pub const fn after_backend(mut self, segment: &Segment, is_due: bool) -> Self {
        let flags = segment.flags;
        if flags.intersects(TcpFlags::RST) {
            self.state = self.state.union(ConnState::ENDED);
        } else if flags.contains(TcpFlags::SYN.union(TcpFlags::ACK)) {
            // Sent again, or the backend begins the connection anew. Data in it may be acknowledged later.
            let first = segment.sequence.wrapping_add(1);
            let is_known = self.state.intersects(ConnState::ESTABLISHED) && self.sequence == first;
            if !is_known {
                let ended = self.state.intersection(ConnState::RST_PENDING);
                self = Self { state: ended.union(ConnState::ANSWERED), sequence: first };
            }
        } else if flags.intersects(TcpFlags::FIN) {
            self.state = self.state.union(ConnState::FIN_REPLY).union(ConnState::ANSWERED);
            self.sequence = segment.end();
        } else if !self.state.intersects(ConnState::ESTABLISHED)
            && (is_due || !self.state.intersects(ConnState::ANSWERED))
            && !self.state.intersects(ConnState::FIN_REPLY)
        {
            self.state = self.state.union(ConnState::ANSWERED);
            self.sequence = segment.end();
        }
        self
    }
}

/// How little an entry is missed: the higher, the sooner it gives way. 0: it stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank(pub u32);

impl Rank {
    /// Of a place that is free.
    pub const FREE: Self = Self(u32::MAX);
    /// Of a flow that is proven, or a place that is just being written.
    pub const STAYS: Self = Self(0);
    /// The least of those that nothing is lost with: flows that have expired, or verifiably ended.
    pub const OVER: Self = Self(ENDED << CLASS_SHIFT);
}

const CLASS_SHIFT: u32 = 29;
const EXPIRED: u32 = 7;
const ENDED: u32 = 6;
const NEW: u32 = 5;
const CLAIMED: u32 = 4;
const AGED: u32 = 3;
const ANSWERED: u32 = 2;
const OTHER: u32 = 1;

/// What an entry is ranked by.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    /// [`crate::abi::Flow::tag`].
    pub tag: u32,
    /// [`crate::abi::Flow::expires`].
    pub expires: u32,
    /// [`crate::abi::Flow::state`].
    pub state: ConnState,
    /// [`crate::abi::Flow::proto`].
    pub proto: u32,
    /// Whether it is a flow of the same source prefix ([`is_same_prefix`]) as the one that needs room.
    pub is_own: bool,
    /// Whether it is a flow of another protocol than the one that needs room.
    pub is_other: bool,
}

impl From<&Flow> for Standing {
    fn from(flow: &Flow) -> Self {
        let Flow { tag, expires, .. } = *flow;
        Self {
            tag,
            expires,
            state: flow.state(),
            proto: flow.proto.into(),
            is_own: false,
            is_other: false,
        }
    }
}

/// The rank of an entry. Of those that are not proven, flows of the same protocol give way first: a forged datagram is
/// answered more easily than a forged segment, and connections by direct return, which nothing can prove, are not to
/// make room for it. Then flows of the same source prefix, and among them the one that was idle for longest. `now` is in
/// jiffies.
#[must_use]
#[inline(always)]
pub const fn rank(now: u32, it: &Standing) -> Rank {
    /// Jiffies that are told apart.
    const LONGEST: u32 = (1 << (CLASS_SHIFT - 1)) - 1;
    match it.tag {
        TAG_FREE => return Rank::FREE,
        TAG_LOCKED => return Rank::STAYS,
        _ => {}
    }
    let state = it.state;
    let class = if is_over(now, it.expires) {
        EXPIRED
    } else if state.has_ended() {
        ENDED
    } else if it.proto != UDP
        && state.intersects(ConnState::ESTABLISHED)
        && !state.intersects(ConnState::END_CLAIMED)
    {
        return Rank::STAYS;
    } else if it.is_other {
        OTHER
    } else if !state.intersects(ConnState::ESTABLISHED.union(ConnState::AGED)) {
        NEW
    } else if state.intersects(ConnState::END_CLAIMED) {
        CLAIMED
    } else if !state.intersects(ConnState::ESTABLISHED) {
        AGED
    } else {
        ANSWERED
    };
    let left = it.expires.wrapping_sub(now);
    let idle = LONGEST - if left < LONGEST { left } else { LONGEST };
    let is_own = it.is_own && class <= AGED;
    Rank(class << CLASS_SHIFT | (is_own as u32) << (CLASS_SHIFT - 1) | idle)
}

/// Whether two addresses are of one network that a single attacker may send from: the same /24 of IPv4, or the same /64
/// of IPv6.
#[must_use]
#[inline(always)]
pub const fn is_same_prefix(a: Address, b: Address) -> bool {
    let ([a_high, a_low], [b_high, b_low]) = (a.halves(), b.halves());
    let last = if a.is_v4() { !0xff_u64.to_be() } else { 0 };
    (a_high ^ b_high) | ((a_low ^ b_low) & last) == 0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::abi::TCP;

    const NOW: u32 = 1_000;
    const ISS: u32 = 5_000;

    fn segment(flags: TcpFlags, sequence: u32, acknowledgement: u32, len: u32) -> Segment {
        Segment { flags, sequence, acknowledgement, len }
    }

    fn connection(state: ConnState, sequence: u32) -> Connection {
        Connection { state, sequence }
    }

    fn proven() -> Connection {
        connection(ConnState::ESTABLISHED | ConnState::ANSWERED, ISS + 1)
    }

    fn client(connection: Connection, segment: Segment) -> Connection {
        connection.after_client(&segment, u32::MAX)
    }

    fn backend(connection: Connection, segment: Segment) -> Connection {
        connection.after_backend(&segment, false)
    }

    fn ack() -> impl Strategy<Value = TcpFlags> {
        prop_oneof![
            Just(TcpFlags::ACK),
            Just(TcpFlags::FIN | TcpFlags::ACK),
            Just(TcpFlags::RST),
            Just(TcpFlags::RST | TcpFlags::ACK),
            Just(TcpFlags::SYN),
            Just(TcpFlags::empty()),
            Just(TcpFlags::FIN),
        ]
    }

    #[test]
    fn given_a_handshake_when_the_client_acknowledges_it_then_it_is_proven_and_the_backend_may_repeat_it()
     {
        let (syn_ack, ack) = (TcpFlags::SYN | TcpFlags::ACK, TcpFlags::ACK);
        let offered = backend(connection(ConnState::empty(), 0), segment(syn_ack, ISS, 1, 0));
        assert_eq!(offered, connection(ConnState::ANSWERED, ISS + 1));
        let opened = client(offered, segment(ack, 1, ISS + 1, 0));
        assert_eq!(opened, proven());
        assert_eq!(backend(opened, segment(syn_ack, ISS, 1, 0)), opened, "sent again");
        // The backend had none: the SYN was no forgery, or the backend has forgotten the connection.
        let anew = backend(opened, segment(syn_ack, ISS + 9, 1, 0));
        assert_eq!(anew, connection(ConnState::ANSWERED, ISS + 10));
    }

    #[test]
    fn given_an_adopted_connection_when_both_sides_acknowledge_each_other_then_it_is_proven() {
        let ack = TcpFlags::ACK;
        let adopted = backend(connection(ConnState::empty(), 0), segment(ack, ISS, 1, 100));
        assert_eq!(adopted, connection(ConnState::ANSWERED, ISS + 100));
        let more = backend(adopted, segment(ack, ISS + 100, 1, 100));
        assert_eq!(more, adopted, "the client may be behind for long");
        assert_eq!(
            adopted.after_backend(&segment(ack, ISS + 9_000, 1, 0), true).sequence,
            ISS + 9_000
        );
        assert_eq!(client(more, segment(ack, 1, ISS, 0)).state, ConnState::ANSWERED, "too old");
        let state = ConnState::ANSWERED | ConnState::ESTABLISHED;
        assert_eq!(client(more, segment(ack, 1, ISS + 200, 0)).state, state);
    }

    #[test]
    fn given_a_close_when_either_side_begins_then_only_the_backends_fin_acknowledged_ends_it() {
        let (fin, ack) = (TcpFlags::FIN | TcpFlags::ACK, TcpFlags::ACK);
        let ended = |it: Connection| it.state.has_ended();
        // The backend first.
        let half = backend(proven(), segment(fin, ISS + 1, 9, 10));
        assert!(half.state.is_active());
        let half = client(half, segment(ack, 9, ISS + 12, 0));
        assert!(half.state.is_active() && !ended(half), "the client may go on");
        assert!(!ended(client(half, segment(fin, 9, ISS + 11, 0))), "another number");
        assert!(ended(client(half, segment(fin, 9, ISS + 12, 0))));
        // The client first, and the backend sends more.
        let half = client(proven(), segment(fin, 9, ISS + 1, 4));
        assert!(!half.state.is_active() && !ended(half));
        let more = client(half, segment(ack, 14, ISS + 900, 0));
        assert_eq!(more, half, "what is behind its FIN acknowledges only");
        let both = backend(more, segment(fin, ISS + 901, 14, 0));
        let both = client(both, segment(ack, 14, ISS + 901, 0));
        assert!(!ended(both), "not yet all");
        assert!(ended(client(both, segment(ack, 14, ISS + 902, 0))));
        // What the backend resets is over.
        assert!(ended(backend(proven(), segment(TcpFlags::RST, ISS + 1, 0, 0))));
    }

    #[test]
    fn given_an_end_that_is_claimed_when_the_client_goes_on_then_it_is_taken_back() {
        for flags in [TcpFlags::RST, TcpFlags::SYN, TcpFlags::FIN | TcpFlags::ACK] {
            let forged = client(proven(), segment(flags, 77_777, 88_888, 0));
            assert!(!forged.state.is_active() && !forged.state.has_ended(), "{flags:?}");
            let on = client(forged, segment(TcpFlags::ACK, 10, ISS + 50, 0));
            assert_eq!(on.state, proven().state, "{flags:?}");
        }
    }

    proptest! {
        #[test]
        fn given_what_a_client_may_send_blindly_when_it_comes_then_nothing_ends_or_is_proven(
            segments in prop::collection::vec((ack(), any::<u32>(), any::<u32>(), 0..3_u32), 1..20),
            is_half_closed: bool,
        ) {
            let blind = |it: &mut Connection| {
                for &(flags, sequence, guess, len) in &segments {
                    // Not the right one.
                    let behind = guess % (u32::MAX - PROOF_WINDOW) + PROOF_WINDOW;
                    let acknowledgement = it.sequence.wrapping_add(behind);
                    *it = client(*it, segment(flags, sequence, acknowledgement, len));
                }
            };
            let mut known = proven();
            if is_half_closed {
                known = backend(known, segment(TcpFlags::FIN | TcpFlags::ACK, ISS + 1, 9, 0));
            }
            blind(&mut known);
            prop_assert!(known.state.intersects(ConnState::ESTABLISHED));
            prop_assert!(!known.state.has_ended());
            let mut new = connection(ConnState::ANSWERED, ISS);
            blind(&mut new);
            prop_assert!(!new.state.intersects(ConnState::ESTABLISHED));
        }

        #[test]
        fn given_any_two_entries_when_ranked_then_what_is_known_of_them_comes_before_their_age(
            states in prop::array::uniform2(0..7_usize),
            ages in prop::array::uniform2(0..1_000_u32),
        ) {
            // Each is missed less than those behind it.
            let rows = [
                (ConnState::ENDED | ConnState::ESTABLISHED, TCP),
                (ConnState::END_CLAIMED | ConnState::ANSWERED, TCP),
                (ConnState::ESTABLISHED | ConnState::END_CLAIMED, TCP),
                (ConnState::AGED, UDP),
                (ConnState::ESTABLISHED | ConnState::AGED, UDP),
                (ConnState::ESTABLISHED | ConnState::FIN_REPLY, TCP),
            ];
            let rank_of = |row: usize, age: u32| {
                let expires = if row == 0 { NOW - 1 - age } else { NOW + 1_000 - age };
                let (state, proto) = if row == 0 { rows[5] } else { rows[row - 1] };
                rank(NOW, &Standing { tag: 9, expires, state, proto, is_own: false, is_other: false })
            };
            let [a, b] = [0, 1].map(|turn| rank_of(states[turn], ages[turn]));
            if states[0] < states[1] {
                prop_assert!(a > b);
            } else if states[0] == states[1] && (1..6).contains(&states[0]) {
                prop_assert_eq!(a.cmp(&b), ages[0].cmp(&ages[1]), "the oldest first");
            }
            prop_assert_eq!(a == Rank::STAYS, states[0] == 6);
            prop_assert_eq!(a >= Rank::OVER, states[0] < 2);
        }
    }

    #[test]
    fn given_a_newcomers_own_prefix_when_ranked_then_its_flows_give_way_before_others() {
        let of = |state, is_own, expires| {
            rank(NOW, &Standing { tag: 9, expires, state, proto: UDP, is_own, is_other: false })
        };
        let (own, other) =
            (of(ConnState::AGED, true, NOW + 9), of(ConnState::AGED, false, NOW + 1));
        assert!(own > other);
        assert!(own < of(ConnState::empty(), false, NOW + 9), "but none that others do not need");
    }

    #[test]
    fn given_flows_of_both_protocols_when_ranked_then_those_of_the_newcomers_give_way_first() {
        let of = |proto, state, is_other, expires| {
            rank(NOW, &Standing { tag: 9, expires, state, proto, is_own: false, is_other })
        };
        let (new, aged) = (ConnState::empty(), ConnState::AGED);
        let answered = ConnState::ESTABLISHED | ConnState::AGED;
        for state in [new, aged] {
            for other in [new, aged] {
                let (udp, tcp) = (of(UDP, answered, false, NOW + 9), of(TCP, other, true, NOW + 1));
                assert!(udp > tcp, "a datagram's, {other:?}");
                let (tcp, udp) = (of(TCP, state, false, NOW + 9), of(UDP, other, true, NOW + 1));
                assert!(tcp > udp, "a segment's, {state:?} {other:?}");
            }
        }
        let idle = [of(UDP, answered, true, NOW + 1), of(UDP, new, true, NOW + 9)];
        assert!(idle[0] > idle[1] && idle[1] > Rank::STAYS, "the one that was idle for longest");
        assert_eq!(of(TCP, ConnState::ESTABLISHED, true, NOW + 9), Rank::STAYS);
        assert!(of(TCP, ConnState::ENDED, true, NOW + 9) >= Rank::OVER);
    }

    #[test]
    fn given_addresses_when_their_prefixes_are_compared_then_they_are_of_a_24_or_64() {
        let at = |addr: &str| Address::from(addr.parse::<core::net::IpAddr>().unwrap());
        for (a, b, expected) in [
            ("192.0.2.1", "192.0.2.255", true),
            ("192.0.2.1", "192.0.3.1", false),
            ("2001:db8::1", "2001:db8::ffff:0:0:1", true),
            ("2001:db8::1", "2001:db8:0:1::1", false),
            ("192.0.2.1", "2001:db8::1", false),
        ] {
            assert_eq!(is_same_prefix(at(a), at(b)), expected, "{a} {b}");
            assert_eq!(is_same_prefix(at(b), at(a)), expected, "{a} {b}");
        }
    }
}
