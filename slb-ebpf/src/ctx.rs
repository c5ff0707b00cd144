//! A packet in a program: the frame, what was parsed of it, and what the program before has handed over.

use aya_ebpf::programs::XdpContext;
use slb_common::{
    abi::{NextHop, TailCallArgs},
    frame::Frame,
    parse::{Packet, TAG_LEN},
};

use crate::kernel;

/// A packet in a program.
pub struct PacketCtx<'a> {
    pub ctx: &'a XdpContext,
    pub frame: Frame<'a>,
    pub packet: &'a Packet,
    /// Where the packet has to be stored before another function or program reads it, if it is in registers.
    kept: Option<&'a mut Packet>,
    pub args: &'a mut TailCallArgs,
    /// Length of the frame as it arrived, in bytes.
    pub bytes: u64,
    /// Low half of the jiffies.
    pub now: u32,
}

/// What a called function reads of a packet. A pointer to [`PacketCtx`] itself would force all of that out of
/// the registers.
#[derive(Clone, Copy)]
pub struct PacketView<'a> {
    pub ctx: &'a XdpContext,
    pub packet: &'a Packet,
    /// Low half of the jiffies.
    pub now: u32,
}

/// What the kernel has of a frame in its first buffer.
#[inline(always)]
pub fn frame(ctx: &XdpContext) -> Frame<'_> {
    // SAFETY: the kernel vouches for `data..data_end` until the frame is resized; whoever does that
    // asks for it again.
    unsafe { Frame::from_raw(ctx.data() as *mut u8, ctx.data_end() as *mut u8) }
}

impl<'a> PacketCtx<'a> {
    /// In the first program. `packet` is the one in the map, or one to which there is no other pointer: then it
    /// is stored in `kept` before others read it.
    #[inline(always)]
    pub fn begin(
        ctx: &'a XdpContext,
        packet: &'a Packet,
        kept: Option<&'a mut Packet>,
        args: &'a mut TailCallArgs,
    ) -> Self {
        let frame = frame(ctx);
        let bytes = frame.len() as u64;
        Self { ctx, frame, packet, kept, args, bytes, now: kernel::jiffies() }
    }

    /// In a program behind the first.
    #[inline(always)]
    pub fn resume(ctx: &'a XdpContext, packet: &'a Packet, args: &'a mut TailCallArgs) -> Self {
        let bytes = args.bytes;
        Self { bytes, ..Self::begin(ctx, packet, None, args) }
    }

    /// For a function that is called.
    #[inline(always)]
    pub const fn view(&mut self) -> PacketView<'_> {
        self.view_and_hop().0
    }

    /// The same, and where a function that is called leaves a next hop: not on the stack.
    #[inline(always)]
    pub const fn view_and_hop(&mut self) -> (PacketView<'_>, &mut NextHop) {
        self.keep();
        let packet = match &self.kept {
            Some(kept) => kept,
            None => self.packet,
        };
        (PacketView { ctx: self.ctx, packet, now: self.now }, &mut self.args.hop)
    }

    /// Stores the packet where others read it.
    #[inline(always)]
    pub const fn keep(&mut self) {
        if let Some(kept) = &mut self.kept {
            self.packet.copy_to(kept);
        }
    }

    /// Length of the frame as it arrived, in bytes. Behind the first program (`REST`) it is read once more, so that it
    /// is not kept on the stack.
    #[inline(always)]
    pub const fn arrived_bytes<const REST: bool>(&self) -> u64 {
        if REST { self.args.bytes } else { self.bytes }
    }

    /// Length of the frame as it is now, tags taken off, in bytes.
    #[inline(always)]
    pub const fn bytes_left(&self) -> u64 {
        let [outer, inner] = self.args.tags;
        let tags = (outer != 0) as u64 + (inner != 0) as u64;
        self.bytes.wrapping_sub(tags * TAG_LEN as u64)
    }

    /// Moves the beginning of the frame by so many bytes. `None`: there is no room.
    #[inline(always)]
    pub fn adjust_head(&mut self, by: i32) -> Option<()> {
        kernel::adjust_head(self.ctx, by)?;
        self.frame = frame(self.ctx);
        Some(())
    }

    /// Moves the end of the frame by so many bytes. `None`: there is no room.
    #[inline(always)]
    pub fn adjust_tail(&mut self, by: i32) -> Option<()> {
        kernel::adjust_tail(self.ctx, by)?;
        self.frame = frame(self.ctx);
        Some(())
    }
}
