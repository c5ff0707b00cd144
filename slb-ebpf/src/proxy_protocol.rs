//! What backends of full NAT cannot see: who the client is. They are told as a connection begins, by a header
//! before its first byte or by an option. [`proxy_protocol`] has both.
//!
//! A packet that has been translated comes here as long as its backend may not know yet
//! ([`ConnState::PROXY_PENDING`]): what begins the connection is told as often as it is sent, so nothing has to be kept for
//! when a packet is lost. No other bytes of the client's get to the backend before that, nor does an option that
//! looks like ours, ever: `docs/adr/0021-client-address-cannot-be-forged.md` has the states.

use core::hint::black_box;

use aya_ebpf::programs::XdpContext;
use slb_common::{
    abi::{Backend, ConnState, FlowKind, PROXY_V2},
    checksum::Delta,
    decide::PROOF_WINDOW,
    mss,
    nat64::{HEAD_V4, HEAD_V6},
    parse::{L3, TcpFlags},
    proxy_protocol::{self, ACKNOWLEDGEMENT, Head, MAX_BEYOND, Options, SEQUENCE, Words},
    verdict::Verdict,
};

use crate::{
    conntrack::{self, Entry},
    ctx::{self, PacketCtx},
    global::global,
    kernel, maps,
    outcome::{Outcome, sent},
};

/// What a client may send before its first byte is acknowledged: no SYN-ACK states a larger window (RFC 7323,
/// section 2.2).
const MAX_BEHIND: u32 = 1 << 16;
/// How far an acknowledgement may be ahead: the same, and a FIN.
const MAX_ACKNOWLEDGED: u32 = MAX_BEHIND + 1;
/// As much as a backend may have sent on its own meanwhile.
const MAX_SENT: u32 = 1 << 20;
/// The age of a SYN-ACK is counted in units of 2 to the power of this many jiffies.
const AGE_SHIFT: u32 = 8;
/// By how much a segment's numbers are changed so that they are not those of a SYN cookie: the fewest bytes that do.
const COOKIE_SHIFT: u32 = 2 * proxy_protocol::COOKIE_SPREAD + 1;

/// Sends a packet of either direction, which is translated otherwise.
#[inline(always)]
pub fn tell(pkt: &mut PacketCtx<'_>) -> Outcome {
    let is_reply = pkt.args.is(FlowKind::Reply);
    let flow = conntrack::get(pkt.args.place).ok_or(Verdict::Inconsistent)?;
    let backend = maps::backend(flow.backend().load()).ok_or(Verdict::Inconsistent)?;
    // What it is by now.
    let is_v4 = if is_reply { flow.src().load().is_v4() } else { backend.addr.is_v4() };
    let l4 = if is_v4 == pkt.packet.is_v4() {
        pkt.packet.l4 as usize
    } else {
        L3 + if is_v4 { HEAD_V4 } else { HEAD_V6 }
    };
    if is_reply {
        on_backend_segment(pkt, flow, backend, l4)?;
    } else {
        on_client_segment(pkt, flow, l4, is_v4)?;
    }
    Ok(sent(is_reply, pkt.args.hop))
}

