//! Listener → backend of a new flow.

use slb_common::{
    abi::{CHUNK_SLOTS, Listener, ROLE_VIP, SCHEDULER_HASH, TCP},
    hash,
    parse::RST,
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
    let first_byte = packet.key.src.bytes[0];
    let is_multicast = if packet.is_v4 {
        packet.key.src.bytes[12] >= 224 || packet.key.src.bytes[12] == 0
    } else {
        first_byte == 0xff
    };
    if is_multicast || role(&packet.key.src) & ROLE_VIP != 0 {
        return Err(Verdict::Martian);
    }
    if packet.key.proto == TCP
        && !packet.is_syn()
        && (listener.scheduler != SCHEDULER_HASH || packet.flags & RST != 0)
    {
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
    let mut turn = 1_u64;
    #[cfg(target_arch = "bpf")]
    // SAFETY: one instruction on memory that the caller vouches for.
    unsafe {
        core::arch::asm!(
            "{turn} = atomic_fetch_add((u64 *)({counter} + 0), {turn})",
            turn = inout(reg) turn,
            counter = in(reg) counter,
        );
    }
    #[cfg(not(target_arch = "bpf"))]
    {
        let _ = (counter, &mut turn);
        unreachable!("compiled for the host by linters only")
    }
    turn
}
