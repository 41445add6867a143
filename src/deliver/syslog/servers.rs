//! Tests of the syslog sink with rsyslog and syslog-ng, each over every transport.
//!
//! Debian has them in the packages rsyslog, rsyslog-gnutls and syslog-ng-core. They run in the
//! foreground with their own files.

use std::net::{TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::machine::{self, RSYSLOG, RSYSLOG_TLS, ReservedPort};
use super::{SyslogOptions, SyslogSink};
use crate::deliver::sink::{Item, Sink as _};
use crate::ledger::Position;
use crate::net::authority::Authority;
use crate::net::{Facility, Framing, Identity, SyslogAddress};
use crate::wire::event::{Reason, Verdict};

/// Maximum time for anything that a test waits for; long enough for a loaded machine.
const TEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Files and ports of one daemon.
struct Setup {
    authority: Authority,
    tcp: ReservedPort,
    newline: ReservedPort,
    tls: ReservedPort,
    udp: u16,
}

impl Setup {
    fn new() -> Self {
        let authority = Authority::new();
        for name in ["localhost", "client.test"] {
            authority.identity(name);
        }
        let [tcp, newline, tls] = [(); 3].map(|()| ReservedPort::new());
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self { authority, tcp, newline, tls, udp }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.authority.path(name)
    }

    fn fill(&self, template: &str) -> String {
        template
            .replace("@DIR@", &self.path("").display().to_string())
            .replace("@TCP@", &self.tcp.number().to_string())
            .replace("@NEWLINE@", &self.newline.number().to_string())
            .replace("@TLS@", &self.tls.number().to_string())
            .replace("@UDP@", &self.udp.to_string())
    }

    fn options(&self, transport: &str) -> SyslogOptions {
        let (address, framing) = match transport {
            "tcp" => (format!("tcp://127.0.0.1:{}", self.tcp.number()), Framing::OctetCounting),
            "newline" => (format!("tcp://127.0.0.1:{}", self.newline.number()), Framing::Newline),
            "tls" => (format!("tls://localhost:{}", self.tls.number()), Framing::OctetCounting),
            "udp" => (format!("udp://127.0.0.1:{}", self.udp), Framing::OctetCounting),
            unix => (format!("unix://{}", self.path(unix).display()), Framing::Newline),
        };
        let is_tls = transport == "tls";
        SyslogOptions {
            address: SyslogAddress::parse(&address).unwrap(),
            ca: is_tls.then(|| self.path("ca.pem")),
            cert: is_tls.then(|| self.path("client.test.pem")),
            key: is_tls.then(|| self.path("client.test.key")),
            framing: Some(framing),
            facility: Facility::LOCAL0,
            app_name: "auditgate".to_owned(),
            structured_data: true,
            max_size: Some(8192),
        }
    }
}

/// A daemon in the foreground. It is killed when this is dropped.
struct Daemon(Child);

impl Daemon {
    fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait_until<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + TEST_TIMEOUT;
    loop {
        if let Some(done) = attempt() {
            return done;
        }
        assert!(Instant::now() < deadline, "timed out waiting until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn item<'a>(verdict: &'a Verdict, raw: &'a [u8]) -> Item<'a> {
    Item {
        behind: Position::default(),
        received_at: 1_767_323_045_678,
        source: "us",
        verdict,
        key_id: None,
        raw,
    }
}

/// Returns the text that marks the messages of one transport in the daemon's file.
fn marker(transport: &str) -> String {
    format!("via={transport};")
}

/// Sends two events and a quarantined line, and checks how the daemon parsed them.
fn exchange(setup: &Setup, daemon: &str, transport: &str) {
    const PARSED: usize = 8;
    let via = marker(transport);
    let events = [
        format!(r#"{{"rt":1684196881193,"severity":7,"trace_id":"a\"]\\é","x":"{via}"}}"#),
        format!(
            "2023-05-19T00:03:39Z konghq.com CEF:0|KongInc|Konnect|1.0|x|Ingress|1|rt=1684196881001 \
             trace_id=18446744073709551616 user_agent=Zürich 日本 🦀 [x] \"y\" {via}"
        ),
    ];
    let verdict = Verdict::Rejected { reason: Reason::Malformed, detail: "not an event".into() };
    let mut sink = SyslogSink::new(setup.options(transport)).unwrap();
    for event in &events {
        sink.push(&item(&Verdict::Verified { key: 0 }, event.as_bytes()));
    }
    let malformed = format!("malformed 日本 {via}");
    sink.push(&item(&verdict, malformed.as_bytes()));
    wait_until("the daemon receives the messages", || sink.flush(Position::default(), true).ok());

    let found = wait_until(&format!("{daemon} has written the messages of {transport}"), || {
        let text = std::fs::read_to_string(setup.path("out")).unwrap_or_default();
        let lines: Vec<String> = text.lines().filter(|line| line.contains(&via)).map(str::to_owned).collect();
        (lines.len() >= 3).then_some(lines)
    });
    assert_eq!(found.len(), 3, "{found:#?}");
    let process = std::process::id().to_string();
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let record = format!(
        "{{\"received_at\":\"2026-01-02T03:04:05.678Z\",\"source\":\"us\",\"reason\":\"malformed\",\
         \"detail\":\"not an event\",\"raw\":\"{malformed}\"}}"
    );
    let expected = [
        ("132", "2023-05-16T00:28:01.193", "verified", r#"trace_id="a\"\]\\é""#, &events[0]),
        ("134", "2023-05-16T00:28:01.001", "verified", r#"trace_id="18446744073709551616""#, &events[1]),
        ("132", "2026-01-02T03:04:05.678", "quarantine", r#"reason="malformed""#, &record),
    ];
    for (line, (priority, time, stream, parameter, message)) in found.iter().zip(expected) {
        let parts: Vec<&str> = line.splitn(PARSED, '\t').collect();
        assert_eq!(parts.len(), PARSED, "{line}");
        assert_eq!(parts[0], priority, "{line}");
        assert!(parts[1] == format!("{time}Z") || parts[1] == format!("{time}+00:00"), "{line}");
        assert_eq!(parts[2..6], [host.trim(), "auditgate", process.as_str(), stream], "{line}");
        assert!(parts[6].starts_with("[auditgate@32473 ") && parts[6].ends_with(']'), "{line}");
        assert!(parts[6].contains(r#"source="us""#) && parts[6].contains(parameter), "{line}");
        assert_eq!(parts[7], message, "{daemon} over {transport}");
    }
}

/// Checks that the daemon refuses a client, and that nothing counts as delivered.
fn assert_refused(setup: &Setup, identity: Option<Identity>) {
    let mut sink = SyslogSink::new(setup.options("tls").with_identity(identity)).unwrap();
    sink.push(&item(&Verdict::Unverified, b"{\"x\":\"refused\"}"));
    let error = sink.flush(Position::default(), true).unwrap_err().to_string();
    assert!(error.contains("does it want a client certificate, or another one"), "{error}");
    assert!(sink.collected() > 0);
    assert!(!std::fs::read_to_string(setup.path("out")).unwrap_or_default().contains("refused"));
}

/// Sends numbered events in chunks, restarts the daemon between two of them, and checks that every
/// event arrived.
fn survive_restart(setup: &Setup, transport: &str, daemon: &mut Option<Daemon>, start: impl Fn() -> Daemon) {
    const CHUNKS: usize = 6;
    const EVENTS: usize = 200;
    let via = marker(transport);
    let mut sink = SyslogSink::new(setup.options(transport)).unwrap();
    let written = || {
        let text = std::fs::read_to_string(setup.path("out")).unwrap_or_default();
        text.lines()
            .filter_map(|line| line.rsplit_once("\"restart\":").filter(|_| line.contains(&via)))
            .map(|(_, rest)| rest.trim_end_matches('}').parse::<usize>().unwrap())
            .collect::<Vec<_>>()
    };
    for chunk in 0..CHUNKS {
        if chunk == CHUNKS / 2 {
            // Messages that the daemon has received and not written are lost with it.
            wait_until("the first half is written", || (written().len() >= chunk * EVENTS).then_some(()));
            drop(daemon.take());
            *daemon = Some(start());
        }
        for event in 0..EVENTS {
            let raw = format!("{{\"x\":\"{via}\",\"restart\":{}}}", chunk * EVENTS + event);
            sink.push(&item(&Verdict::Unverified, raw.as_bytes()));
        }
        wait_until("the daemon receives the messages", || sink.flush(Position::default(), true).ok());
    }
    wait_until("the second half is written", || {
        (written().last() == Some(&(CHUNKS * EVENTS - 1))).then_some(())
    });
    let mut all = written();
    let came = all.len();
    all.sort_unstable();
    all.dedup();
    assert!(all.iter().copied().eq(0..CHUNKS * EVENTS), "{} of {came} are distinct", all.len());
    assert!(came <= (CHUNKS + 1) * EVENTS, "{came}: only one chunk may be repeated");
}

/// Waits until the TCP ports and the named Unix sockets are open; for UDP, a refused message is
/// sent again.
fn wait_for(setup: &Setup, ports: &[&ReservedPort], sockets: &[&str]) {
    wait_until("the daemon listens", || {
        let tcp = ports.iter().all(|port| TcpStream::connect(("127.0.0.1", port.number())).is_ok());
        (tcp && sockets.iter().all(|name| setup.path(name).exists())).then_some(())
    });
}

fn write_configuration(setup: &Setup, template: &str) -> PathBuf {
    let file = setup.path("daemon.conf");
    std::fs::write(&file, setup.fill(template)).unwrap();
    file
}

fn log(path: &Path) -> Stdio {
    std::fs::File::create(path).unwrap().into()
}

/// rsyslog's output for [`exchange`].
const RSYSLOG_OUTPUT: &str = r#"
        template(name="parts" type="string"
                 string="%pri%\t%timereported:::date-rfc3339%\t%hostname%\t%app-name%\t%procid%\t%msgid%\t%structured-data%\t%msg%\n")
        action(type="omfile" file="@DIR@/out" template="parts")
    "#;

/// Returns a function that starts rsyslog with these inputs.
fn rsyslog(setup: &Setup, inputs: &str) -> impl Fn() -> Daemon {
    let configuration = write_configuration(setup, &[inputs, RSYSLOG_OUTPUT].concat());
    move || {
        // rsyslog does not start if a pid file exists.
        let _ = std::fs::remove_file(setup.path("pid"));
        Daemon::start(
            machine::command("rsyslogd")
                .args(["-n", "-C", "-f"])
                .arg(&configuration)
                .arg("-i")
                .arg(setup.path("pid"))
                .env("TZ", "UTC")
                .stderr(log(&setup.path("errors"))),
        )
    }
}

#[test]
fn rsyslog_parses_every_part() {
    const INPUTS: &str = r#"
        global(workDirectory="@DIR@" maxMessageSize="64k" net.enableDNS="off")
        module(load="imudp")
        module(load="imtcp")
        module(load="imuxsock" SysSock.Use="off")
        input(type="imudp" address="127.0.0.1" port="@UDP@")
        input(type="imtcp" address="127.0.0.1" port="@TCP@")
        input(type="imtcp" address="127.0.0.1" port="@NEWLINE@")
        input(type="imuxsock" socket="@DIR@/dgram" useSpecialParser="off" parseHostname="on"
              ignoreTimestamp="off" useSysTimeStamp="off")
    "#;
    if !machine::are_there(&[RSYSLOG]) {
        return;
    }
    let setup = Setup::new();
    let start = rsyslog(&setup, INPUTS);
    let mut daemon = Some(start());
    wait_for(&setup, &[&setup.tcp, &setup.newline], &["dgram"]);
    for transport in ["tcp", "newline", "udp", "dgram"] {
        exchange(&setup, "rsyslog", transport);
    }
    survive_restart(&setup, "tcp", &mut daemon, start);
}

#[test]
fn rsyslog_parses_every_part_over_tls() {
    const INPUTS: &str = r#"
        global(workDirectory="@DIR@" maxMessageSize="64k" net.enableDNS="off"
               defaultNetstreamDriverCAFile="@DIR@/ca.pem"
               defaultNetstreamDriverCertFile="@DIR@/localhost.pem"
               defaultNetstreamDriverKeyFile="@DIR@/localhost.key")
        module(load="imtcp")
        input(type="imtcp" address="127.0.0.1" port="@TLS@" streamDriver.name="gtls" streamDriver.mode="1"
              streamDriver.authMode="x509/name" permittedPeer="client.test")
    "#;
    if !machine::are_there(&[RSYSLOG, RSYSLOG_TLS]) {
        return;
    }
    let setup = Setup::new();
    let start = rsyslog(&setup, INPUTS);
    let mut daemon = Some(start());
    wait_for(&setup, &[&setup.tls], &[]);
    exchange(&setup, "rsyslog", "tls");
    // From the right authority with another name, which rsyslog checks after the handshake.
    let other = Identity { cert: setup.path("localhost.pem"), key: setup.path("localhost.key") };
    assert_refused(&setup, Some(other));
    assert_refused(&setup, None);
    survive_restart(&setup, "tls", &mut daemon, start);
}

#[test]
fn syslog_ng_parses_every_part() {
    const CONFIGURATION: &str = r#"@version: 3.35
        options { keep-hostname(yes); use-dns(no); keep-timestamp(yes); ts-format(iso); frac-digits(3); time-zone("+00:00"); stats-freq(0); };
        source s {
            syslog(ip("127.0.0.1") port(@UDP@) transport("udp"));
            syslog(ip("127.0.0.1") port(@TCP@) transport("tcp"));
            network(ip("127.0.0.1") port(@NEWLINE@) transport("tcp") flags(syslog-protocol));
            syslog(ip("127.0.0.1") port(@TLS@) transport("tls") tls(key-file("@DIR@/localhost.key")
                cert-file("@DIR@/localhost.pem") ca-file("@DIR@/ca.pem") peer-verify(required-trusted)));
            unix-dgram("@DIR@/dgram" flags(syslog-protocol));
            unix-stream("@DIR@/stream" flags(syslog-protocol));
        };
        destination d { file("@DIR@/out" template("$PRI\t$ISODATE\t$HOST\t$PROGRAM\t$PID\t$MSGID\t$SDATA\t$MSG\n")); };
        log { source(s); destination(d); };
    "#;
    if !machine::are_there(&[("syslog-ng is not installed", &["syslog-ng", "--version"])]) {
        return;
    }
    let setup = Setup::new();
    let configuration = write_configuration(&setup, CONFIGURATION);
    let start = || {
        Daemon::start(
            machine::command("syslog-ng")
                .args(["--foreground", "--no-caps", "--stderr", "--cfgfile"])
                .arg(&configuration)
                .arg("--persist-file")
                .arg(setup.path("persist"))
                .arg("--pidfile")
                .arg(setup.path("pid"))
                .arg("--control")
                .arg(setup.path("control"))
                .stderr(log(&setup.path("errors"))),
        )
    };
    let mut daemon = Some(start());
    wait_for(&setup, &[&setup.tcp, &setup.newline, &setup.tls], &["dgram", "stream"]);
    for transport in ["tcp", "newline", "tls", "udp", "dgram", "stream"] {
        exchange(&setup, "syslog-ng", transport);
    }
    assert_refused(&setup, None);
    for transport in ["tcp", "tls"] {
        survive_restart(&setup, transport, &mut daemon, start);
    }
}
