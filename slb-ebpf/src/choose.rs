//! Listener → backend of a new flow.

use slb_common::{
    abi::{CHUNK_SLOTS, Listener, ROLE_VIP, SCHEDULER_HASH, TCP},
    hash,
    parse::Packet,
    verdict::Verdict,
};

use crate::{Work, maps, role};

/// Backend for the first packet of a flow to a VIP.
///
/// TCP in the middle of a connection gets the backend that the hash gives: that is how another
/// gateway has chosen, and so its connections survive it. A scheduler that counts has no such answer.
#[inline(always)]
pub fn backend(work: &Work<'_>) -> Result<u32, Verdict> {
    let packet = &work.packet;
    // SAFETY: copied out at once.
    let listener = unsafe { maps::SLB_LISTENERS.get(packet.key.destination()) }
        .copied()
        .ok_or(Verdict::NoListener)?;
    if is_martian(packet) || role(&packet.key.src) & ROLE_VIP != 0 {
        return Err(Verdict::Martian);
    }
    if packet.key.proto == TCP && !packet.is_syn() && listener.scheduler != SCHEDULER_HASH {
        return Err(Verdict::NoFlow);
    }
    if listener.slots == 0 {
        return Err(Verdict::NoBackend);
    }
    let slot = slot(work, &listener);
    let chunk = maps::SLB_SLOTS
        .get(listener.first_chunk.wrapping_add(slot / CHUNK_SLOTS as u32))
        .ok_or(Verdict::Inconsistent)?;
    Ok(chunk.backends[slot as usize % CHUNK_SLOTS])
}

/// Whether the source is no unicast address that a router may forward from: RFC 1812, section 5.3.7;
/// RFC 3927, section 2.7; RFC 4291, sections 2.5.2, 2.5.3, 2.5.6 and 2.7.
#[inline(always)]
fn is_martian(packet: &Packet) -> bool {
    let bytes = &packet.key.src.bytes;
    if packet.is_v4 {
        return matches!(bytes[12], 0 | 127 | 224..) || (bytes[12] == 169 && bytes[13] == 254);
    }
    let [high, low] = packet.key.src.halves();
    let is_none_or_loopback = high == 0 && u64::from_be(low) <= 1;
    let is_link_local = bytes[0] == 0xfe && bytes[1] & 0xc0 == 0x80;
    is_none_or_loopback || is_link_local || bytes[0] == 0xff
}

#[inline(always)]
fn slot(work: &Work<'_>, listener: &Listener) -> u32 {
    if listener.scheduler == SCHEDULER_HASH {
        return hash::slot(hash::flow(&work.packet.key), listener.slots);
    }
    let Some(cursor) = maps::SLB_CURSORS.get_ptr_mut(listener.id) else { return 0 };
    // SAFETY: an element of an array map lives as long as the map and is aligned to 8 bytes.
    let turn = unsafe { fetch_increment(cursor) };
    (turn % u64::from(listener.slots)) as u32
}

/// Adds 1 and gives what was there before, in one step for all CPUs.
///
/// The BPF target has no `AtomicU64::fetch_add`; the instruction is there since kernel 5.12.
///
/// # Safety
///
/// `counter` must be valid, aligned to 8 bytes, and written in this way only.
#[inline(always)]
unsafe fn fetch_increment(counter: *mut u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut turn = 1_u64;
        // SAFETY: one instruction on memory that the caller vouches for.
        unsafe {
            core::arch::asm!(
                "{turn} = atomic_fetch_add((u64 *)({counter} + 0), {turn})",
                turn = inout(reg) turn,
                counter = in(reg) counter,
            );
        }
        turn
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        let _ = counter;
        unreachable!("compiled for the host by linters only")
    }
}
