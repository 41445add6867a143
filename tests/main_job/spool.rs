//! `auditgate send --spool` and the service `auditgate send --config`: every input event reaches
//! the receiver's file once.

use std::fs;
use std::io::{self, Write as _};
use std::net::TcpStream;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::RngExt as _;

use crate::harness::daemon::{Daemon, serve};
use crate::harness::fault::{CC, Fault};
use crate::harness::machine::{ReservedPort, are_there};
use crate::harness::programs::{self, auditgate};
use crate::harness::records::objects;
use crate::harness::site::{PATH, Site, TOKEN, raw_and_json_sinks};
use crate::harness::{SetOnDrop, wait_until};

/// A process that is killed when this is dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Returns a site with a signing key, whose receiver has a port that it keeps, and the
/// configuration `send.toml` of a sender to it.
fn site(port: &ReservedPort, more: &str) -> Site {
    let number = port.number();
    let site = Site::new()
        .sinks(&raw_and_json_sinks())
        .edit("address = \"127.0.0.1:0\"", &format!("address = \"127.0.0.1:{number}\""));
    programs::run(auditgate().arg("keygen").arg("--dir").arg(site.path("keys")));
    fs::copy(site.path("keys/jwks.json"), site.path("jwks.json")).unwrap();
    site.write(
        "send.toml",
        format!(
            "data_dir = \"spool\"\n{more}\n[receiver]\nurl = \"https://localhost:{number}{PATH}\"\nca = \"ca.pem\"\n\
             authorization = {{ value = \"{TOKEN}\" }}\nbatch_events = 50\n[signing]\nkeys = [{{ file = \
             \"keys/signing-key.pem\" }}]\njwks = \"sender.json\"\n[admin]\naddress = \"127.0.0.1:0\"\n[inputs.app]\ntype = \
             \"file\"\npath = \"app.log\"\n"
        ),
    );
    site
}

fn service(site: &Site) -> Killed {
    start(site, service_command(site))
}

fn service_command(site: &Site) -> Command {
    let mut command = auditgate();
    command.arg("send").arg("--config").arg(site.path("send.toml"));
    command
}

fn start(site: &Site, mut command: Command) -> Killed {
    let log = fs::File::options().append(true).create(true).open(site.path("send.log")).unwrap();
    Killed(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap())
}

/// Returns a command of `auditgate send --spool` to a receiver.
fn send(site: &Site, port: u16) -> Command {
    let mut command = auditgate();
    command
        .args(["send", "--to", &format!("https://localhost:{port}{PATH}"), "--ca"])
        .arg(site.path("ca.pem"))
        .env("AUDITGATE_AUTHORIZATION", TOKEN)
        .arg("--key")
        .arg(site.path("keys/signing-key.pem"))
        .arg("--spool")
        .arg(site.path("spool"))
        .stdin(Stdio::null());
    command
}

fn event(number: u64) -> String {
    format!("{{\"name\":\"Ingress\",\"n\":{number}}}\n")
}

fn append(path: &Path, text: &str) {
    fs::File::options().append(true).create(true).open(path).unwrap().write_all(text.as_bytes()).unwrap();
}

/// Returns the numbers of the events in the receiver's file.
fn arrived(site: &Site) -> Vec<u64> {
    let number = |event: serde_json::Value| event["n"].as_u64().unwrap();
    objects(&site.read("verified.log")).into_iter().map(number).collect()
}

/// Returns the answer of a sender's admin endpoint, whose address is the newest in its log.
fn get(site: &Site, path: &str) -> String {
    let address = wait_until("the admin endpoint is there", || {
        let log = String::from_utf8_lossy(&site.read("send.log")).into_owned();
        let found = log.rsplit_once("admin endpoint on http://").map(|(_, rest)| rest.to_owned());
        found.and_then(|rest| Some(rest.split_whitespace().next()?.to_owned())).ok_or(log)
    });
    try_get(&address, path).unwrap()
}

fn try_get(address: &str, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    io::read_to_string(stream)
}

/// Number of kills of each side: 20, or what `AUDITGATE_TESTS_KILLS` says.
fn kills() -> u32 {
    std::env::var("AUDITGATE_TESTS_KILLS").map_or(20, |rounds| rounds.parse().unwrap())
}

