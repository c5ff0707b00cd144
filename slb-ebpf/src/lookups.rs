//! What [`slb_common::decide`] looks up, in the maps of the packet path.

use slb_common::{
    abi::{
        Address, Backend, CHUNK_SLOTS, Endpoint, FLOW_BYPASS, Flow, FlowKey, Fragment, Keys,
        Listener, NO_PLACE, QuicKey, RevNat, Settings, Sticky, StickyKey,
    },
    decide::{self, Entries, Entry, Judgement, Known, Limit, Lookups, Owner},
    parse::Packet,
    quic::{self, ConnectionId},
    rewrite,
    verdict::Verdict,
};

use crate::{atomic, conntrack, ctx::PacketCtx, maps, policy};

impl Lookups for PacketCtx<'_> {
    type Error = Verdict;
    type Ref<T: 'static> = &'static T;
    type Kept = &'static mut Sticky;

    #[inline(always)]
    fn now(&self) -> u32 {
        self.now
    }

    #[inline(always)]
    fn ingress(&self) -> u32 {
        self.ctx.ingress_ifindex() as u32
    }

    #[inline(always)]
    fn is_last_hop(&self) -> bool {
        rewrite::expires(&self.frame, self.packet)
    }

    #[inline(always)]
    fn chosen(&self) -> u32 {
        self.args.chosen
    }

    #[inline(always)]
    fn settings(&self) -> Result<Settings, Verdict> {
        Ok(maps::settings())
    }

    #[inline(always)]
    fn roles(&self, addr: &Address) -> Result<u32, Verdict> {
        Ok(maps::roles(addr))
    }

    #[inline(always)]
    fn listener(&self, to: &Endpoint) -> Result<Option<&'static Listener>, Verdict> {
        Ok(maps::listener(to))
    }

    #[inline(always)]
    fn revnat(&self, from: &Endpoint) -> Result<Option<&'static RevNat>, Verdict> {
        Ok(maps::revnat(from))
    }

    #[inline(always)]
    fn slot(&self, first_chunk: u32, number: u32) -> Result<u32, Verdict> {
        slot(first_chunk, number)
    }

    #[inline(always)]
    fn backend(&self, id: u32) -> Result<Option<&'static Backend>, Verdict> {
        Ok(maps::backend(id))
    }

    #[inline(always)]
    fn bypass_until(&self) -> u32 {
        maps::bypass_until()
    }

    #[inline(always)]
    fn bypass(&self, backend: u32) -> Result<u32, Verdict> {
        Ok(maps::SLB_BYPASS.get(backend).copied().unwrap_or_default())
    }

    #[inline(always)]
    fn turn(&mut self, listener: u32) -> Result<u64, Verdict> {
        let cursor = maps::SLB_RR_CURSORS.get_ptr_mut(listener).ok_or(Verdict::Inconsistent)?;
        // SAFETY: an element of an array map lives as long as the map and is aligned to 8 bytes.
        Ok(unsafe { atomic::fetch_add(cursor, 1) })
    }

    #[inline(always)]
    fn active(&self, backend: u32) -> Result<u64, Verdict> {
        Ok(maps::SLB_ACTIVE.get(backend).copied().unwrap_or_default())
    }

    #[inline(always)]
    fn kept(
        &mut self,
        listener: &Listener,
        client: &Address,
    ) -> Result<Option<&'static mut Sticky>, Verdict> {
        let key = sticky_key(listener, client).ok_or(Verdict::Inconsistent)?;
        // SAFETY: an element of the map lives until the program ends; two CPUs that write to it write much the same.
        Ok(maps::SLB_STICKY.get_ptr_mut(key).map(|sticky| unsafe { &mut *sticky }))
    }

    #[inline(always)]
    fn keep(&mut self, kept: &'static mut Sticky, expires: u32) {
        kept.expires = expires;
    }

    #[inline(always)]
    fn stick(&mut self, listener: &Listener, client: &Address, sticky: Sticky) {
        if let Some(key) = sticky_key(listener, client) {
            // Without room for it, its client's next flow may go elsewhere.
            let _ = maps::SLB_STICKY.insert(key, sticky, 0);
        }
    }

    #[inline(always)]
    fn connection_id(&self, packet: &Packet) -> Option<ConnectionId> {
        quic::connection_id(&self.frame, packet)
    }

    #[inline(always)]
    fn server(&self, key: QuicKey) -> Result<Option<u32>, Verdict> {
        // SAFETY: copied out at once.
        Ok(unsafe { maps::SLB_QUIC.get(key) }.copied())
    }

    #[inline(always)]
    fn entry(&mut self, packet: &Packet, listener: &Listener, hash: u64) -> Result<Entry, Verdict> {
        let Some(flow) = conntrack::lookup(&packet.key, hash) else { return Ok(Entry::None) };
        let Some(backend) = maps::backend(flow.backend) else { return Ok(Entry::None) };
        match decide::judge(self.now, packet, listener, flow, backend) {
            Judgement::Stale => {
                conntrack::delete(flow);
                Ok(Entry::None)
            }
            Judgement::Closed => Err(Verdict::Closed),
            Judgement::Valid => {
                conntrack::update_original(&self.view(), flow, backend);
                Ok(Entry::of(flow))
            }
        }
    }

    #[inline(always)]
    fn remember(
        &mut self,
        key: &FlowKey,
        backend: u32,
        entries: Entries,
    ) -> Result<Option<u16>, Verdict> {
        match conntrack::create(self.now, key, backend, entries) {
            Ok(port) => Ok(Some(port)),
            Err(Verdict::TableFull) => Ok(None),
            Err(verdict) => Err(verdict),
        }
    }

    #[inline(always)]
    fn is_known(&self, key: &FlowKey) -> Result<bool, Verdict> {
        Ok(conntrack::index_of(key) != NO_PLACE)
    }

    #[inline(always)]
    fn known(&self, key: &FlowKey) -> Result<Option<Known>, Verdict> {
        let place = conntrack::index_of(key);
        Ok(conntrack::get(place).map(|flow| Known {
            place,
            backend: flow.backend,
            port: flow.port,
            source: flow.source,
        }))
    }

    #[inline(always)]
    fn owner(&mut self, sent: &FlowKey) -> Result<Option<Owner<&'static Flow>>, Verdict> {
        let Keys { reply: key, .. } = maps::keys().ok_or(Verdict::Inconsistent)?;
        *key = sent.reversed();
        match conntrack::slow_lookup(key) {
            None => Ok(None),
            Some(reply) if reply.kind == FLOW_BYPASS => Err(Verdict::NotOurs),
            Some(reply) => {
                let flow = conntrack::reverse(reply, key).ok_or(Verdict::NotOurs)?;
                Ok(Some(Owner { place: reply.peer, flow }))
            }
        }
    }

    #[inline(always)]
    fn first_fragment(&mut self, packet: &Packet) -> Result<Option<&'static Fragment>, Verdict> {
        let Keys { fragments: key, .. } = maps::keys().ok_or(Verdict::Inconsistent)?;
        *key = decide::fragment_key(packet);
        // SAFETY: read once; an entry that becomes another's meanwhile was the oldest of all.
        Ok(unsafe { maps::SLB_FRAGMENTS.get(&*key) })
    }

    #[inline(always)]
    fn is_listed(&mut self, acl: u32, addr: &Address) -> Result<bool, Verdict> {
        Ok(policy::is_listed(acl, addr))
    }

    #[inline(always)]
    fn police(&mut self, listener: u32, limit: Limit) -> Result<(), Verdict> {
        match limit {
            Limit::Flows => policy::police_flow(listener),
            Limit::Bytes => policy::police_bytes(listener, self.bytes),
        }
    }

    /// By `slb_policy`.
    #[inline(always)]
    fn admits(&mut self, _: &Packet, _: &Listener) -> Result<bool, Verdict> {
        Ok(false)
    }

    #[inline(always)]
    fn hash(&self, key: &FlowKey) -> u64 {
        conntrack::hash(key)
    }
}

/// The slot of a number of the schedule that begins at `first_chunk`.
#[inline(always)]
pub fn slot(first_chunk: u32, number: u32) -> Result<u32, Verdict> {
    let chunk = maps::SLB_SLOTS
        .get(first_chunk.wrapping_add(number / CHUNK_SLOTS as u32))
        .ok_or(Verdict::Inconsistent)?;
    Ok(chunk.slots[number as usize % CHUNK_SLOTS])
}

/// The key of a client's record, in this CPU's place for keys.
#[inline(always)]
fn sticky_key(listener: &Listener, client: &Address) -> Option<&'static StickyKey> {
    let Keys { sticky: key, .. } = maps::keys()?;
    *key = StickyKey { client: client.copied(), listener: listener.id, spare: 0 };
    Some(key)
}
