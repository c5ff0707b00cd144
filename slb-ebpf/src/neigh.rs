//! Next hops.

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_BLACKHOLE, BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NO_NEIGH,
    BPF_FIB_LKUP_RET_PROHIBIT, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LKUP_RET_UNREACHABLE,
};
use slb_common::{
    abi::{Address, ClientNextHop, EPOCH_LEARNED, MAX_NEXT_HOPS, NEXT_HOP_LOCAL, NextHop, Roles},
    hash,
    verdict::Verdict,
};

use crate::{
    cell::{Elements as _, Guarded as _, Reading, SharedCell},
    ctx::{PacketCtx, PacketView},
    global::Packed,
    kernel, maps,
};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// How the frame came: the way back to its sender, if that is where the route leads as well.
#[inline(always)]
fn reverse_path(pkt: &PacketCtx<'_>) -> NextHop {
    let Some(eth) = pkt.frame.header::<12>(0) else { return NextHop::UNRESOLVED };
    // The sender's address comes second in a frame, and first in the answer.
    let (to_us, from): ([u16; 3], [u16; 3]) =
        ([eth.get(0), eth.get(2), eth.get(4)], [eth.get(6), eth.get(8), eth.get(10)]);
    let ([a, b, c], [d, e, f]) = (from, to_us);
    NextHop::from_mac_words(kernel::ingress(pkt.ctx), [pair(a, b), pair(c, d), pair(e, f)])
}