#[test]
fn kills_of_both_sides_and_rotations_lose_nothing_and_repeat_nothing() {
    let port = ReservedPort::new();
    let site = site(&port, "");
    let (written, done) = (AtomicU64::new(1), AtomicBool::new(false));
    {
        // What was rotated before the first start is not read.
        append(&site.path("app.log"), &event(0));
        let _receiver = Daemon::start(&site);
        let _sender = service(&site);
        wait_until("it has begun", || if arrived(&site) == [0] { Ok(()) } else { Err(String::new()) });
    }
    std::thread::scope(|scope| {
        let _done = SetOnDrop(&done);
        scope.spawn(|| write_and_rotate(&site, &written, &done));
        for round in 0..kills() {
            let receiver = Daemon::spawn(&site, serve(&site));
            let sender = service(&site);
            // Varies the moments; the test waits for nothing here.
            let moment = || Duration::from_micros(rand::rng().random_range(0..400_000));
            std::thread::sleep(moment());
            if round % 2 == 0 {
                drop(sender);
                let _again = service(&site);
                std::thread::sleep(moment());
                receiver.kill9();
            } else {
                receiver.kill9();
                let _again = Daemon::spawn(&site, serve(&site));
                std::thread::sleep(moment());
                drop(sender);
            }
        }
    });
    let written = written.load(Ordering::SeqCst);
    assert_each_arrives_once(&site, written);
    assert_eq!(site.read("quarantine.jsonl"), b"");
    assert!(!site.path("spool/rejects.jsonl").exists() || site.read("spool/rejects.jsonl").is_empty());
    eprintln!("{written} events through {} kills of each side", kills());
    assert!(written > u64::from(kills()) * 10, "too few events between the kills");
}

#[test]
fn power_losses_of_the_sender_lose_nothing_that_the_spool_has_acknowledged() {
    if !are_there(&[CC]) {
        return;
    }
    let port = ReservedPort::new();
    let site = site(&port, "");
    // The input holds the events from `acknowledged` on: the producer has removed those that the
    // spool says it has, so that they are nowhere else. The spool may have more, which it sees again
    // and knows: they are complete.
    let event = |number| {
        format!("{{\"name\":\"Ingress\",\"rt\":1684454619000,\"trace_id\":\"t{number}\",\"n\":{number}}}\n")
    };
    let (mut acknowledged, mut written, mut away) = (0, 0, false);
    for round in 0..kills() {
        let new = rand::rng().random_range(1..400);
        site.write("app.log", (acknowledged..written + new).map(event).collect::<String>());
        written += new;
        // What waits while the receiver is away goes through several losses.
        let receiver = (round % 4 != 3).then(|| Daemon::spawn(&site, serve(&site)));
        away |= receiver.is_none();
        let mut sender = start_to_lose_power(&site);
        std::thread::sleep(Duration::from_micros(rand::rng().random_range(0..150_000)));
        let taken = taken(&site);
        site.write("arm", "");
        wait_until("the power is lost", || {
            append(&site.path("app.log"), &event(written));
            written += 1;
            let status = sender.0.try_wait().unwrap();
            status.filter(|status| status.signal() == Some(9)).map(drop).ok_or(format!("{status:?}"))
        });
        acknowledged += taken;
    }
    assert!(acknowledged > u64::from(kills()), "too few events were acknowledged: {acknowledged}");
    assert!(away, "the receiver was never away");
    site.write("app.log", (acknowledged..written).map(event).collect::<String>());
    assert_each_arrives_once(&site, written);
    eprintln!("{written} events through {} power losses, {acknowledged} of them only in the spool", kills());
}

/// Starts the service. Once the file `arm` exists, a write or a sync of its spool is interrupted by
/// a power loss.
fn start_to_lose_power(site: &Site) -> Killed {
    let _ = fs::remove_file(site.path("send.log"));
    let mut command = service_command(site);
    let call = if rand::rng().random() { "write" } else { "sync" };
    // Memory that SQLite shares between connections is in a file, and is not meant to survive.
    let fault = Fault { call, path: "*/spool/!(*-shm)", mode: "power-loss", error: "EIO" };
    fault.inject(&mut command, &site.path("arm"));
    start(site, command)
}

