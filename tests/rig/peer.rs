//! The outside system, in the test's own process.

use falaj::mock_external::{Faults, Mock, serve};
use tokio_util::sync::CancellationToken;

use super::Pipeline;

/// Serves until it is dropped.
pub struct Peer {
    pub mock: Mock,
    stop: CancellationToken,
}

impl Peer {
    /// Starts it and points the pipeline at it.
    pub async fn start(pipeline: &mut Pipeline, faults: Faults) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        pipeline.set("FALAJ_EXTERNAL__URL", &format!("http://{}/events", listener.local_addr().unwrap()));
        let peer = Self { mock: Mock::new(faults), stop: CancellationToken::new() };
        tokio::spawn(serve(listener, peer.mock.clone(), peer.stop.clone()));
        peer
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
