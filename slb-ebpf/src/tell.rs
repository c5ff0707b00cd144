//! What backends of full NAT cannot see: who the client is. They are told as a connection begins, by a header
//! before its first byte or by an option. [`client_address`] has both.
//!
//! A packet that has been translated comes here as long as its backend may not know yet
//! ([`UNTOLD`]): what begins the connection is told as often as it is sent, so nothing has to be kept for
//! when a packet is lost. No other bytes of the client's get to the backend before that, nor does an option that
//! looks like ours, ever: `docs/adr/0021-client-address-cannot-be-forged.md` has the states.

use core::{hint::black_box, ptr};

use aya_ebpf::{
    helpers::{bpf_get_prandom_u32, bpf_xdp_adjust_head, bpf_xdp_load_bytes, bpf_xdp_store_bytes},
    programs::XdpContext,
};
use slb_common::{
    abi::{ACCEPTED, Backend, ESTABLISHED, FLOW_FORWARD, Flow, TOLD_HEADER, UNTOLD},
    checksum::Delta,
    client_address::{self, ACKNOWLEDGEMENT, Head, MAX_BEYOND, SEQUENCE, Words},
    cross::{HEAD_V4, HEAD_V6},
    mss,
    parse::{ACK, FIN, L3, RST, SYN},
    verdict::Verdict,
};

