//! What [`slb_common::decide`] looks up, in the maps of the packet path.

use slb_common::{
    abi::{
        Address, Backend, CHUNK_SLOTS, Endpoint, FlowKey, FlowKind, Fragment, Listener, NO_PLACE,
        QuicKey, RevNat, Roles, Seed, Sticky, StickyKey,
    },
    decide::{self, Entries, Entry, Judgement, Known, Limit, Lookups, Owner, Remembered},
    parse::Packet,
    quic::{self, ConnectionId},
    rewrite,
    verdict::Verdict,
};

use crate::{
    bypass,
    cell::{Elements as _, SharedCell},
    conntrack,
    ctx::PacketCtx,
    kernel, maps, policy,
};

impl Lookups for PacketCtx<'_> {
    type Error = Verdict;
    type Ref<T: 'static> = &'static T;
    type Kept = SharedCell<Sticky>;

    #[inline(always)]
    fn now(&self) -> u32 {
        self.now
    }

    #[inline(always)]
    fn ingress(&self) -> u32 {
        kernel::ingress(self.ctx)
    }

    #[inline(always)]
    fn ingress_set(&self) -> Result<u64, Verdict> {
        Ok(maps::interface_set(kernel::ingress(self.ctx)))
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
    fn no_listener(&self) -> Result<u32, Verdict> {
        Ok(maps::settings().no_listener())
    }

    #[inline(always)]
    fn roles(&self, addr: &Address) -> Result<Roles, Verdict> {
        Ok(maps::roles(addr))
    }

    #[inline(always)]
    fn subnet(&self, addr: &Address) -> Result<Option<u64>, Verdict> {
        Ok(maps::subnet(addr))
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
        Ok(maps::SLB_BYPASS.cell(backend).map_or(0, SharedCell::load))
    }

    #[inline(always)]
    fn turn(&mut self, listener: u32) -> Result<u64, Verdict> {
        let cursor = maps::SLB_RR_CURSORS.cell(listener).ok_or(Verdict::Inconsistent)?;
        Ok(cursor.fetch_add(1))
    }

    #[inline(always)]
    fn active(&self, backend: u32) -> Result<u64, Verdict> {
        Ok(maps::SLB_ACTIVE.cell(backend).map_or(0, SharedCell::load))
    }

    #[inline(always)]
    fn kept(
        &mut self,
        listener: &Listener,
        client: &Address,
    ) -> Result<Option<(Sticky, SharedCell<Sticky>)>, Verdict> {
        let key = sticky_key(listener, client).ok_or(Verdict::Inconsistent)?;
        Ok(maps::SLB_STICKY.cell(key).map(|kept| {
            let (backend, expires) = (kept.backend().load(), kept.expires().load());
            (Sticky { backend, expires }, kept)
        }))
    }

    /// Two CPUs that write to it write much the same.
    #[inline(always)]
    fn keep(&mut self, kept: SharedCell<Sticky>, expires: u32) {
        kept.expires().store(expires);
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
        Ok(maps::quic_backend(key.listener, key.server))
    }

    #[inline(always)]
    fn entry(&mut self, packet: &Packet, listener: &Listener) -> Result<Entry, Verdict> {
        let Some((flow, tag)) = conntrack::lookup(&packet.key) else { return Ok(Entry::None) };
        // In this order the verifier looks at fewest instructions.
        let id = flow.backend().load();
        let Some(backend) = maps::backend(id) else { return Ok(Entry::None) };
        let (source, port) = (flow.source().load(), flow.port().load());
        if !conntrack::is_still(flow, tag) {
            return Ok(Entry::None);
        }
        let remembered = Remembered {
            backend: id,
            port,
            source,
            is_original: flow.is(FlowKind::Original),
            state: flow.state().load(),
            expires: flow.expires().load(),
        };
        match decide::judge(self.now, packet, listener, &remembered, backend) {
            Judgement::Stale => {
                conntrack::delete(flow);
                Ok(Entry::None)
            }
            Judgement::Closed => Err(Verdict::Closed),
            Judgement::Valid => {
                conntrack::update_original(&self.view(), flow, backend);
                Ok(Entry::of(&remembered))
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
        if !decide::begins(self.packet) {
            conntrack::adopt(self.now);
        }
        match conntrack::create(self.now, key, backend, entries) {
            Ok(port) => Ok(Some(port)),
            Err(Verdict::TableFull) => Ok(None),
            Err(verdict) => Err(verdict),
        }
    }

    #[inline(always)]
    fn is_taken(&mut self, key: &FlowKey, id: u32, backend: &Backend) -> Result<bool, Verdict> {
        let reply = maps::reply_key().ok_or(Verdict::Inconsistent)?;
        conntrack::write_reply_key(reply, key, backend, key.sport);
        let is_taken = conntrack::is_taken(reply, key);
        if is_taken {
            // The flow gets another port, and is to be found by its entry from now on.
            bypass::keep_looking(self.now, id);
        }
        Ok(is_taken)
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
            backend: flow.backend().load(),
            port: flow.port().load(),
            source: flow.source().load(),
        }))
    }

    #[inline(always)]
    fn owner(&mut self, sent: &FlowKey) -> Result<Option<Owner>, Verdict> {
        let key = maps::reply_key().ok_or(Verdict::Inconsistent)?;
        *key = sent.reversed();
        match conntrack::slow_lookup(key) {
            None => Ok(None),
            Some(reply) if conntrack::is_direct(self.now, reply) => Err(Verdict::NotOurs),
            // Not answered: what is known of the backend counts.
            Some(reply) if reply.is(FlowKind::Bypass) => Ok(None),
            Some(reply) => {
                let flow = conntrack::reverse(reply, key).ok_or(Verdict::NotOurs)?;
                Ok(Some(Owner {
                    place: reply.peer().load(),
                    key: conntrack::key_of(flow),
                    backend: flow.backend().load(),
                    source: flow.source().load(),
                }))
            }
        }
    }

    #[inline(always)]
    fn first_fragment(&mut self, packet: &Packet) -> Result<Option<Fragment>, Verdict> {
        let (key, _) = maps::fragment().ok_or(Verdict::Inconsistent)?;
        *key = decide::fragment_key(packet);
        // An element that becomes another packet's meanwhile was the oldest of all.
        Ok(maps::SLB_FRAGMENTS.cell(key).map(|first| Fragment {
            src: first.src().load(),
            dst: first.dst().load(),
            hop: first.hop().load(),
            hash: first.hash().load(),
            backend: first.backend().load(),
            mode: first.mode().load(),
            kind: first.kind().load(),
            mtu: first.mtu().load(),
            expires: first.expires().load(),
            id: first.id().load(),
            from: first.from().load(),
            interfaces: first.interfaces().load(),
        }))
    }

    #[inline(always)]
    fn is_listed(&mut self, acl: u32, addr: &Address) -> Result<bool, Verdict> {
        Ok(policy::is_listed(acl, addr))
    }

    #[inline(always)]
    fn police(&mut self, listener: u32, source: &Address, limit: Limit) -> Result<(), Verdict> {
        match limit {
            Limit::Source => policy::police_source(listener, source),
            Limit::Flows => policy::police_flow(listener),
            Limit::Bytes => policy::police_bytes(listener, self.bytes),
            Limit::Replies => policy::police_replies(listener, self.bytes),
        }
    }

    /// By `slb_policy`.
    #[inline(always)]
    fn admits(&mut self, _: &Packet, _: &Listener) -> Result<bool, Verdict> {
        Ok(false)
    }

    #[inline(always)]
    fn hash(&self, key: &FlowKey, seed: &Seed) -> u64 {
        conntrack::flow_hash(key, seed)
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
    let key = maps::sticky_key()?;
    *key = StickyKey { client: client.copied(), listener: listener.id, spare: 0 };
    Some(key)
}
