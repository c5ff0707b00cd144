//! The promises of `slb`, kept or broken by the real binary between real clients and servers, each
//! in a network namespace of its own.

#[cfg(test)]
mod announce;
#[cfg(test)]
mod bypass;
#[cfg(test)]
mod client_address;
#[cfg(test)]
mod command;
#[cfg(test)]
mod configs;
#[cfg(test)]
mod conflicts;
#[cfg(test)]
mod death;
#[cfg(test)]
mod direct_return;
#[cfg(test)]
mod distribution;
#[cfg(test)]
mod drift;
#[cfg(test)]
mod failover;
#[cfg(test)]
mod filling;
#[cfg(test)]
mod firewall;
#[cfg(test)]
mod full_nat;
#[cfg(test)]
mod health;
#[cfg(test)]
mod history;
#[cfg(test)]
mod hops;
#[cfg(test)]
mod ingress;
#[cfg(test)]
mod jumbo;
mod maps;
#[cfg(test)]
mod metrics;
#[cfg(test)]
mod model;
#[cfg(test)]
mod moved_vip;
#[cfg(test)]
mod operator;
#[cfg(test)]
mod output;
#[cfg(test)]
mod reload;
#[cfg(test)]
mod restart;
#[cfg(test)]
mod rights;
#[cfg(test)]
mod soak;
#[cfg(test)]
mod support;
#[cfg(test)]
mod traffic;
#[cfg(test)]
mod two_gateways;
#[cfg(test)]
mod untouched;
#[cfg(test)]
mod upgrade;
#[cfg(test)]
mod watchdog;
