//! What backends of full NAT cannot see: who the client is. They are told as a connection begins, by a header
//! before its first byte or by an option. [`client_address`] has both.
//!
//! A packet that has been translated comes here as long as its backend may not know yet
//! ([`UNTOLD`]): what begins the connection is told as often as it is sent, so nothing has to be kept for
//! when a packet is lost.

use core::{hint::black_box, ptr};

use aya_ebpf::{
    helpers::{bpf_xdp_adjust_head, bpf_xdp_load_bytes, bpf_xdp_store_bytes},
    programs::XdpContext,
};
use slb_common::{
    abi::{BY_HEADER, Backend, FLOW_FORWARD, Flow, UNTOLD},
    client_address::{self, ACKNOWLEDGEMENT, Head, MAX_BEYOND, SEQUENCE, Words},
    cross::{HEAD_V4, HEAD_V6},
    mss,
    parse::{ACK, FRAGMENT_NONE, L3, RST, SYN},
    verdict::Verdict,
};

use crate::{
    flows, maps,
    work::{self, Exit, Sent, Work, sent},
};

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
    let options_end = u32::from(tcp.get::<u8>(12) >> 4) * 4;
    let (flags, len) = (work.packet.flags, work.handover.told);
    let is_header = flow.state & BY_HEADER != 0;
    if is_header && work.packet.is_syn() {
        flow.sequence = sequence.wrapping_add(1);
    }
    let at = if is_header {
        let is_syn = flags & SYN != 0;
        if sequence.wrapping_add(is_syn.into()) != flow.sequence {
            return Ok(());
        }
        client_address::renumber(&mut work.frame, l4, SEQUENCE, len.wrapping_neg())
            .ok_or(Verdict::Truncated)?;
        let headers = work.packet.l4.wrapping_sub(L3 as u32).wrapping_add(options_end);
        // A SYN has data if the client believes that the backend takes it (RFC 7413).
        if flags & RST != 0 || is_syn && headers == work.packet.len {
            return Ok(());
        }
        l4 as u32 + options_end
    } else {
        // Nor does what has no room for it say who sends it.
        if flags & (SYN | RST) != 0 || options_end + len > 60 {
            return Ok(());
        }
        // Before others: some end the list of options with padding.
        l4 as u32 + 20
    };
    // In generic mode a packet may be as long as its header can say.
    let is_full = work.packet.len.wrapping_add(len) > u16::MAX.into();
    if work.packet.fragment != FRAGMENT_NONE || is_full {
        return Err(Verdict::Untranslatable);
    }
    let (words, head) = maps::told().ok_or(Verdict::Inconsistent)?;
    client_address::write(words, is_header, &flow.key());
    client_address::account(&mut work.frame, is_v4, l4, words, len, !is_header)
        .ok_or(Verdict::Truncated)?;
    insert(work.ctx, at, len, words, head)
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
            | bpf_xdp_adjust_head(ctx.ctx, (len as i32).wrapping_neg())
            | bpf_xdp_store_bytes(ctx.ctx, 0, head, moved)
    };
    if failed != 0 {
        return Err(Verdict::Inconsistent);
    }
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

/// A backend's packet.
#[inline(always)]
fn hear(work: &mut Work<'_>, flow: &mut Flow, backend: &Backend, l4: usize) -> Result<(), Verdict> {
    let (flags, len) = (work.packet.flags, work.handover.told);
    if flags & SYN != 0 {
        // The client's first segment gets longer.
        mss::lower(&mut work.frame, l4, len as u16);
    }
    if flags & ACK == 0 {
        return Ok(());
    }
    let knows = flags & (SYN | RST) == 0;
    if flow.state & BY_HEADER != 0 {
        let tcp = work.frame.header::<20>(l4).ok_or(Verdict::Truncated)?;
        let missing = flow.sequence.wrapping_sub(u32::from_be(tcp.get(ACKNOWLEDGEMENT)));
        if missing.wrapping_sub(1) < len {
            client_address::renumber(&mut work.frame, l4, ACKNOWLEDGEMENT, missing)
                .ok_or(Verdict::Truncated)?;
        } else if knows {
            // Who sends from addresses that are not its own has not got that far.
            flows::establish(work.now, flow, work.handover.place, backend);
        }
    } else if knows {
        flow.state &= !UNTOLD;
    }
    Ok(())
}
