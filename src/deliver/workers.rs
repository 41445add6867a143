//! The threads of the sinks, and their end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::sink::Sink;
use super::worker::{Watcher, Worker};
use crate::ledger::{Ledger, Running, Subscription};

/// Time for a sink to stop, after the time to catch up.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);

/// Threads of the sinks, with the sinks' names.
#[derive(Default)]
pub struct Workers {
    threads: Vec<(String, JoinHandle<()>)>,
    stop: Arc<AtomicBool>,
}

impl Workers {
    /// Starts the thread of a sink.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(
        &mut self,
        subscription: Subscription,
        sink: Box<dyn Sink>,
        ledger: &Ledger,
        watcher: Box<dyn Watcher>,
    ) -> std::io::Result<()> {
        let name = subscription.sink.clone();
        let worker =
            Worker { subscription, sink, ledger: ledger.clone(), watcher, stop: Arc::clone(&self.stop) };
        let thread = std::thread::Builder::new().name(format!("sink {name}")).spawn(move || worker.run())?;
        self.threads.push((name, thread));
        Ok(())
    }

    /// Gives the sinks a limited time to catch up, or none that is limited, and closes the ledger,
    /// also when a sink hangs: what is not recorded as delivered waits for the next start. Returns
    /// when the ledger is closed.
    pub fn finish(self, ledger: &Ledger, running: Running, time: Option<Duration>) {
        ledger.close_feed();
        let Self { mut threads, stop } = self;
        let mut wait = |time: Option<Duration>| {
            let deadline = time.map(|time| Instant::now() + time);
            loop {
                threads.retain(|(_, thread)| !thread.is_finished());
                if threads.is_empty() || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                    return threads.iter().map(|(sink, _)| sink.clone()).collect::<Vec<_>>();
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        wait(time);
        stop.store(true, Ordering::Relaxed);
        for sink in wait(Some(STOP_TIMEOUT)) {
            tracing::error!(
                code = "sink-abandoned",
                sink,
                "sink \"{sink}\" did not stop within {seconds} s and is abandoned; its events wait in the ledger \
                 for the next start",
                seconds = STOP_TIMEOUT.as_secs()
            );
        }
        ledger.close();
        let _ = running.thread.join();
    }
}
