//! The daemon as a child process.

use std::collections::BTreeMap;
use std::io::{self, BufRead as _, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::client::{Answer, Client, request};
use super::programs::auditgate;
use super::site::{PATH, Site};
use super::{PATIENCE, body, gzip, wait_until};

/// A running daemon. Killed when it is dropped; what it said is printed when the test fails.
pub(crate) struct Daemon<'s> {
    pub(crate) site: &'s Site,
    pub(crate) address: SocketAddr,
    pub(crate) admin: SocketAddr,
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    reader: Option<JoinHandle<()>>,
}

/// Kills a daemon when it is dropped.
pub(crate) struct KillOnDrop<'d>(&'d Daemon<'d>);

impl Drop for KillOnDrop<'_> {
    fn drop(&mut self) {
        self.0.try_signal("KILL");
    }
}

/// What a 200 says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Receipt {
    pub(crate) accepted: u64,
    pub(crate) duplicates: u64,
    pub(crate) quarantined: u64,
}

impl Receipt {
    /// Reads the body of a 200.
    pub(crate) fn of(answer: &Answer) -> Self {
        assert_eq!(answer.status, 200, "{answer:?}");
        let receipt: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        let number = |name: &str| receipt[name].as_u64().unwrap_or_else(|| panic!("{receipt}"));
        Self {
            accepted: number("accepted"),
            duplicates: number("duplicates"),
            quarantined: number("quarantined"),
        }
    }
}

impl<'s> Daemon<'s> {
    /// Starts the daemon of a site and waits until it listens.
    pub(crate) fn start(site: &'s Site) -> Self {
        let mut command = auditgate();
        command.arg("serve").arg("--config").arg(site.path("config.toml"));
        Self::start_by(site, command)
    }

    /// Starts it by a command whose process becomes the daemon.
    pub(crate) fn start_by(site: &'s Site, command: Command) -> Self {
        let mut daemon = Self::spawn(site, command);
        if let Err(status) = daemon.listens() {
            panic!("the daemon ended with {status}");
        }
        daemon
    }

    /// Starts it by a command whose process becomes the daemon, and does not wait for anything.
    pub(crate) fn spawn(site: &'s Site, command: Command) -> Self {
        Self::spawn_with(site, command, Stdio::null())
    }

    /// Starts it with an inherited socket of that name (sd_listen_fds(3)), or of two with a colon between them, and
    /// does not wait for anything. A child can be given a descriptor without `unsafe` only as its standard input; a
    /// shell moves it to where it belongs.
    pub(crate) fn spawn_on(site: &'s Site, socket: impl Into<OwnedFd>, names: &str) -> Self {
        let mut command = Command::new("sh");
        command
            .args(["-c", "exec 3<&0 4<&0 </dev/null; LISTEN_PID=$$ exec \"$@\"", "sh"])
            .arg(auditgate().get_program())
            .arg("serve")
            .arg("--config")
            .arg(site.path("config.toml"))
            .env("NO_COLOR", "1")
            .env("LISTEN_FDS", names.split(':').count().to_string())
            .env("LISTEN_FDNAMES", names);
        Self::spawn_with(site, command, Stdio::from(socket.into()))
    }

    fn spawn_with(site: &'s Site, mut command: Command, input: Stdio) -> Self {
        let mut child = command.stdin(input).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let written = Arc::clone(&log);
        let reader = std::thread::spawn(move || {
            for line in stderr.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                written.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        });
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        Self { site, address: nowhere, admin: nowhere, child, log, reader: Some(reader) }
    }

    /// Waits until it listens; an error when it ends before.
    pub(crate) fn listens(&mut self) -> Result<(), ExitStatus> {
        let scheme = if self.site.is_plain() { "http" } else { "https" };
        self.admin = self.announced("admin endpoint on http://")?;
        self.address = self.announced(&format!("listening on {scheme}://"))?;
        Ok(())
    }

    /// The address behind some words of the log.
    fn announced(&mut self, words: &str) -> Result<SocketAddr, ExitStatus> {
        wait_until(PATIENCE, "the daemon listens", || {
            if let Some(status) = self.exit_status() {
                return Ok(Err(status));
            }
            let log = self.log();
            let rest = log.iter().find_map(|line| Some(line.split_once(words)?.1)).ok_or("not yet")?;
            rest.split_whitespace().next().unwrap_or_default().parse().map(Ok).map_err(|_| rest.to_owned())
        })
    }

    /// How it ended, if it has.
    pub(crate) fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits until it has said something.
    pub(crate) fn says(&self, words: &str) {
        wait_until(PATIENCE, "the daemon says it", || {
            self.log().iter().any(|line| line.contains(words)).then_some(()).ok_or_else(|| words.to_owned())
        });
    }

    /// What it has said so far.
    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// A new connection.
    pub(crate) fn connect(&self) -> Client {
        self.try_connect().expect("a connection")
    }

    /// A new connection, if the daemon is still there.
    pub(crate) fn try_connect(&self) -> io::Result<Client> {
        Client::connect(self.address, self.client_config())
    }

    /// A new connection from another loopback address.
    pub(crate) fn connect_from(&self, address: [u8; 4]) -> Client {
        Client::over(self.socket_from(address), self.client_config()).expect("a connection")
    }

