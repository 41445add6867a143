//! A tokio runtime on a thread of its own, for senders that are used without one.

use std::io;
use std::thread::JoinHandle;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// A runtime that runs until this is dropped, which waits for the end of its thread.
pub(crate) struct OwnRuntime {
    handle: Handle,
    /// Taken when it ends.
    running: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl OwnRuntime {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(crate) fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name("auditgate-sender".to_owned()).spawn(move || {
            // Its tasks run while it waits.
            let _ = runtime.block_on(stopped);
        })?;
        Ok(Self { handle, running: Some((stop, thread)) })
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for OwnRuntime {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            let _ = stop.send(());
            let _ = thread.join();
        }
    }
}
