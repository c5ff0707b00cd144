//! The programs that the first one, `slb`, passes packets on to: one list.
//!
//! One row is the variant, its slot in `SLB_PROGRAMS`, and the symbol in the object. The agent fills the map from
//! it, and `slb-ebpf` makes its entry points and its tail calls from it, by `for_each_program!`.

macro_rules! programs {
    ($($(#[doc = $doc:literal])+ $name:ident = $slot:literal, $symbol:ident;)+) => {
        /// A program that is reached by a tail call. Each has the stack and the verifier's budget to itself.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Program {
            $($(#[doc = $doc])+ $name = $slot,)+
        }

        impl Program {
            /// All of them, in the order of their slots.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// Name of its entry point in the object.
            #[must_use]
            pub const fn symbol(self) -> &'static str {
                match self { $(Self::$name => stringify!($symbol),)+ }
            }
        }

        /// Hands the list to another macro, which takes rows of the form `Variant = slot, symbol;`.
        #[macro_export]
        macro_rules! for_each_program {
            ($then:ident) => { $then! { $($name = $slot, $symbol;)+ } };
        }
    };
}

programs! {
    /// ICMP of both families: echo requests, and errors about flows.
    Icmp = 0, slb_icmp;
    /// Tagged frames, fragments, and frames in several buffers.
    SlowPath = 1, slb_slow_path;
    /// What [`Program::SlowPath`] has parsed, or [`Program::Policy`] admitted.
    Reentry = 2, slb_reentry;
    /// Fragments other than the first.
    Fragment = 3, slb_fragment;
    /// A flow that has no entry and may need one.
    Flow = 4, slb_flow;
    /// A SYN, or what another program has prepared, to a backend behind a tunnel.
    Tunnel = 5, slb_tunnel;
    /// What the gateway answers itself.
    Respond = 6, slb_respond;
    /// A flow whose source address is replaced as well.
    FullNat = 7, slb_full_nat;
    /// A flow whose backend is told the client's address.
    Proxy = 8, slb_proxy;
    /// An ICMP error about a flow of the other family.
    IcmpNat64 = 9, slb_icmp_nat64;
    /// To or from a listener with an access list or limits.
    Policy = 10, slb_policy;
    /// A flow whose backend is chosen by more than a look at the schedule.
    Scheduler = 11, slb_scheduler;
    /// ICMP errors about what a client has sent.
    IcmpClient = 12, slb_icmp_client;
}

// Slots have neither gaps nor duplicates.
const _: () = {
    let mut slot = 0;
    while slot < Program::ALL.len() {
        assert!(Program::ALL[slot] as usize == slot);
        slot += 1;
    }
};