/// Returns how many lines of its input a sender has committed, those that it knew included.
fn taken(site: &Site) -> u64 {
    let metrics = get(site, "/metrics");
    let counted = |outcome| {
        let series = format!("auditgate_events_total{{outcome=\"{outcome}\",source=\"app\"}} ");
        let value = metrics.lines().find_map(|line| line.strip_prefix(&series));
        value.unwrap_or_else(|| panic!("{series}: {metrics}")).parse::<u64>().unwrap()
    };
    counted("accepted") + counted("duplicate")
}

/// Runs both sides until the events that were written have arrived, each once.
fn assert_each_arrives_once(site: &Site, written: u64) {
    let _receiver = Daemon::start(site);
    let _sender = service(site);
    wait_until("everything has arrived", || {
        let count = arrived(site).len() as u64;
        if count >= written {
            Ok(())
        } else {
            Err(format!("{count} of {written}; {}", missing(site, written)))
        }
    });
    let mut numbers = arrived(site);
    numbers.sort_unstable();
    assert!(numbers == (0..written).collect::<Vec<_>>(), "{} of {written} events", numbers.len());
}

/// Says which events are missing, and where they were written.
fn missing(site: &Site, written: u64) -> String {
    let arrived: std::collections::HashSet<u64> = arrived(site).into_iter().collect();
    let missing: Vec<u64> = (0..written).filter(|number| !arrived.contains(number)).take(20).collect();
    let first = missing.first().map(|number| event(*number)).unwrap_or_default();
    let files = fs::read_dir(site.path("")).unwrap().map(|entry| entry.unwrap().path());
    let holds = |path: &std::path::PathBuf| {
        path.is_file() && String::from_utf8_lossy(&fs::read(path).unwrap()).contains(first.trim())
    };
    let files: Vec<_> = files.filter(holds).collect();
    let log = String::from_utf8_lossy(&site.read("send.log")).into_owned();
    let lost: Vec<&str> = log.lines().filter(|line| line.contains("input-")).collect();
    format!("{missing:?} of {files:?}; {lost:?}")
}

