//! The syslog sink against the daemons that it will meet: rsyslog and syslog-ng, each over every transport.
//!
//! Debian has them in the packages rsyslog, rsyslog-gnutls and syslog-ng-core. They run in the foreground with files of
//! their own.

use std::net::{TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use super::machine::{self, RSYSLOG, RSYSLOG_TLS, ReservedPort};
use super::{Options, SyslogSink};
use crate::deliver::sink::{Item, Sink as _};
use crate::ledger::Position;
use crate::net::{Facility, Framing, Identity, SyslogAddress};
use crate::wire::event::{Reason, Verdict};

/// Long enough for a loaded machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// Where everything of one daemon is.
struct Place {
    directory: tempfile::TempDir,
    tcp: ReservedPort,
    newline: ReservedPort,
    tls: ReservedPort,
    udp: u16,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, "test authority");
        let key = KeyPair::generate().unwrap();
        std::fs::write(directory.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        let issuer = Issuer::new(params, key);
        for name in ["localhost", "client.test"] {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
            let certificate = params.signed_by(&key, &issuer).unwrap();
            std::fs::write(directory.path().join(format!("{name}.pem")), certificate.pem()).unwrap();
            std::fs::write(directory.path().join(format!("{name}.key")), key.serialize_pem()).unwrap();
        }
        let [tcp, newline, tls] = [(); 3].map(|()| ReservedPort::new());
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self { directory, tcp, newline, tls, udp }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn fill(&self, template: &str) -> String {
        template
            .replace("@DIR@", &self.directory.path().display().to_string())
            .replace("@TCP@", &self.tcp.number().to_string())
            .replace("@NEWLINE@", &self.newline.number().to_string())
            .replace("@TLS@", &self.tls.number().to_string())
            .replace("@UDP@", &self.udp.to_string())
    }

    fn options(&self, transport: &str) -> Options {
        let (address, framing) = match transport {
            "tcp" => (format!("tcp://127.0.0.1:{}", self.tcp.number()), Framing::OctetCounting),
            "newline" => (format!("tcp://127.0.0.1:{}", self.newline.number()), Framing::Newline),
            "tls" => (format!("tls://localhost:{}", self.tls.number()), Framing::OctetCounting),
            "udp" => (format!("udp://127.0.0.1:{}", self.udp), Framing::OctetCounting),
            unix => (format!("unix://{}", self.path(unix).display()), Framing::Newline),
        };
        let is_tls = transport == "tls";
        Options {
            address: SyslogAddress::parse(&address).unwrap(),
            ca: is_tls.then(|| self.path("ca.pem")),
            identity: is_tls
                .then(|| Identity { cert: self.path("client.test.pem"), key: self.path("client.test.key") }),
            framing,
            facility: Facility::LOCAL0,
            app_name: "auditgate".to_owned(),
            structured_data: true,
            max_size: 8192,
        }
    }
}

/// A daemon in the foreground, killed at the end.
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

fn until<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(done) = attempt() {
            return done;
        }
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What tells the messages of one transport from those of another in the daemon's file.
fn marker(transport: &str) -> String {
    format!("via={transport};")
}

/// Sends two events and a quarantined line, and compares what the daemon made of them.
fn exchange(place: &Place, daemon: &str, transport: &str) {
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
    let mut sink = SyslogSink::new(place.options(transport)).unwrap();
    let item = |verdict, raw| Item {
        behind: Position::default(),
        received_at: 1_767_323_045_678,
        source: "us",
        verdict,
        key_id: None,
        raw,
    };
    for event in &events {
        sink.push(&item(&Verdict::Verified { key: 0 }, event.as_bytes()));
    }
    let malformed = format!("malformed 日本 {via}");
    sink.push(&item(&verdict, malformed.as_bytes()));
    until("the daemon takes no message", || sink.flush(Position::default(), true).ok());

    let found = until(&format!("{daemon} has written nothing of {transport}"), || {
        let text = std::fs::read_to_string(place.path("out")).unwrap_or_default();
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

/// A client that the daemon does not want is refused, and nothing that it sent counts as delivered.
fn refuse(place: &Place, identity: Option<Identity>) {
    let mut sink = SyslogSink::new(Options { identity, ..place.options("tls") }).unwrap();
    sink.push(&Item {
        behind: Position::default(),
        received_at: 0,
        source: "us",
        verdict: &Verdict::Unverified,
        key_id: None,
        raw: b"{\"x\":\"refused\"}",
    });
    let error = sink.flush(Position::default(), true).unwrap_err().to_string();
    assert!(error.contains("does it want a client certificate, or another one"), "{error}");
    assert!(sink.collected() > 0);
    assert!(!std::fs::read_to_string(place.path("out")).unwrap_or_default().contains("refused"));
}

/// Sends numbered events in chunks and restarts the daemon between two of them.
fn outlive(place: &Place, transport: &str, daemon: &mut Option<Daemon>, start: impl Fn() -> Daemon) {
    const CHUNKS: usize = 6;
    const EVENTS: usize = 200;
    let via = marker(transport);
    let mut sink = SyslogSink::new(place.options(transport)).unwrap();
    let written = || {
        let text = std::fs::read_to_string(place.path("out")).unwrap_or_default();
        text.lines()
            .filter_map(|line| line.rsplit_once("\"restart\":").filter(|_| line.contains(&via)))
            .map(|(_, rest)| rest.trim_end_matches('}').parse::<usize>().unwrap())
            .collect::<Vec<_>>()
    };
    for chunk in 0..CHUNKS {
        if chunk == CHUNKS / 2 {
            // What a daemon has taken and not written is lost with it.
            until("the first half is not written", || (written().len() >= chunk * EVENTS).then_some(()));
            drop(daemon.take());
            *daemon = Some(start());
        }
        for event in 0..EVENTS {
            let raw = format!("{{\"x\":\"{via}\",\"restart\":{}}}", chunk * EVENTS + event);
            sink.push(&Item {
                behind: Position::default(),
                received_at: 0,
                source: "us",
                verdict: &Verdict::Unverified,
                key_id: None,
                raw: raw.as_bytes(),
            });
        }
        until("the daemon takes no message", || sink.flush(Position::default(), true).ok());
    }
    until("the second half is not written", || {
        (written().last() == Some(&(CHUNKS * EVENTS - 1))).then_some(())
    });
    let mut all = written();
    let came = all.len();
    all.sort_unstable();
    all.dedup();
    assert!(all.iter().copied().eq(0..CHUNKS * EVENTS), "{} of {came} are different", all.len());
    assert!(came <= (CHUNKS + 1) * EVENTS, "{came}: only one chunk may come again");
}

/// Until the TCP ports and the named Unix sockets are there; for UDP a refused message tells.
fn wait_for(place: &Place, ports: &[&ReservedPort], sockets: &[&str]) {
    until("the daemon does not listen", || {
        let tcp = ports.iter().all(|port| TcpStream::connect(("127.0.0.1", port.number())).is_ok());
        (tcp && sockets.iter().all(|name| place.path(name).exists())).then_some(())
    });
}

fn write_configuration(place: &Place, template: &str) -> PathBuf {
    let file = place.path("daemon.conf");
    std::fs::write(&file, place.fill(template)).unwrap();
    file
}

fn log(path: &Path) -> Stdio {
    std::fs::File::create(path).unwrap().into()
}

/// How rsyslog writes what it has read, for [`exchange`].
const RSYSLOG_OUTPUT: &str = r#"
        template(name="parts" type="string"
                 string="%pri%\t%timereported:::date-rfc3339%\t%hostname%\t%app-name%\t%procid%\t%msgid%\t%structured-data%\t%msg%\n")
        action(type="omfile" file="@DIR@/out" template="parts")
    "#;

/// What starts rsyslog with some inputs.
fn rsyslog(place: &Place, inputs: &str) -> impl Fn() -> Daemon {
    let configuration = write_configuration(place, &[inputs, RSYSLOG_OUTPUT].concat());
    move || {
        // A pid file left by the one before keeps it from starting.
        let _ = std::fs::remove_file(place.path("pid"));
        Daemon::start(
            machine::command("rsyslogd")
                .args(["-n", "-C", "-f"])
                .arg(&configuration)
                .arg("-i")
                .arg(place.path("pid"))
                .env("TZ", "UTC")
                .stderr(log(&place.path("errors"))),
        )
    }
}

#[test]
fn rsyslog_reads_every_part() {
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
    let place = Place::new();
    let start = rsyslog(&place, INPUTS);
    let mut daemon = Some(start());
    wait_for(&place, &[&place.tcp, &place.newline], &["dgram"]);
    for transport in ["tcp", "newline", "udp", "dgram"] {
        exchange(&place, "rsyslog", transport);
    }
    outlive(&place, "tcp", &mut daemon, start);
}

#[test]
fn rsyslog_reads_every_part_over_tls() {
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
    let place = Place::new();
    let start = rsyslog(&place, INPUTS);
    let mut daemon = Some(start());
    wait_for(&place, &[&place.tls], &[]);
    exchange(&place, "rsyslog", "tls");
    // Of the right authority with another name, which rsyslog looks at after the handshake.
    let other = Identity { cert: place.path("localhost.pem"), key: place.path("localhost.key") };
    refuse(&place, Some(other));
    refuse(&place, None);
    outlive(&place, "tls", &mut daemon, start);
}

#[test]
fn syslog_ng_reads_every_part() {
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
    let place = Place::new();
    let configuration = write_configuration(&place, CONFIGURATION);
    let start = || {
        Daemon::start(
            machine::command("syslog-ng")
                .args(["--foreground", "--no-caps", "--stderr", "--cfgfile"])
                .arg(&configuration)
                .arg("--persist-file")
                .arg(place.path("persist"))
                .arg("--pidfile")
                .arg(place.path("pid"))
                .arg("--control")
                .arg(place.path("control"))
                .stderr(log(&place.path("errors"))),
        )
    };
    let mut daemon = Some(start());
    wait_for(&place, &[&place.tcp, &place.newline, &place.tls], &["dgram", "stream"]);
    for transport in ["tcp", "newline", "tls", "udp", "dgram", "stream"] {
        exchange(&place, "syslog-ng", transport);
    }
    refuse(&place, None);
    for transport in ["tcp", "tls"] {
        outlive(&place, transport, &mut daemon, start);
    }
}
