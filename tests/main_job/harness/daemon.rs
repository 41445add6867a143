//! The daemon as a child process.

use std::collections::BTreeMap;
use std::io::{self, BufRead as _, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::client::{Answer, Client};
use super::programs::auditgate;
use super::site::{PATH, Site};
use super::{body, gzip, wait_until};

/// A running daemon. It is killed when this is dropped; the end of its log is printed if the test
/// fails.
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

/// Body of a 200.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Receipt {
    pub(crate) accepted: u64,
    pub(crate) duplicates: u64,
    pub(crate) quarantined: u64,
}

impl Receipt {
    /// Parses the body of a 200.
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

/// Returns the command line of a site's daemon.
pub(crate) fn serve(site: &Site) -> Command {
    let mut command = auditgate();
    command.arg("serve").arg("--config").arg(site.path("config.toml"));
    command
}

/// Runs a daemon that must fail to start with that exit code, and returns what it wrote to stderr.
pub(crate) fn refused(site: &Site, code: i32) -> String {
    let output = serve(site).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    stderr
}

impl<'s> Daemon<'s> {
    /// Starts the daemon of a site and waits until it listens.
    pub(crate) fn start(site: &'s Site) -> Self {
        Self::start_by(site, serve(site))
    }

    /// Starts the daemon by a command whose process becomes the daemon, and waits until it listens.
    pub(crate) fn start_by(site: &'s Site, command: Command) -> Self {
        let mut daemon = Self::spawn(site, command);
        if let Err(status) = daemon.listens() {
            panic!("the daemon ended with {status}");
        }
        daemon
    }

    /// Starts the daemon by a command whose process becomes the daemon, without waiting.
    pub(crate) fn spawn(site: &'s Site, command: Command) -> Self {
        Self::spawn_with(site, command, Stdio::null())
    }

    /// Starts the daemon with an inherited socket of that name (sd_listen_fds(3)), or two names
    /// with a colon between them, without waiting. Without `unsafe` a child inherits a descriptor
    /// only as its standard input; a shell moves it to descriptors 3 and 4.
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

    /// Waits until the daemon listens; an error if it exits first.
    pub(crate) fn listens(&mut self) -> Result<(), ExitStatus> {
        let scheme = if self.site.is_plain() { "http" } else { "https" };
        self.admin = self.announced("admin endpoint on http://")?;
        self.address = self.announced(&format!("listening on {scheme}://"))?;
        Ok(())
    }

    /// Waits for an address in the log, behind these words.
    fn announced(&mut self, words: &str) -> Result<SocketAddr, ExitStatus> {
        wait_until("the daemon listens", || {
            if let Some(status) = self.exit_status() {
                return Ok(Err(status));
            }
            let log = self.log();
            let rest = log.iter().find_map(|line| Some(line.split_once(words)?.1)).ok_or("not yet")?;
            rest.split_whitespace().next().unwrap_or_default().parse().map(Ok).map_err(|_| rest.to_owned())
        })
    }

    /// Returns the exit status if the daemon has exited.
    pub(crate) fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits until the log has these words.
    pub(crate) fn wait_for_log(&self, words: &str) {
        self.wait_for_log_behind(0, words);
    }

    /// Waits until the log has a line with these words behind its first `skipped` lines, and
    /// returns the line.
    pub(crate) fn wait_for_log_behind(&self, skipped: usize, words: &str) -> String {
        wait_until(&format!("the log has `{words}`"), || {
            let log = self.log();
            let found = log.iter().skip(skipped).find(|line| line.contains(words)).cloned();
            found.ok_or_else(|| log.join("\n"))
        })
    }

    /// Returns the lines of the log so far.
    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// Opens a connection.
    pub(crate) fn connect(&self) -> Client {
        self.try_connect().expect("a connection")
    }

    /// Opens a connection, if the daemon is still running.
    pub(crate) fn try_connect(&self) -> io::Result<Client> {
        Client::connect(self.address, self.client_config())
    }

    /// Opens a connection from another loopback address.
    pub(crate) fn connect_from(&self, address: [u8; 4]) -> Client {
        Client::over(self.socket_from(address), self.client_config()).expect("a connection")
    }