/// Appends events to the input, which is renamed, copied and truncated, and removed in between.
fn write_and_rotate(site: &Site, written: &AtomicU64, done: &AtomicBool) {
    let path = site.path("app.log");
    let mut rotations = 0;
    while !done.load(Ordering::SeqCst) {
        for _ in 0..rand::rng().random_range(1..20) {
            append(&path, &event(written.fetch_add(1, Ordering::SeqCst)));
        }
        let rotated = site.path(format!("app.log.{rotations:06}"));
        match rand::rng().random_range(0..40) {
            0 => fs::rename(&path, rotated).unwrap(),
            1 => {
                fs::copy(&path, rotated).unwrap();
                fs::File::create(&path).unwrap();
            }
            _ => {}
        }
        rotations += 1;
        // As a producer that is not always busy.
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Peak of the resident memory of a process in KiB (proc_pid_status(5), `VmHWM`).
fn peak_memory(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn an_outage_fills_the_spool_holds_the_input_and_loses_nothing() {
    let port = ReservedPort::new();
    let site = site(&port, "spool_size = \"256KiB\"");
    let count = 40_000;
    append(&site.path("app.log"), &(0..count).map(event).collect::<String>());
    let sender = service(&site);
    wait_until("the spool is full", || {
        let answer = get(&site, "/readyz");
        if answer.contains("the spool is full") { Ok(()) } else { Err(answer) }
    });
    let status = get(&site, "/status");
    let status: serde_json::Value = serde_json::from_str(status.split_once("\r\n\r\n").unwrap().1).unwrap();
    assert_eq!(status["webhook"]["webhook_status"], "inactive", "{status}");
    assert_eq!(status["webhook"]["held_inputs"], 1, "{status}");
    let waiting = status["sinks"][0]["pending"].as_u64().unwrap();
    assert!(waiting < count / 2, "the input is not held: {waiting} events wait");
    assert!(status["ledger"]["backlog_bytes"].as_u64().unwrap() < 1 << 20, "{status}");

    let began = Instant::now();
    let _receiver = Daemon::start(&site);
    wait_until("everything has arrived", || {
        let arrived = arrived(&site).len() as u64;
        if arrived >= count { Ok(()) } else { Err(format!("{arrived} of {count}")) }
    });
    assert!(arrived(&site) == (0..count).collect::<Vec<_>>(), "in their order");
    assert!(peak_memory(sender.0.id()) < 100 << 10, "{} KiB", peak_memory(sender.0.id()));
    // The spool is full again after each batch, which is worth a message every 10 s.
    let log = String::from_utf8(site.read("send.log")).unwrap();
    let messages = log.matches("the spool is full").count() as u64;
    assert!((1..=2 + began.elapsed().as_secs() / 10).contains(&messages), "{log}");
    wait_until("the sender is ready", || {
        let answer = get(&site, "/readyz");
        if answer.starts_with("HTTP/1.1 200") { Ok(()) } else { Err(answer) }
    });
}

#[test]
fn a_refusal_pauses_the_service_with_its_reason() {
    let port = ReservedPort::new();
    let site = site(&port, "");
    let config = String::from_utf8(site.read("send.toml")).unwrap();
    site.write("send.toml", config.replace(PATH, "/elsewhere"));
    append(&site.path("app.log"), &event(0));
    let _receiver = Daemon::start(&site);
    let _sender = service(&site);
    let status = wait_until("the sender is paused", || {
        let answer = get(&site, "/status");
        let status: serde_json::Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1)
            .map_err(|error| error.to_string())?;
        if status["webhook"]["is_paused"] == true { Ok(status) } else { Err(answer) }
    });
    assert_eq!(status["webhook"]["webhook_status"], "inactive");
    let message = status["webhook"]["last_response_message"].as_str().unwrap();
    assert!(message.contains("404") && message.contains("check the path"), "{message}");
    assert!(get(&site, "/readyz").starts_with("HTTP/1.1 503"));
}

#[test]
fn a_new_key_is_published_at_once_and_signs_from_its_time_on() {
    let port = ReservedPort::new();
    let site = site(&port, "");
    programs::run(auditgate().arg("keygen").arg("--dir").arg(site.path("next")));
    // The receiver trusts what the sender publishes.
    let _sender = service(&site);
    wait_until("the key set is there", || {
        fs::copy(site.path("sender.json"), site.path("jwks.json")).map_err(|error| error.to_string())
    });
    let receiver = Daemon::start(&site);
    append(&site.path("app.log"), &event(0));
    wait_until("the first event has arrived", || {
        if arrived(&site) == [0] { Ok(()) } else { Err(String::new()) }
    });

    let keys = |from: &str| {
        format!(
            "{{ file = \"keys/signing-key.pem\" }}, {{ file = \"next/signing-key.pem\", from = \"{from}\" }}"
        )
    };
    let config = String::from_utf8(site.read("send.toml")).unwrap();
    let reload = |from: &str| {
        site.write("send.toml", config.replace("{ file = \"keys/signing-key.pem\" }", &keys(from)));
        programs::run(Command::new("kill").arg("-HUP").arg(_sender.0.id().to_string()));
    };
    reload("2999-01-01T00:00:00Z");
    wait_until("both keys are published", || {
        let published = String::from_utf8(site.read("sender.json")).unwrap();
        if published.matches("\"kid\"").count() == 2 { Ok(()) } else { Err(published) }
    });
    append(&site.path("app.log"), &event(1));
    wait_until(
        "the old key still signs",
        || if arrived(&site) == [0, 1] { Ok(()) } else { Err(String::new()) },
    );

    fs::copy(site.path("sender.json"), site.path("jwks.json")).unwrap();
    reload("2020-01-01T00:00:00Z");
    wait_until("the new key signs", || {
        let log = String::from_utf8_lossy(&site.read("send.log")).into_owned();
        if log.matches("code=\"signing-key\"").count() == 2 { Ok(()) } else { Err(log) }
    });
    append(&site.path("app.log"), &event(2));
    wait_until("its event has arrived", || {
        if arrived(&site) == [0, 1, 2] { Ok(()) } else { Err(String::new()) }
    });
    receiver.settle();
    let records = objects(&site.read("events.jsonl"));
    assert_eq!(records[0]["key_id"], records[1]["key_id"]);
    assert_ne!(records[1]["key_id"], records[2]["key_id"]);
}

#[test]
fn a_reload_takes_up_a_new_token_and_refuses_what_cannot_change() {
    let port = ReservedPort::new();
    let site = site(&port, "");
    let receiver = Daemon::start(&site);
    let sender = service(&site);
    append(&site.path("app.log"), &event(0));
    wait_until("the first event has arrived", || {
        if arrived(&site) == [0] { Ok(()) } else { Err(String::new()) }
    });
    let reload = |process: u32| programs::run(Command::new("kill").arg("-HUP").arg(process.to_string()));
    let log = || String::from_utf8_lossy(&site.read("send.log")).into_owned();
    let logged = |words: &str| {
        wait_until(words, || if log().contains(words) { Ok(()) } else { Err(log()) });
    };
    let config = String::from_utf8(site.read("send.toml")).unwrap();
    site.write("send.toml", config.replace("path = \"app.log\"", "path = \"other.log\""));
    reload(sender.0.id());
    logged("[inputs] cannot change while the sender runs; restart it");
    let status = get(&site, "/status");
    assert!(status.contains("\"reload_error\":\"[inputs] cannot change"), "{status}");
    assert!(get(&site, "/metrics").contains("auditgate_config_reload_errors_total 1"));

    let former = String::from_utf8(site.read("config.toml")).unwrap();
    site.write("config.toml", former.replace(TOKEN, "Bearer new"));
    reload(receiver.process());
    receiver.wait_for_log("code=\"config-reloaded\"");
    site.write("send.toml", config.replace(TOKEN, "Bearer new"));
    reload(sender.0.id());
    logged("code=\"sender-reloaded\"");
    append(&site.path("app.log"), &event(1));
    wait_until("the second event has arrived", || if arrived(&site) == [0, 1] { Ok(()) } else { Err(log()) });
    assert!(!log().contains("401"), "{}", log());
}

#[test]
fn a_spool_from_the_command_line_ends_when_everything_has_arrived() {
    let port = ReservedPort::new();
    let site = site(&port, "");
    append(&site.path("app.log"), &(0..120).map(event).collect::<String>());
    append(&site.path("app.log"), "not an event\n");
    let receiver = Daemon::start(&site);
    let run = |text: &str, code: i32| -> Output {
        let output = send(&site, receiver.address.port()).arg(site.path("app.log")).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains(text), "{output:?}");
        output
    };
    let output = run("120 events taken; 120 delivered in 1 batch: accepted 120", 1);
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("rejects.jsonl has 1 line that cannot be sent"),
        "{output:?}"
    );
    let rejects = objects(&site.read("spool/rejects.jsonl"));
    assert!(rejects[0]["detail"].as_str().unwrap().contains("app.log, line 121: "), "{rejects:?}");
    append(&site.path("app.log"), &event(120));
    run("1 event taken; 1 delivered", 0);
    assert_eq!(arrived(&site), (0..121).collect::<Vec<_>>());
    let without = auditgate().args(["send", "--to", "https://localhost/x", "--follow"]).output().unwrap();
    assert_eq!(without.status.code(), Some(2), "{without:?}");
}

