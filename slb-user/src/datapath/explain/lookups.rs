//! What [`slb_common::decide`] looks up, in the maps from outside: nothing is changed.

use std::{io, mem::offset_of, sync::atomic::Ordering};

use aya::maps::{MapError, lpm_trie::Key};
use slb_common::{
    abi::{
        self, ANY_INTERFACE, Address, Backend, CHUNK_SLOTS, Endpoint, Filter, Flow, FlowKey,
        FlowKind, Fragment, Listener, NO_PLACE, NO_SOURCE, QuicKey, RevNat, Roles, Settings,
        SourcePolicer, Sticky, StickyKey,
    },
    decide::{self, Entries, Entry, Judgement, Known, Limit, Lookups, Owner, Peer, Remembered},
    hash,
    packet::Packet,
    quic::ConnectionId,
    verdict::Verdict,
};

use super::{End, Path, name, text};

impl Lookups for Path<'_> {
    type Error = End;
    type Ref<T: 'static> = Box<T>;
    type Kept = ();

    fn now(&self) -> u32 {
        self.now
    }

    fn ingress(&self) -> u32 {
        if self.question.ingress != 0 {
            return self.question.ingress;
        }
        // Towards the backend that sends it, if one does; otherwise no backend is behind it.
        let src = self.question.src.ip().into();
        self.hop_of(src).unwrap_or(u32::MAX)
    }

    fn ingress_set(&self) -> Result<u64, End> {
        if self.question.ingress == 0 {
            return Ok(ANY_INTERFACE);
        }
        let interface = absent(self.maps.interfaces.get(&self.question.ingress, 0))?;
        Ok(interface.map_or(ANY_INTERFACE, |interface| interface.set()))
    }

    fn is_last_hop(&self) -> bool {
        self.question.ttl <= 1
    }

    fn chosen(&self) -> u32 {
        self.chosen
    }

    fn no_listener(&self) -> Result<u32, End> {
        Ok(self.settings()?.no_listener)
    }

    fn roles(&self, addr: &Address) -> Result<Roles, End> {
        Ok(absent(self.maps.addresses.get(addr, 0))?.unwrap_or_default())
    }

    fn subnet(&self, addr: &Address) -> Result<Option<u64>, End> {
        let key = Key::new(u128::BITS, abi::subnet(*addr));
        Ok(absent(self.maps.subnets.get(&key, 0))?)
    }

    fn listener(&self, to: &Endpoint) -> Result<Option<Box<Listener>>, End> {
        Ok(absent(self.maps.listeners.get(to, 0))?.map(Box::new))
    }

    fn revnat(&self, from: &Endpoint) -> Result<Option<Box<RevNat>>, End> {
        Ok(self.endpoint(from)?.map(Box::new))
    }

    fn slot(&self, first_chunk: u32, number: u32) -> Result<u32, End> {
        let index = first_chunk.wrapping_add(number / CHUNK_SLOTS as u32);
        let chunk = absent(self.maps.slots.get(&index, 0))?.ok_or(Verdict::Inconsistent)?;
        Ok(chunk.slots[number as usize % CHUNK_SLOTS])
    }

    fn backend(&self, id: u32) -> Result<Option<Box<Backend>>, End> {
        Ok(absent(self.maps.backends.get(&id, 0))?.map(Box::new))
    }

    fn bypass_until(&self) -> u32 {
        const WORD: usize = offset_of!(Filter, bypass_until) / size_of::<u32>();
        self.maps.filter.words(0).map_or(0, |words| words[WORD].load(Ordering::Relaxed))
    }

    fn bypass(&self, backend: u32) -> Result<u32, End> {
        Ok(absent(self.maps.direct.get(&backend, 0))?.unwrap_or_default())
    }

    fn turn(&mut self, listener: u32) -> Result<u64, End> {
        Ok(absent(self.maps.cursors.get(&listener, 0))?.ok_or(Verdict::Inconsistent)?)
    }

    fn active(&self, backend: u32) -> Result<u64, End> {
        let forgotten = u64::from(self.forgotten == Some(backend));
        Ok(self.maps.table.active(backend).saturating_sub(forgotten))
    }

    fn kept(&mut self, listener: &Listener, client: &Address) -> Result<Option<(Sticky, ())>, End> {
        let key = StickyKey { client: *client, listener: listener.id, spare: 0 };
        Ok(absent(self.maps.sticky.get(&key, 0))?.map(|sticky| (sticky, ())))
    }

    fn keep(&mut self, (): (), _: u32) {}

    fn stick(&mut self, _: &Listener, _: &Address, _: Sticky) {}

    fn connection_id(&self, _: &Packet) -> Option<ConnectionId> {
        None
    }

    fn server(&self, _: QuicKey) -> Result<Option<u32>, End> {
        Ok(None)
    }

    fn entry(&mut self, packet: &Packet, listener: &Listener) -> Result<Entry, End> {
        let Some(flow) = self.flow(&packet.key)? else {
            self.say("flow table", "no entry");
            return Ok(Entry::None);
        };
        let Some(backend) = self.backend(flow.backend)? else { return Ok(Entry::None) };
        let remembered = Remembered::from(&flow);
        let judgement = decide::judge(self.now, packet, listener, &remembered, &backend);
        if judgement == Judgement::Stale {
            let text = format!("an entry for {} that does not count any more", name(flow.backend));
            self.say("flow table", text);
            self.forgotten = flow.state().is_active().then_some(flow.backend);
            return Ok(Entry::None);
        }
        self.say("flow table", text::entry(&flow));
        if judgement == Judgement::Closed {
            return Err(Verdict::Closed.into());
        }
        self.found = Some(flow);
        Ok(Entry::of(&remembered))
    }

    fn remember(&mut self, key: &FlowKey, _: u32, entries: Entries) -> Result<Option<u16>, End> {
        if self.maps.table.is_full(key, &self.settings()?, self.now) {
            self.say("flow table", "no room in its bucket");
            return Ok(None);
        }
        self.say("flow table", "gets an entry");
        if entries == Entries::Both {
            let text =
                "the backend may know the client's port from another flow: then another port";
            self.say("source", text);
            self.is_drawn = true;
        }
        Ok(Some(key.sport))
    }

    fn is_taken(&mut self, key: &FlowKey, _: u32, backend: &Backend) -> Result<bool, End> {
        let reply = FlowKey {
            src: backend.addr,
            dst: key.src,
            sport: backend.port as u16,
            dport: key.sport,
            proto: key.proto,
        };
        let Some(owner) = self.flow(&reply)? else { return Ok(false) };
        if owner.is(FlowKind::Bypass) {
            return Ok(decide::is_direct(self.now, owner.state(), owner.expires));
        }
        let is_alive = !owner.state().has_ended() && !abi::is_over(self.now, owner.expires);
        Ok(is_alive && self.client_of(&owner, &reply)?.is_some_and(|client| client.key() != *key))
    }

    fn is_known(&self, key: &FlowKey) -> Result<bool, End> {
        Ok(self.flow(key)?.is_some())
    }

    fn known(&self, key: &FlowKey) -> Result<Option<Known>, End> {
        let flow = self.flow(key)?;
        Ok(flow.map(|Flow { backend, port, source, .. }| Known {
            place: NO_PLACE,
            backend,
            port,
            source,
        }))
    }

    fn owner(&mut self, sent: &FlowKey) -> Result<Option<Owner>, End> {
        let key = sent.reversed();
        let Some(reply) = self.flow(&key)? else { return Ok(None) };
        if reply.is(FlowKind::Bypass) {
            let is_direct = decide::is_direct(self.now, reply.state(), reply.expires);
            return if is_direct { Err(Verdict::NotOurs.into()) } else { Ok(None) };
        }
        let flow = self.client_of(&reply, &key)?.ok_or(Verdict::NotOurs)?;
        let Flow { backend, source, .. } = flow;
        Ok(Some(Owner { place: reply.peer, key: flow.key(), backend, source }))
    }

    fn first_fragment(&mut self, packet: &Packet) -> Result<Option<Fragment>, End> {
        let key = decide::fragment_key(packet);
        Ok(absent(self.maps.fragments.get(&key, 0))?)
    }

    fn is_listed(&mut self, acl: u32, addr: &Address) -> Result<bool, End> {
        let key = Key::new(abi::listed_bits(u128::BITS), abi::listed(acl, *addr));
        Ok(absent(self.maps.acls.get(&key, 0))?.is_some())
    }

    fn police(&mut self, listener: u32, source: &Address, limit: Limit) -> Result<(), End> {
        let limits = self.maps.limits.get(&listener, 0)?;
        let meters = self.maps.meters.get(&listener, 0)?;
        let now = monotonic().map_err(MapError::from)?;
        let hash = hash::source(*source, listener, &self.settings()?.table_seed);
        let (per_second, what, paid, cost, burst, exceeded) = match limit {
            Limit::Source => (
                1_000_000_000_u64.checked_div(limits.source_ns),
                "new flows a second of one source",
                self.maps.source_meters.get(&SourcePolicer::place(hash), 0)?.paid(hash),
                limits.source_ns,
                limits.source_burst,
                Verdict::SourceLimit,
            ),
            Limit::Flows => (
                1_000_000_000_u64.checked_div(limits.flow_ns),
                "new flows a second",
                meters.flows,
                limits.flow_ns,
                limits.flow_burst,
                Verdict::FlowLimit,
            ),
            // What a packet costs by its length makes no difference: a single one always fits.
            Limit::Bytes | Limit::Replies => (
                (8_000_000_000_u64 << 16).checked_div(limits.byte_ns),
                "bits a second",
                if limit == Limit::Bytes { meters.forward } else { meters.reply },
                0,
                limits.byte_burst,
                Verdict::BandwidthLimit,
            ),
        };
        let Some(per_second) = per_second else { return Ok(()) };
        let passes = decide::conforms(decide::paid_until(paid, now, cost), now, cost, burst);
        let found = if passes { "not reached" } else { "exceeded" };
        self.say("limit", format!("{per_second} {what}: {found}"));
        if passes { Ok(()) } else { Err(exceeded.into()) }
    }

    fn admits(&mut self, packet: &Packet, listener: &Listener) -> Result<bool, End> {
        decide::admit(self, packet, listener)?;
        Ok(true)
    }

    fn step(&mut self, step: decide::Step<'_>) {
        match step {
            decide::Step::Candidate { backend, active, weight } => {
                self.candidates.push(text::candidate(backend, active, weight));
            }
            decide::Step::Least { slot } => {
                let seen = self.candidates.join(", ");
                self.say("schedule", format!("{seen}: {} is least loaded", text::of_slot(slot)));
            }
            step => {
                let (what, found) = text::step(&step);
                self.say(what, found);
            }
        }
    }
}

