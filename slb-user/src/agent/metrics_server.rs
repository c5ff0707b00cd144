//! Serves metrics where the configuration says.

use std::{net::SocketAddr, sync::Arc};

use tokio::task::AbortHandle;

use crate::{
    api::{self, HttpError},
    descriptors::MostConnections,
    observe::Observer,
};

/// The server of the metrics, if there is one.
#[derive(Debug, Default)]
pub(super) struct MetricsServer(Option<(SocketAddr, AbortHandle)>);

impl MetricsServer {
    /// Listens on `wanted`, if not already; `None`: nowhere.
    pub(super) fn serve(
        &mut self,
        wanted: Option<SocketAddr>,
        observer: &Arc<dyn Observer>,
        most: &MostConnections,
    ) -> Result<(), HttpError> {
        if self.0.as_ref().map(|(addr, _)| *addr) == wanted {
            return Ok(());
        }
        if let Some((_, task)) = self.0.take() {
            task.abort();
        }
        if let Some(addr) = wanted {
            let task = api::serve_metrics(addr, Arc::clone(observer), most.clone())?;
            self.0 = Some((addr, task));
        }
        Ok(())
    }
}