    /// Opens a socket from another loopback address, without a TLS handshake.
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
    pub(crate) fn wait_for_count(&self, series: &str, least: u64) {
        wait_until(series, || {
            let value = self.metrics().remove(series).unwrap_or_else(|| panic!("no series {series}"));
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

    /// Posts lines compressed, as Konnect is documented to.
    pub(crate) fn deliver<L: AsRef<[u8]>>(&self, lines: &[L]) -> Receipt {
        Receipt::of(&self.post(Some("application/gzip"), &gzip(&body(lines))))
    }

    /// Posts lines uncompressed, so that a batch takes as much of the backlog as it has bytes.
    pub(crate) fn deliver_plain<L: AsRef<[u8]>>(&self, lines: &[L]) -> Receipt {
        Receipt::of(&self.post(None, &body(lines)))
    }

    /// Waits until `/readyz` answers with 200.
    pub(crate) fn wait_until_ready(&self) {
        wait_until("the daemon is ready", || match self.ask("/readyz").status {
            200 => Ok(()),
            status => Err(status.to_string()),
        });
    }

    /// Waits until `/readyz` answers with 503 and gives this reason, and returns the body.
    pub(crate) fn wait_until_unready(&self, reason: &str) -> String {
        wait_until(&format!("`{reason}` makes the daemon unready"), || {
            let answer = self.ask("/readyz");
            let body = String::from_utf8(answer.body).unwrap();
            if answer.status == 503 && body.contains(reason) { Ok(body) } else { Err(body) }
        })
    }

    /// Waits until every sink has delivered everything that was committed.
    pub(crate) fn settle(&self) {
        wait_until("every sink has everything", || {
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

    /// Returns the value of a series.
    pub(crate) fn metric(&self, series: &str) -> u64 {
        let metrics = self.metrics();
        let value = metrics.get(series).unwrap_or_else(|| panic!("no series {series}"));
        value.parse().unwrap()
    }

    /// Returns the value of a sink's series.
    pub(crate) fn sink_metric(&self, family: &str, sink: &str) -> u64 {
        self.metric(&format!("auditgate_sink_{family}{{sink=\"{sink}\"}}"))
    }

    /// Returns the value of every series by its name and labels.
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

    /// Sends a GET to the admin endpoint.
    pub(crate) fn ask(&self, path: &str) -> Answer {
        self.try_ask(path).expect("an answer of the admin endpoint")
    }

    /// Sends a GET to the admin endpoint, if the daemon is still running.
    pub(crate) fn try_ask(&self, path: &str) -> io::Result<Answer> {
        Client::connect(self.admin, None)?.try_get(path)
    }

    /// Returns a number of `/proc/PID/status`, in KiB.
    pub(crate) fn memory(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process())).unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Sends a signal, without waiting for its effect.
    pub(crate) fn signal(&self, name: &str) {
        assert!(self.try_signal(name));
    }

    fn try_signal(&self, name: &str) -> bool {
        // The shell's built-in `kill`: one process, by its id.
        let script = format!("kill -{name} {}", self.process());
        Command::new("sh").arg("-c").arg(script).status().is_ok_and(|status| status.success())
    }

    /// Returns a guard that kills the daemon when it is dropped, so that threads which talk to it
    /// until it exits end even if the test fails.
    pub(crate) fn kill_on_drop(&self) -> KillOnDrop<'_> {
        KillOnDrop(self)
    }

    /// Sends SIGTERM and waits for the exit, whose code must be 0.
    pub(crate) fn terminate(self) {
        self.signal("TERM");
        let status = self.ended();
        assert_eq!(status.code(), Some(0), "the daemon ended with {status}");
    }

    /// Waits for the exit.
    pub(crate) fn wait_for_exit(&mut self) -> ExitStatus {
        wait_until("the daemon exits", || self.exit_status().ok_or("it is running".to_owned()))
    }

    /// Waits for the exit.
    pub(crate) fn ended(mut self) -> ExitStatus {
        self.wait_for_exit()
    }

    /// Waits for the exit, whose code must be 0, and returns the whole log.
    pub(crate) fn log_at_end(mut self) -> Vec<String> {
        let status = self.wait_for_exit();
        assert_eq!(status.code(), Some(0), "the daemon ended with {status}");
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        self.log()
    }

    /// Sends SIGKILL and waits for the exit.
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
            eprintln!("end of the daemon's log:\n{}", tail.join("\n"));
        }
    }
}