#[test]
fn the_command_line_serves_its_key_set() {
    let port = ReservedPort::new();
    let site = site(&port, "");
    append(&site.path("app.log"), &event(0));
    let address = format!("127.0.0.1:{}", ReservedPort::new().number());
    let mut command = send(&site, port.number());
    let _sender = start(&site, {
        command.args(["--follow", "--serve-jwks", &address]).arg(site.path("app.log"));
        command
    });
    let key_set = wait_until("the key set is served", || {
        try_get(&address, "/jwks.json").map_err(|error| error.to_string())
    });
    let (_, key_set) = key_set.split_once("\r\n\r\n").unwrap();
    let of_keygen = String::from_utf8(site.read("keys/jwks.json")).unwrap();
    let keys = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap()["keys"][0]["x"].clone();
    assert_eq!(keys(key_set), keys(&of_keygen));
}

#[test]
fn local_producers_write_to_a_socket() {
    let port = ReservedPort::new();
    let site = site(&port, "");
    let config = String::from_utf8(site.read("send.toml")).unwrap();
    site.write(
        "send.toml",
        config.replace("type = \"file\"\npath = \"app.log\"", "type = \"unix-datagram\"\npath = \"s\""),
    );
    let _receiver = Daemon::start(&site);
    let _sender = service(&site);
    let producer = UnixDatagram::unbound().unwrap();
    wait_until("the socket is there", || producer.connect(site.path("s")).map_err(|error| error.to_string()));
    (0..100).for_each(|number| {
        producer.send(event(number).as_bytes()).unwrap();
    });
    wait_until("everything has arrived", || {
        if arrived(&site).len() == 100 { Ok(()) } else { Err(String::new()) }
    });
}