/// A client's packet.
#[inline(always)]
fn on_client_segment(
    pkt: &mut PacketCtx<'_>,
    flow: Entry,
    l4: usize,
    is_v4: bool,
) -> Result<(), Verdict> {
    let tcp = pkt.frame.header::<20>(l4).ok_or(Verdict::Truncated)?;
    let sequence = u32::from_be(tcp.get(SEQUENCE));
    let acknowledgement = u32::from_be(tcp.get(ACKNOWLEDGEMENT));
    let options_end = u32::from(tcp.get::<u8>(12) >> 4) * 4;
    let (flags, len) = (pkt.packet.flags, pkt.args.inserted_len);
    let headers = pkt.packet.l4.wrapping_sub(L3 as u32).wrapping_add(options_end);
    if options_end < 20 || headers > pkt.packet.len {
        return Err(Verdict::Malformed);
    }
    let has_data = headers < pkt.packet.len;
    let is_header = flow.proxy().load() == PROXY_V2;
    let is_told = !flow.state().load().intersects(ConnState::PROXY_PENDING);
    let is_accepted = || flow.state().load().intersects(ConnState::ANSWERED);
    if flags.intersects(TcpFlags::SYN) {
        // Data in a SYN (RFC 7413) would be taken before anything else.
        if !pkt.packet.is_syn() || has_data {
            return Err(Verdict::BeforeClientAddress);
        }
        let first = sequence.wrapping_add(1);
        if !is_accepted() {
            flow.sequence().store(first);
        }
        if is_header {
            // Another SYN than that of the connection may begin one at a backend that has forgotten this: at a
            // number that the client does not know, until the SYN-ACK removes the entry.
            let is_own = !is_told && flow.sequence().load() == first;
            let by = if is_own { len.wrapping_neg() } else { kernel::random() };
            proxy_protocol::renumber(&mut pkt.frame, l4, SEQUENCE, by).ok_or(Verdict::Truncated)?;
        }
        return set_options(pkt, flow, l4, is_v4, options_end, 0);
    }
    // Without its number the reply's entry was lost, and made again.
    let reply = conntrack::reply_of(flow, pkt.args.place);
    let reply = reply.filter(|reply| reply.sequence().load() != 0);
    let answers = reply
        .filter(|_| is_accepted() && flags.intersects(TcpFlags::ACK))
        .map(|reply| acknowledgement.wrapping_sub(reply.sequence().load()));
    if !is_header {
        let behind = sequence.wrapping_sub(flow.sequence().load());
        if answers.is_some_and(|answers| answers < PROOF_WINDOW) {
            flow.state().store(flow.state().load() | ConnState::ESTABLISHED);
        }
        let is_to_tell = !flags.intersects(TcpFlags::RST) && (!is_told || behind == 0);
        return set_options(pkt, flow, l4, is_v4, options_end, if is_to_tell { len } else { 0 });
    }
    let is_first_answer = answers == Some(0);
    if is_told {
        let numbers = (sequence, acknowledgement);
        let may_be_cookie = flags & (TcpFlags::ACK | TcpFlags::RST) == TcpFlags::ACK
            && proxy_protocol::is_cookie(numbers, flow.sequence().load())
            && reply.is_none_or(|reply| may_have_cookie(pkt.now, reply));
        if !may_be_cookie {
            return Ok(());
        }
        if is_first_answer {
            return Err(Verdict::BeforeClientAddress);
        }
        // A client may have sent and got just as much, so it may not be dropped. An acknowledgement alone counts from
        // anywhere in the window; data cannot move, but may acknowledge less.
        let (at, by) = if has_data || flags.intersects(TcpFlags::FIN) {
            (ACKNOWLEDGEMENT, COOKIE_SHIFT.wrapping_neg())
        } else {
            (SEQUENCE, COOKIE_SHIFT)
        };
        return proxy_protocol::renumber(&mut pkt.frame, l4, at, by).ok_or(Verdict::Truncated);
    }
    let behind = sequence.wrapping_sub(flow.sequence().load());
    if flags.intersects(TcpFlags::RST) {
        if behind != 0 {
            return Ok(());
        }
    } else {
        if !is_accepted() {
            return Err(Verdict::BeforeClientAddress);
        }
        proxy_protocol::clear_urgent(&mut pkt.frame, l4).ok_or(Verdict::Truncated)?;
        if behind != 0 {
            let is_next = behind < MAX_BEHIND;
            let is_probe = behind == u32::MAX && !has_data && !flags.intersects(TcpFlags::FIN);
            // The numbers of a cookie have another distance.
            let passes = is_first_answer && (is_next || is_probe);
            return if passes { Ok(()) } else { Err(Verdict::BeforeClientAddress) };
        }
    }
    proxy_protocol::renumber(&mut pkt.frame, l4, SEQUENCE, len.wrapping_neg())
        .ok_or(Verdict::Truncated)?;
    // In generic mode a packet may be as long as its header can say.
    if pkt.packet.len.wrapping_add(len) > u16::MAX.into() {
        return Err(Verdict::Untranslatable);
    }
    let (words, head, _) = maps::proxy_buffers().ok_or(Verdict::Inconsistent)?;
    proxy_protocol::write(words, true, &conntrack::key_of(flow));
    let delta = proxy_protocol::words_delta(words, len);
    proxy_protocol::account(&mut pkt.frame, is_v4, l4, (0, len), delta, false)
        .ok_or(Verdict::Truncated)?;
    insert(pkt.ctx, l4 as u32 + options_end, len, words, head)
}