/// Two words that stand side by side in a frame, as one.
#[inline(always)]
const fn pair(first: u16, second: u16) -> u32 {
    let ([a, b], [c, d]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

/// Where the way from a VIP to a client is kept.
#[inline(always)]
fn client(addr: &Address, vip: &Address) -> Option<SharedCell<ClientNextHop>> {
    let index = hash::address(*addr) ^ hash::address(*vip);
    maps::SLB_NEXT_HOPS.cell((index % MAX_NEXT_HOPS) as u32)
}

/// Whether it is the one that is looked for, and not about to be another's.
#[inline(always)]
fn is_of(client: SharedCell<ClientNextHop>, addr: &Address, vip: &Address) -> bool {
    client.addr().load().same(*addr) && client.vip().load().same(*vip)
}

/// Notes how a client's packets come, until the kernel says how to get to it.
#[inline(always)]
pub fn learn_client_neighbour(pkt: &PacketCtx<'_>) {
    let (addr, vip) = (&pkt.packet.key.src, &pkt.packet.key.dst);
    let Some(client) = client(addr, vip) else { return };
    if !is_of(client, addr, vip) {
        store(client, addr, vip, reverse_path(pkt), EPOCH_LEARNED, [0, 0]);
    }
}

/// Writes, unless another CPU is writing there. The addresses come first: a reader looks at them last.
#[inline(always)]
fn store(
    client: SharedCell<ClientNextHop>,
    addr: &Address,
    vip: &Address,
    hop: NextHop,
    epoch: u32,
    [flags, mtu]: [u32; 2],
) {
    let Some(claim) = client.claim(client.epoch().load()) else { return };
    let client = claim.cell();
    client.addr().store(*addr);
    client.vip().store(*vip);
    client.hop().store(hop);
    client.flags().store(flags);
    client.mtu().store(mtu);
    claim.publish(epoch);
}

/// The way to a client.
pub struct ClientRoute {
    /// The next hop.
    pub hop: NextHop,
    /// [`ClientNextHop::mtu`].
    pub mtu: u32,
}

/// The way from the VIP `vip` to the client `addr`, looked up in the kernel's tables once per route
/// epoch. `None`: it is the gateway itself.
#[inline(always)]
pub fn client_route(
    pkt: &mut PacketCtx<'_>,
    vip: &Address,
    addr: &Address,
) -> Result<Option<ClientRoute>, Verdict> {
    let client = client(addr, vip).ok_or(Verdict::Inconsistent)?;
    // The addresses come last: the epoch may be the same before and after a write.
    let Reading { guard: epoch, value, is_unchanged } = client.read(|client| {
        let (hop, flags, mtu) = (client.hop().load(), client.flags().load(), client.mtu().load());
        (hop, flags, mtu, is_of(client, addr, vip))
    });
    let (mut hop, flags, mut mtu, is_it) = value;
    let is_whole = is_it && is_unchanged;
    if is_whole && epoch == maps::settings().route_epoch() {
        if flags & NEXT_HOP_LOCAL != 0 {
            return Ok(None);
        }
        return Ok(Some(ClientRoute { hop, mtu }));
    }
    if !is_whole || ClientNextHop::is_claimed(epoch) {
        hop = NextHop::UNRESOLVED;
    }
    let (view, known) = pkt.view_and_hop();
    *known = hop;
    // Copies: the originals may be in registers.
    match Answer::unpack(fib_lookup(&view, &{ *vip }, &{ *addr }, known)) {
        Answer::End(verdict) => return Err(verdict),
        Answer::Local => return Ok(None),
        Answer::Way { mtu: found } => (hop, mtu) = (*known, found),
    }
    Ok(Some(ClientRoute { hop, mtu }))
}

/// What the kernel says about the way to a client.
enum Answer {
    /// The packet ends here.
    End(Verdict),
    /// The client is the gateway itself.
    Local,
    /// [`ClientNextHop::mtu`] of the way.
    Way { mtu: u32 },
}

impl Packed for Answer {
    type Register = u32;

    #[inline(always)]
    fn pack(self) -> u32 {
        match self {
            Self::End(verdict) => IS_VERDICT | verdict as u32,
            Self::Local => NEXT_HOP_LOCAL,
            Self::Way { mtu } => mtu << MTU_SHIFT,
        }
    }

    #[inline(always)]
    fn unpack(register: u32) -> Self {
        if register & IS_VERDICT != 0 {
            Self::End(Verdict::from_slot(register & !IS_VERDICT))
        } else if register & NEXT_HOP_LOCAL != 0 {
            Self::Local
        } else {
            Self::Way { mtu: register >> MTU_SHIFT }
        }
    }
}

/// In the register of an [`Answer`]: the rest is a verdict.
const IS_VERDICT: u32 = 1 << 8;
/// In the register of an [`Answer`]: where the MTU begins.
const MTU_SHIFT: u32 = 16;

/// Asks the kernel for the way from the VIP to the client; `hop` is the last that is known, and becomes the answer's.
/// Gives an [`Answer`], packed. Only what the kernel says is good for the epoch; a fallback is not cached.
#[inline(never)]
fn fib_lookup(view: &PacketView<'_>, vip: &Address, addr: &Address, hop: &mut NextHop) -> u32 {
    look_up(view, vip, addr, hop).pack()
}

#[inline(always)]
fn look_up(view: &PacketView<'_>, vip: &Address, addr: &Address, hop: &mut NextHop) -> Answer {
    let Some(client) = client(addr, vip) else { return Answer::End(Verdict::Inconsistent) };
    let epoch = maps::settings().route_epoch();
    if maps::roles(addr).intersects(Roles::LOCAL | Roles::VIP) {
        // The hop does not matter.
        store(client, addr, vip, *hop, epoch, [NEXT_HOP_LOCAL, 0]);
        return Answer::Local;
    }
    let Some(query) = maps::route_query() else { return Answer::Way { mtu: 0 } };
    query.clear();
    query.ifindex = kernel::ingress(view.ctx);
    query.proto = view.packet.key.proto as u8;
    let src = vip.words();
    let dst = addr.words();
    if addr.is_v4() {
        query.family = AF_INET;
        (query.src[0], query.dst[0]) = (src[3], dst[3]);
    } else {
        query.family = AF_INET6;
        (query.src, query.dst) = (src, dst);
    }
    let answer = kernel::fib_lookup(view.ctx, query);
    match answer {
        BPF_FIB_LKUP_RET_SUCCESS if maps::can_redirect(query.ifindex) => {
            *hop = query.hop();
            let mtu = u32::from(query.mtu);
            let mtu = if maps::settings().generic() == 0 { mtu } else { 0 };
            store(client, addr, vip, *hop, epoch, [0, mtu]);
            return Answer::Way { mtu };
        }
        BPF_FIB_LKUP_RET_BLACKHOLE | BPF_FIB_LKUP_RET_UNREACHABLE | BPF_FIB_LKUP_RET_PROHIBIT => {
            return Answer::End(Verdict::NoRoute);
        }
        // The neighbour is one that the kernel has not needed yet: the client's last packet came
        // from it, or the kernel knew it a moment ago.
        BPF_FIB_LKUP_RET_NO_NEIGH if query.ifindex == hop.ifindex => {}
        // A gateway that does not forward for anybody else can still answer its clients.
        BPF_FIB_LKUP_RET_FWD_DISABLED => {}
        _ => hop.ifindex = NextHop::UNRESOLVED.ifindex,
    }
    Answer::Way { mtu: 0 }
}