    /// A new socket from another loopback address, on which nothing was said yet.
    pub(crate) fn socket_from(&self, address: [u8; 4]) -> TcpStream {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let socket = runtime.block_on(async {
            let socket = tokio::net::TcpSocket::new_v4()?;
            socket.bind(SocketAddr::from((address, 0)))?;
            socket.connect(self.address).await?.into_std()
        });
        let socket = socket.expect("a connection");
        socket.set_nonblocking(false).unwrap();
        socket
    }

    fn client_config(&self) -> Option<Arc<rustls::ClientConfig>> {
        (!self.site.is_plain()).then(|| Arc::clone(&self.site.client))
    }

    /// Waits until a series has at least this value.
    pub(crate) fn counted(&self, series: &str, least: u64) {
        wait_until(PATIENCE, series, || {
            let value = self.metrics().remove(series).unwrap_or_else(|| panic!("there is no {series}"));
            if value.parse::<u64>().unwrap() >= least { Ok(()) } else { Err(value) }
        });
    }

    /// Posts a body on a connection of its own.
    pub(crate) fn post_to(&self, path: &str, coding: Option<&str>, body: &[u8]) -> Answer {
        self.connect().try_post(path, coding, body).expect("an answer")
    }

    /// Posts a body to the default source.
    pub(crate) fn post(&self, coding: Option<&str>, body: &[u8]) -> Answer {
        self.post_to(PATH, coding, body)
    }

    /// Posts lines as Konnect is documented to.
    pub(crate) fn deliver<L: AsRef<[u8]>>(&self, lines: &[L]) -> Receipt {
        Receipt::of(&self.post(Some("application/gzip"), &gzip(&body(lines))))
    }

    /// Posts lines as they are, so that a batch takes as much of the backlog as it has bytes.
    pub(crate) fn deliver_plain<L: AsRef<[u8]>>(&self, lines: &[L]) -> Receipt {
        Receipt::of(&self.post(None, &body(lines)))
    }

    /// Waits until every sink has everything that was committed.
    pub(crate) fn settle(&self) {
        wait_until(PATIENCE, "every sink has everything", || {
            let metrics = self.metrics();
            let waiting: Vec<_> = metrics
                .iter()
                .filter(|(name, value)| {
                    name.starts_with("auditgate_sink_pending_events") && value.as_str() != "0"
                })
                .collect();
            if waiting.is_empty() { Ok(()) } else { Err(format!("{waiting:?}")) }
        });
    }

    /// Every series by its name and labels.
    pub(crate) fn metrics(&self) -> BTreeMap<String, String> {
        let answer = self.ask("/metrics");
        assert_eq!(answer.status, 200);
        String::from_utf8(answer.body)
            .unwrap()
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.rsplit_once(' '))
            .map(|(series, value)| (series.to_owned(), value.to_owned()))
            .collect()
    }

    /// What the admin endpoint answers.
    pub(crate) fn ask(&self, path: &str) -> Answer {
        self.try_ask(path).expect("an answer of the admin endpoint")
    }

    /// What the admin endpoint answers, if the daemon is still there.
    pub(crate) fn try_ask(&self, path: &str) -> io::Result<Answer> {
        let mut client = Client::connect(self.admin, None)?;
        client.try_send(&request("GET", path, &[], b""))?;
        client.try_answer()
    }

    /// A number of `/proc/PID/status` in KiB.
    pub(crate) fn memory(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process())).unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Sends a signal; the daemon goes on for as long as it likes.
    pub(crate) fn signal(&self, name: &str) {
        assert!(self.try_signal(name));
    }

    fn try_signal(&self, name: &str) -> bool {
        // The shell's own `kill`: one process, ours, by its number.
        let script = format!("kill -{name} {}", self.process());
        Command::new("sh").arg("-c").arg(script).status().is_ok_and(|status| status.success())
    }

    /// SIGKILL when what is returned is dropped: threads that talk to the daemon until it is gone end also where the
    /// test fails.
    pub(crate) fn kill_on_drop(&self) -> KillOnDrop<'_> {
        KillOnDrop(self)
    }

    /// SIGTERM: returns when it has ended, which must be in order.
    pub(crate) fn terminate(self) {
        self.signal("TERM");
        let status = self.ended();
        assert_eq!(status.code(), Some(0), "the daemon ended with {status}");
    }

    /// Waits for its end.
    pub(crate) fn ended(mut self) -> ExitStatus {
        wait_until(PATIENCE, "the daemon ends", || self.exit_status().ok_or("it runs".to_owned()))
    }

    /// Waits for its end, which must be in order; everything it said.
    pub(crate) fn log_at_end(mut self) -> Vec<String> {
        let status = wait_until(PATIENCE, "the daemon ends", || {
            self.child.try_wait().unwrap().ok_or("it runs".to_owned())
        });
        assert_eq!(status.code(), Some(0), "the daemon ended with {status}");
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        self.log()
    }

    /// SIGKILL: returns when it is gone.
    pub(crate) fn kill9(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        if std::thread::panicking() {
            let log = self.log();
            let tail = &log[log.len().saturating_sub(40)..];
            eprintln!("the daemon said:\n{}", tail.join("\n"));
        }
    }
}