use crate::{
    flows, maps,
    work::{self, Exit, Sent, Work, sent},
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
const COOKIE_SHIFT: u32 = 2 * client_address::COOKIE_SPREAD + 1;

/// Sends a packet of either direction, which is translated otherwise.
#[inline(always)]
pub fn tell(work: &mut Work<'_>) -> Result<Sent, Exit> {
    let is_reply = work.handover.what != FLOW_FORWARD.into();
    let flow = flows::at(work.handover.place).ok_or(Verdict::Inconsistent)?;
    let backend = maps::backend(flow.backend).ok_or(Verdict::Inconsistent)?;
    // What it is by now.
    let is_v4 = if is_reply { flow.src.is_v4() } else { backend.addr.is_v4() };
    let l4 = if is_v4 == work.packet.is_v4() {
        work.packet.l4 as usize
    } else {
        L3 + if is_v4 { HEAD_V4 } else { HEAD_V6 }
    };
    if is_reply {
        hear(work, flow, backend, l4)?;
    } else {
        say(work, flow, l4, is_v4)?;
    }
    Ok(sent(is_reply, work.handover.hop))
}

/// A client's packet.
#[inline(always)]
fn say(work: &mut Work<'_>, flow: &mut Flow, l4: usize, is_v4: bool) -> Result<(), Verdict> {
    let tcp = work.frame.header::<20>(l4).ok_or(Verdict::Truncated)?;
    let sequence = u32::from_be(tcp.get(SEQUENCE));
    let acknowledgement = u32::from_be(tcp.get(ACKNOWLEDGEMENT));
    let options_end = u32::from(tcp.get::<u8>(12) >> 4) * 4;
    let (flags, len) = (work.packet.flags, work.handover.told);
    let headers = work.packet.l4.wrapping_sub(L3 as u32).wrapping_add(options_end);
    if options_end < 20 || headers > work.packet.len {
        return Err(Verdict::Malformed);
    }
    let has_data = headers < work.packet.len;
    let is_header = flow.told == TOLD_HEADER;
    let is_told = flow.state & UNTOLD == 0;
    if flags & SYN != 0 {
        // Data in a SYN (RFC 7413) would be taken before anything else.
        if !work.packet.is_syn() || has_data {
            return Err(Verdict::BeforeClientAddress);
        }
        let first = sequence.wrapping_add(1);
        if flow.state & ACCEPTED == 0 {
            flow.sequence = first;
        }
        if is_header {
            // Another SYN than that of the connection may begin one at a backend that has forgotten this: at a
            // number that the client does not know, until the SYN-ACK removes the entry.
            let is_own = !is_told && flow.sequence == first;
            // SAFETY: touches no memory of ours.
            let by = if is_own { len.wrapping_neg() } else { unsafe { bpf_get_prandom_u32() } };
            client_address::renumber(&mut work.frame, l4, SEQUENCE, by)
                .ok_or(Verdict::Truncated)?;
        }
        return set_options(work, flow, l4, is_v4, options_end, 0);
    }
    // Without its number the reply's entry was lost, and made again.
    let reply = flows::reply_of(flow, work.handover.place).filter(|reply| reply.sequence != 0);
    let answers = reply
        .as_ref()
        .filter(|_| flow.state & ACCEPTED != 0 && flags & ACK != 0)
        .map(|reply| acknowledgement.wrapping_sub(reply.sequence));
    if !is_header {
        let behind = sequence.wrapping_sub(flow.sequence);
        if answers.is_some_and(|answers| answers < MAX_SENT) {
            flow.state |= ESTABLISHED;
        }
        let is_to_tell = flags & RST == 0 && (!is_told || behind == 0);
        return set_options(work, flow, l4, is_v4, options_end, if is_to_tell { len } else { 0 });
    }
    let is_first_answer = answers == Some(0);
    if is_told {
        let numbers = (sequence, acknowledgement);
        let may_be_cookie = flags & (ACK | RST) == ACK
            && client_address::is_cookie(numbers, flow.sequence)
            && reply.is_none_or(|reply| may_have_cookie(work.now, reply));
        if !may_be_cookie {
            return Ok(());
        }
        if is_first_answer {
            return Err(Verdict::BeforeClientAddress);
        }
        // A client may have sent and got just as much, so it may not be dropped. An acknowledgement alone counts from
        // anywhere in the window; data cannot move, but may acknowledge less.
        let (at, by) = if has_data || flags & FIN != 0 {
            (ACKNOWLEDGEMENT, COOKIE_SHIFT.wrapping_neg())
        } else {
            (SEQUENCE, COOKIE_SHIFT)
        };
        return client_address::renumber(&mut work.frame, l4, at, by).ok_or(Verdict::Truncated);
    }
    let behind = sequence.wrapping_sub(flow.sequence);
    if flags & RST != 0 {
        if behind != 0 {
            return Ok(());
        }
    } else {
        if flow.state & ACCEPTED == 0 {
            return Err(Verdict::BeforeClientAddress);
        }
        client_address::clear_urgent(&mut work.frame, l4).ok_or(Verdict::Truncated)?;
        if behind != 0 {
            let is_next = behind < MAX_BEHIND;
            let is_probe = behind == u32::MAX && !has_data && flags & FIN == 0;
            // The numbers of a cookie have another distance.
            let passes = is_first_answer && (is_next || is_probe);
            return if passes { Ok(()) } else { Err(Verdict::BeforeClientAddress) };
        }
    }
    client_address::renumber(&mut work.frame, l4, SEQUENCE, len.wrapping_neg())
        .ok_or(Verdict::Truncated)?;
    // In generic mode a packet may be as long as its header can say.
    if work.packet.len.wrapping_add(len) > u16::MAX.into() {
        return Err(Verdict::Untranslatable);
    }
    let (words, head, _) = maps::told().ok_or(Verdict::Inconsistent)?;
    client_address::write(words, true, &flow.key());
    let delta = client_address::words_delta(words, len);
    client_address::account(&mut work.frame, is_v4, l4, (0, len), delta, false)
        .ok_or(Verdict::Truncated)?;
    insert(work.ctx, l4 as u32 + options_end, len, words, head)
}

/// Gives a segment the options that the backend may see, and `more` bytes of ours before them.
#[inline(always)]
fn set_options(
    work: &mut Work<'_>,
    flow: &Flow,
    l4: usize,
    is_v4: bool,
    options_end: u32,
    more: u32,
) -> Result<(), Verdict> {
    let (words, head, options) = maps::told().ok_or(Verdict::Inconsistent)?;
    if work.packet.len.wrapping_add(more) > u16::MAX.into() {
        return Err(Verdict::Untranslatable);
    }
    let (at, before) = (l4 as u32 + 20, options_end.wrapping_sub(20));
    options.clear();
    if before != 0
        // SAFETY: the context is the kernel's, and there is room for as much.
        && unsafe {
            bpf_xdp_load_bytes(work.ctx.ctx, at, options.found.as_mut_ptr().cast(), bounded(before)) != 0
        }
    {
        return Err(Verdict::Truncated);
    }
    if more != 0 {
        client_address::write(words, false, &flow.key());
    }
    let made = tell_make_options(before, more);
    let after = made >> 16;
    let mut delta = Delta::default();
    delta.add32(made & 0xffff);
    client_address::account(&mut work.frame, is_v4, l4, (before, after), delta, true)
        .ok_or(Verdict::Truncated)?;
    if before != after {
        resize(work.ctx, at, after as i32 - before as i32, head)?;
    }
    if after != 0
        // SAFETY: as above.
        && unsafe {
            bpf_xdp_store_bytes(work.ctx.ctx, at, options.made.as_mut_ptr().cast(), bounded(after)) != 0
        }
    {
        return Err(Verdict::Inconsistent);
    }
    Ok(())
}

/// The length of options that are there, as the verifier has to see it: neither nothing nor too much. Linux 6.1 learns
/// nothing from a comparison with 0.
#[inline(always)]
fn bounded(len: u32) -> u32 {
    black_box(len.wrapping_sub(1)) % client_address::OPTIONS_SIZE as u32 + 1
}

/// [`client_address::make_options`] for this CPU's, verified once: their length, and below that how the sum changes.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn tell_make_options(before: u32, more: u32) -> u32 {
    let Some((words, _, options)) = maps::told() else { return 0 };
    let after = client_address::make_options(options, before, words, more);
    after << 16 | u32::from(client_address::options_delta(options).folded())
}

