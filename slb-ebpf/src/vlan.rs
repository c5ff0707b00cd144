//! VLAN tags (IEEE 802.1Q, 802.1ad): taken off, so that no other program has to know of them, and put back
//! before the frame goes anywhere.

use aya_ebpf::programs::XdpContext;
use slb_common::parse::{self, TAG_LEN};

use crate::{ctx, kernel};

/// Where the first tag is.
const AT: usize = 12;

/// Takes a frame's tags off. `None`: the kernel does not let it be shortened.
#[inline(always)]
pub fn take(xdp: &XdpContext) -> Option<[u32; 2]> {
    let mut frame = ctx::frame(xdp);
    let count = parse::tags(&frame);
    let mut tags = [0; 2];
    if count == 0 {
        return Some(tags);
    }
    tags[0] = frame.header::<TAG_LEN>(AT)?.get(0);
    if count == 2 {
        tags[1] = frame.header::<TAG_LEN>(AT + TAG_LEN)?.get(0);
    }
    let macs = frame.header::<AT>(0)?;
    let macs: [u32; 3] = [macs.get(0), macs.get(4), macs.get(8)];
    let mut moved = frame.header_mut::<AT>(if count == 2 { 2 * TAG_LEN } else { TAG_LEN })?;
    for (at, word) in [0, 4, 8].into_iter().zip(macs) {
        moved.set(at, word);
    }
    kernel::adjust_head(xdp, (count * TAG_LEN) as i32)?;
    Some(tags)
}

/// Puts them back. `None`: there is no room.
#[inline(always)]
pub fn put(xdp: &XdpContext, tags: [u32; 2]) -> Option<()> {
    let [outer, inner] = tags;
    if outer == 0 {
        return Some(());
    }
    let len = if inner == 0 { TAG_LEN } else { 2 * TAG_LEN };
    kernel::adjust_head(xdp, -(len as i32))?;
    let mut frame = ctx::frame(xdp);
    let macs = frame.header::<AT>(len)?;
    let macs: [u32; 3] = [macs.get(0), macs.get(4), macs.get(8)];
    let mut head = frame.header_mut::<{ AT + TAG_LEN }>(0)?;
    for (at, word) in [0, 4, 8].into_iter().zip(macs) {
        head.set(at, word);
    }
    head.set(AT, outer);
    if inner != 0 {
        frame.header_mut::<TAG_LEN>(AT + TAG_LEN)?.set(0, inner);
    }
    Some(())
}