impl Path<'_> {
    /// Whom an address and port answer for.
    pub(super) fn endpoint(&self, from: &Endpoint) -> Result<Option<RevNat>, End> {
        Ok(absent(self.maps.endpoints.get(from, 0))?)
    }

    fn settings(&self) -> Result<Settings, End> {
        Ok(self.maps.settings.get(&0, 0)?)
    }

    /// What the program takes a flow's entry and source by.
    pub(super) fn table_hash(&self, key: &FlowKey) -> Result<u64, End> {
        Ok(hash::flow(key, &self.settings()?.table_seed))
    }

    fn flow(&self, key: &FlowKey) -> Result<Option<Flow>, End> {
        Ok(self.maps.table.find(key, &self.settings()?))
    }

    /// The client's entry of an answer's, whose key is `key`.
    fn client_of(&self, reply: &Flow, key: &FlowKey) -> Result<Option<Flow>, End> {
        let Some(flow) = self.maps.table.at(reply.peer) else { return Ok(None) };
        let Some(backend) = self.backend(flow.backend)? else { return Ok(None) };
        let sender = match flow.source {
            NO_SOURCE => flow.src,
            source => self.maps.sources.get(&source.into(), 0)?,
        };
        let is_it = decide::is_owner(&Peer::from(&flow), key, &backend) && sender == key.dst;
        Ok(is_it.then_some(flow))
    }

    /// The interface towards the backend with an address.
    fn hop_of(&self, addr: Address) -> Option<u32> {
        let records = &self.maps.records;
        let mut records = (0..records.len()).filter_map(|id| records.load(id));
        let record = records.find(|record| record.addr == addr && record.hop.is_known());
        record.map(|record| record.hop.ifindex)
    }
}

/// What is not there is an answer, too.
fn absent<T>(result: Result<T, MapError>) -> Result<Option<T>, MapError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound | MapError::OutOfBounds { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The clock of the meters, in nanoseconds.
fn monotonic() -> io::Result<u64> {
    let clock = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    Ok(std::time::Duration::from(clock).as_nanos() as u64)
}