/// Gives a segment the options that the backend may see, and `more` bytes of ours before them.
#[inline(always)]
fn set_options(
    pkt: &mut PacketCtx<'_>,
    flow: Entry,
    l4: usize,
    is_v4: bool,
    options_end: u32,
    more: u32,
) -> Result<(), Verdict> {
    let (words, head, options) = maps::proxy_buffers().ok_or(Verdict::Inconsistent)?;
    if pkt.packet.len.wrapping_add(more) > u16::MAX.into() {
        return Err(Verdict::Untranslatable);
    }
    let (at, before) = (l4 as u32 + 20, options_end.wrapping_sub(20));
    options.clear();
    if before != 0 {
        kernel::load_bytes(pkt.ctx, at, &mut options.found, bounded(before))
            .ok_or(Verdict::Truncated)?;
    }
    if more != 0 {
        proxy_protocol::write(words, false, &conntrack::key_of(flow));
    }
    let made = tell_make_options(before, more, words, options);
    let after = made >> 16;
    let mut delta = Delta::default();
    delta.add32(made & 0xffff);
    proxy_protocol::account(&mut pkt.frame, is_v4, l4, (before, after), delta, true)
        .ok_or(Verdict::Truncated)?;
    if before != after {
        resize(pkt.ctx, at, after as i32 - before as i32, head)?;
    }
    if after != 0 {
        kernel::store_bytes(pkt.ctx, at, &mut options.made, bounded(after))
            .ok_or(Verdict::Inconsistent)?;
    }
    Ok(())
}

/// The length of options that are there, as the verifier has to see it: neither nothing nor too much. Linux 6.1 learns
/// nothing from a comparison with 0.
#[inline(always)]
fn bounded(len: u32) -> u32 {
    black_box(len.wrapping_sub(1)) % proxy_protocol::OPTIONS_SIZE as u32 + 1
}

global! {
    fn tell_make_options(before: u32, more: u32, words: &Words, options: &mut Options) -> u32
        = make_options, or 0;
}

/// [`proxy_protocol::make_options`]: their length, and below that how the sum changes.
#[inline(always)]
fn make_options(before: u32, more: u32, words: &Words, options: &mut Options) -> u32 {
    let after = proxy_protocol::make_options(options, before, words, more);
    after << 16 | u32::from(proxy_protocol::options_delta(options).folded())
}

/// Puts `words`, of which `len` bytes count, into a frame at `at`.
#[inline(always)]
fn insert(
    xdp: &XdpContext,
    at: u32,
    len: u32,
    words: &Words,
    head: &mut Head,
) -> Result<(), Verdict> {
    let moved = resize(xdp, at, len as i32, head)?;
    let mut frame = ctx::frame(xdp);
    for (number, word) in words.iter().enumerate() {
        if 4 * number as u32 >= len {
            break;
        }
        let mut place =
            frame.header_mut::<4>(moved as usize + 4 * number).ok_or(Verdict::Inconsistent)?;
        place.set(0, *word);
    }
    Ok(())
}

/// Moves the beginning of a frame, up to `at`, so that there are `more` bytes behind it, or fewer. Gives `at`.
#[inline(always)]
fn resize(xdp: &XdpContext, at: u32, more: i32, head: &mut Head) -> Result<u32, Verdict> {
    let beyond = at.wrapping_sub(L3 as u32);
    if beyond > MAX_BEYOND {
        return Err(Verdict::Untranslatable);
    }
    // Says once more what the verifier has to see: neither nothing nor too much.
    let moved = (black_box(beyond) & MAX_BEYOND) + L3 as u32;
    kernel::load_bytes(xdp, 0, head, moved).ok_or(Verdict::Inconsistent)?;
    kernel::adjust_head(xdp, more.wrapping_neg()).ok_or(Verdict::Inconsistent)?;
    kernel::store_bytes(xdp, 0, head, moved).ok_or(Verdict::Inconsistent)?;
    Ok(moved)
}

