//! `announce = "none"`: routers, or another program, bring the VIPs' packets here.

use std::{future, net::IpAddr};

use futures_util::future::{BoxFuture, FutureExt as _};

use super::{Announced, Announcer, VipState};
use crate::net::{Error, Interface};

/// Announces nothing.
#[derive(Debug)]
pub(super) struct NoAnnouncer;

impl Announcer for NoAnnouncer {
    fn announce<'a>(
        &'a mut self,
        _vips: &'a [IpAddr],
        _interfaces: &'a [Interface],
    ) -> BoxFuture<'a, Result<Announced, Error>> {
        future::ready(Ok(Announced::default())).boxed()
    }

    fn withdraw(&mut self) -> BoxFuture<'_, Result<Vec<IpAddr>, Error>> {
        future::ready(Ok(Vec::new())).boxed()
    }

    fn places(&self) -> Vec<(IpAddr, u32)> {
        Vec::new()
    }

    fn state(&self, _vip: IpAddr) -> VipState {
        VipState::Unmanaged
    }
}