/// Puts `words`, of which `len` bytes count, into a frame at `at`.
#[inline(always)]
fn insert(
    ctx: &XdpContext,
    at: u32,
    len: u32,
    words: &Words,
    head: &mut Head,
) -> Result<(), Verdict> {
    let moved = resize(ctx, at, len as i32, head)?;
    let mut frame = work::frame(ctx);
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
fn resize(ctx: &XdpContext, at: u32, more: i32, head: &mut Head) -> Result<u32, Verdict> {
    let beyond = at.wrapping_sub(L3 as u32);
    if beyond > MAX_BEYOND {
        return Err(Verdict::Untranslatable);
    }
    // Says once more what the verifier has to see: neither nothing nor too much.
    let moved = (black_box(beyond) & MAX_BEYOND) + L3 as u32;
    let head = ptr::from_mut(head).cast();
    // SAFETY: the context is the kernel's, and there is room for as much; the frame is asked for afterwards.
    let failed = unsafe {
        bpf_xdp_load_bytes(ctx.ctx, 0, head, moved)
            | bpf_xdp_adjust_head(ctx.ctx, more.wrapping_neg())
            | bpf_xdp_store_bytes(ctx.ctx, 0, head, moved)
    };
    if failed != 0 { Err(Verdict::Inconsistent) } else { Ok(moved) }
}

/// A backend's packet.
#[inline(always)]
fn hear(work: &mut Work<'_>, flow: &mut Flow, backend: &Backend, l4: usize) -> Result<(), Verdict> {
    let (flags, len) = (work.packet.flags, work.handover.told);
    let is_header = flow.told == TOLD_HEADER;
    let tcp = work.frame.header::<20>(l4).ok_or(Verdict::Truncated)?;
    let acknowledgement = u32::from_be(tcp.get(ACKNOWLEDGEMENT));
    let sequence = u32::from_be(tcp.get(SEQUENCE));
    if flags & ACK == 0 {
        return Ok(());
    }
    let reply = flows::reply_of(flow, work.handover.place);
    let mut first = flow.sequence;
    if flags & (SYN | RST) == SYN {
        first = acknowledgement.wrapping_add(if is_header { len } else { 0 });
        let own = sequence.wrapping_add(1);
        let Some(reply) = reply else { return Err(Verdict::BeforeClientAddress) };
        let is_accepted = flow.state & ACCEPTED != 0;
        if !is_accepted {
            flow.sequence = first;
            flow.state |= ACCEPTED;
        }
        // Or it was lost, and made again.
        if !is_accepted || reply.sequence == 0 {
            reply.sequence = own;
            reply.port = units(work.now);
        }
        let is_told = is_header && flow.state & UNTOLD == 0;
        let expected = if is_told { distance(own, first, len) } else { first };
        if flow.sequence != expected || reply.sequence != own {
            // Another connection: a SYN of its own begins it.
            flows::forget(flow);
            return Err(Verdict::BeforeClientAddress);
        }
        // The client's first segment gets longer.
        mss::lower(&mut work.frame, l4, len as u16);
    }
    let missing = first.wrapping_sub(acknowledgement);
    if is_header && missing.wrapping_sub(1) < len {
        return client_address::renumber(&mut work.frame, l4, ACKNOWLEDGEMENT, missing)
            .ok_or(Verdict::Truncated);
    }
    // By a header it knows what it has acknowledged, by an option what has come with the first byte.
    let known = missing.wrapping_neg().wrapping_sub(if is_header { 0 } else { 1 });
    let own = flows::reply_of(flow, work.handover.place)
        .map(|reply| reply.sequence)
        .filter(|own| *own != 0 && sequence.wrapping_sub(*own) < MAX_SENT);
    if flags & (SYN | RST) == 0
        && flow.state & (ACCEPTED | UNTOLD) == ACCEPTED | UNTOLD
        && known <= MAX_ACKNOWLEDGED
        && let Some(own) = own
    {
        if is_header {
            flow.sequence = distance(own, first, len);
        }
        flows::establish(work.now, flow, work.handover.place, backend);
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
fn may_have_cookie(now: u32, reply: &Flow) -> bool {
    let minutes = units(maps::settings().opening_jiffies.wrapping_mul(2));
    units(now).wrapping_sub(reply.port) <= minutes.wrapping_add(1)
}