/// A backend's packet.
#[inline(always)]
fn on_backend_segment(
    pkt: &mut PacketCtx<'_>,
    flow: Entry,
    backend: &Backend,
    l4: usize,
) -> Result<(), Verdict> {
    let (flags, len) = (pkt.packet.flags, pkt.args.inserted_len);
    let is_header = flow.proxy().load() == PROXY_V2;
    let tcp = pkt.frame.header::<20>(l4).ok_or(Verdict::Truncated)?;
    let acknowledgement = u32::from_be(tcp.get(ACKNOWLEDGEMENT));
    let sequence = u32::from_be(tcp.get(SEQUENCE));
    if !flags.intersects(TcpFlags::ACK) {
        return Ok(());
    }
    let reply = conntrack::reply_of(flow, pkt.args.place);
    let mut first = flow.sequence().load();
    if flags & (TcpFlags::SYN | TcpFlags::RST) == TcpFlags::SYN {
        first = acknowledgement.wrapping_add(if is_header { len } else { 0 });
        let own = sequence.wrapping_add(1);
        let Some(reply) = reply else { return Err(Verdict::BeforeClientAddress) };
        let state = flow.state().load();
        let is_accepted = state.intersects(ConnState::ANSWERED);
        if !is_accepted {
            flow.sequence().store(first);
            flow.state().store(state | ConnState::ANSWERED);
        }
        // Or it was lost, and made again.
        if !is_accepted || reply.sequence().load() == 0 {
            reply.sequence().store(own);
            reply.port().store(units(pkt.now));
        }
        let is_told = is_header && !state.intersects(ConnState::PROXY_PENDING);
        let expected = if is_told { distance(own, first, len) } else { first };
        if flow.sequence().load() != expected || reply.sequence().load() != own {
            // Another connection: a SYN of its own begins it.
            conntrack::delete(flow);
            return Err(Verdict::BeforeClientAddress);
        }
        // The client's first segment gets longer.
        mss::lower(&mut pkt.frame, l4, len as u16);
    }
    let missing = first.wrapping_sub(acknowledgement);
    if is_header && missing.wrapping_sub(1) < len {
        return proxy_protocol::renumber(&mut pkt.frame, l4, ACKNOWLEDGEMENT, missing)
            .ok_or(Verdict::Truncated);
    }
    // By a header it knows what it has acknowledged, by an option what has come with the first byte.
    let known = missing.wrapping_neg().wrapping_sub(if is_header { 0 } else { 1 });
    let own = conntrack::reply_of(flow, pkt.args.place)
        .map(|reply| reply.sequence().load())
        .filter(|own| *own != 0 && sequence.wrapping_sub(*own) < MAX_SENT);
    if !flags.intersects(TcpFlags::SYN | TcpFlags::RST)
        && flow.state().load().contains(ConnState::ANSWERED | ConnState::PROXY_PENDING)
        && known <= MAX_ACKNOWLEDGED
        && let Some(own) = own
    {
        if is_header {
            flow.sequence().store(distance(own, first, len));
        }
        conntrack::establish(pkt.now, flow, pkt.args.place, backend);
    }
    Ok(())
}

/// How far the backend's first number, `own`, is ahead of that of the header.
#[inline(always)]
const fn distance(own: u32, first: u32, len: u32) -> u32 {
    own.wrapping_sub(first.wrapping_sub(len))
}

/// A time in units of [`AGE_SHIFT`].
#[inline(always)]
const fn units(jiffies: u32) -> u16 {
    (jiffies >> AGE_SHIFT) as u16
}

/// Whether a SYN-ACK that a reply's entry stands for may have had a cookie that is still good: Linux takes one for two
/// minutes, and a connection may be opening for one.
#[inline(always)]
fn may_have_cookie(now: u32, reply: Entry) -> bool {
    let minutes = units(maps::settings().opening_jiffies().wrapping_mul(2));
    units(now).wrapping_sub(reply.port().load()) <= minutes.wrapping_add(1)
}
