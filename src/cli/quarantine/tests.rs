//! Tests of the quarantine's commands on files. Those on databases are in `tests/main_job`, where a
//! daemon makes them.

use std::fs::{self, File};

use clap::Parser;

use super::*;
use crate::cli::exit::Exit;
use crate::send::receiver::{Answer, Receiver, Request};
use crate::wire::record::{self, Accepted, Quarantined, write_accepted, write_quarantined};

#[derive(clap::Parser)]
struct Program {
    #[command(flatten)]
    args: Args,
}

/// A directory with a configuration whose sink `rejects` writes to `q.jsonl`.
struct Fixture {
    dir: tempfile::TempDir,
}

/// 2026-01-02T03:04:05Z.
const MOMENT: i64 = 1_767_323_045_000;
const DAY: i64 = 86_400_000;

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let text = "data_dir = \"data\"\nlisten = { address = \"127.0.0.1:0\", tls = \"off\" }\n\
                    [sources.us]\npath = \"/us\"\nauthorization = { value = \"x\" }\njwks = { file = \"j\" }\n\
                    [sinks.verified]\ntype = \"file\"\npath = \"v.log\"\nformat = \"raw\"\n\
                    [sinks.rejects]\ntype = \"file\"\npath = \"q.jsonl\"\nformat = \"json\"\nstream = \"quarantine\"\n";
        fs::write(dir.path().join("config.toml"), text).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// Adds to the configuration.
    fn configure(&self, more: &str) {
        let text = fs::read_to_string(self.path("config.toml")).unwrap();
        self.write("config.toml", (text + more).as_bytes());
    }

    fn run(&self, args: &[&str]) -> (String, Result<(), Failure>) {
        let config = self.path("config.toml");
        let all = [&["quarantine", args[0], "--config", &config], &args[1..]].concat();
        let program = Program::try_parse_from(all).unwrap_or_else(|error| panic!("{error}"));
        let mut out = Vec::new();
        let result = run(&program.args, &mut out);
        (String::from_utf8(out).unwrap(), result)
    }

    #[track_caller]
    fn good(&self, args: &[&str]) -> String {
        let (out, result) = self.run(args);
        result.unwrap_or_else(|failure| panic!("{failure}"));
        out
    }

    #[track_caller]
    fn failed(&self, args: &[&str]) -> Failure {
        self.run(args).1.expect_err("all is well")
    }
}

fn record(time: i64, source: &str, reason: Reason, raw: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    write_quarantined(&mut out, &Quarantined { received_at: time, source, reason, detail: "why", raw });
    out
}

fn bad(time: i64, raw: &str) -> Vec<u8> {
    record(time, "us", Reason::BadSignature, raw.as_bytes())
}

/// A configuration with a rotated, compressed file and a current one.
fn with_lines() -> Fixture {
    let fixture = Fixture::new();
    let old = [bad(MOMENT, "a"), record(MOMENT + 1000, "eu", Reason::Unsigned, b"b")].concat();
    fixture.write("q.jsonl.20260103T000000Z-0001.zst", &zstd::encode_all(&old[..], 1).unwrap());
    // The last line is not written to its end.
    let new =
        [bad(MOMENT + 2 * DAY, "c\u{1b}[31m"), bad(MOMENT + 3 * DAY, "d"), b"{\"received_at\":".to_vec()];
    fixture.write("q.jsonl", &new.concat());
    fixture
}

#[test]
fn the_list_counts_by_source_and_reason() {
    let fixture = with_lines();
    assert_eq!(
        fixture.good(&["list"]),
        "SOURCE  REASON         RECORDS  FIRST                     LAST\n\
         eu      unsigned             1  2026-01-02T03:04:06.000Z  2026-01-02T03:04:06.000Z\n\
         us      bad_signature        3  2026-01-02T03:04:05.000Z  2026-01-05T03:04:05.000Z\n"
    );
    for (filter, records) in [
        (&["--reason", "unsigned"][..], 1),
        (&["--reason", "unsigned", "--reason", "bad_signature"], 4),
        (&["--source", "us", "--until", "2026-01-04T03:04:05Z"], 1),
        (&["--since", "2026-01-04T03:04:05Z"], 2),
        (&["--reason", "malformed"], 0),
    ] {
        let listed: serde_json::Value =
            serde_json::from_str(&fixture.good(&[&["list", "--json"], filter].concat())).unwrap();
        assert_eq!(listed["records"], records, "{filter:?}");
    }
    assert_eq!(fixture.good(&["list", "--source", "other"]), "no quarantined line\n");
    assert_eq!(fixture.failed(&["list", "--since", "tomorrow"]).exit, Exit::Usage);
    // Named files, and nothing else.
    let listed = fixture.good(&["list", "--json", &fixture.path("q.jsonl")]);
    assert_eq!(
        listed,
        "{\"quarantined\":[{\"sink\":null,\"source\":\"us\",\"reason\":\"bad_signature\",\"records\":2,\
         \"first\":\"2026-01-04T03:04:05.000Z\",\"last\":\"2026-01-05T03:04:05.000Z\"}],\"records\":2,\"unreadable\":[]}\n"
    );
}

#[test]
fn what_cannot_be_read_is_a_failure_after_the_rest_is_done() {
    let fixture = with_lines();
    fixture.write("q.jsonl.20260102T000000Z-0001.gz", b"\x1f\x8b\x08\x00");
    let (out, result) = fixture.run(&["list"]);
    assert_eq!(result.unwrap_err().exit, Exit::Io);
    assert!(out.contains("bad_signature        3"), "{out}");
    assert_eq!(fixture.failed(&["list", &fixture.path("missing")]).exit, Exit::Io);
}

#[test]
fn sinks_are_chosen_by_name() {
    let fixture = with_lines();
    fixture.configure("[sinks.more]\ntype = \"file\"\npath = \"m.jsonl\"\nformat = \"json\"\nstream = [\"quarantine\", \"verified\"]\n[sinks.raw]\ntype = \"file\"\npath = \"r\"\nformat = \"raw\"\nstream = \"quarantine\"\n");
    let mut mixed = Vec::new();
    let raw = br#"{"rt":1,"trace_id":"t"}"#;
    write_accepted(&mut mixed, &Accepted { received_at: MOMENT, source: "us", key_id: None, raw });
    fixture.write("m.jsonl", &[mixed, bad(MOMENT, "a")].concat());
    let listed = fixture.good(&["list"]);
    assert!(listed.starts_with("SINK     SOURCE  REASON"), "{listed}");
    assert!(
        listed.contains("\nmore     us      bad_signature        1  ") && listed.contains("\nrejects  us"),
        "{listed}"
    );
    assert_eq!(fixture.good(&["list", "--sink", "more"]).lines().count(), 2);
    for command in [&["show"][..], &["resend", "--to", "http://localhost/"]] {
        let failure = fixture.failed(command);
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.message.ends_with("choose one with --sink: more, rejects"), "{failure}");
    }
    for other in ["raw", "verified", "x"] {
        let failure = fixture.failed(&["list", "--sink", other]);
        assert!(failure.message.ends_with("it has more, rejects"), "{failure}");
    }
}

#[test]
fn the_newest_lines_are_shown_last_and_escaped() {
    let fixture = with_lines();
    let shown = fixture.good(&["show"]);
    assert_eq!(shown.lines().count(), 8, "{shown}");
    assert!(shown.starts_with("2026-01-02T03:04:05.000Z us bad_signature: why\n    a\n"), "{shown}");
    assert!(shown.contains("\n    c\\u{1b}[31m\n"), "{shown}");
    assert!(shown.ends_with("2026-01-05T03:04:05.000Z us bad_signature: why\n    d\n"), "{shown}");
    assert_eq!(fixture.good(&["show", "-n", "1"]), shown[shown.len() - 53..]);
    assert_eq!(fixture.good(&["show", "--all"]), shown);

    fixture.write("q.jsonl", &bad(MOMENT, &"\u{fc}".repeat(1001)));
    let shown = fixture.good(&["show", "-n", "1"]);
    assert!(shown.ends_with(&format!("{} … (2002 bytes; all of them with --json)\n", "\u{fc}".repeat(1000))));
    for raw in [&b"\xff\xfe"[..], "\u{202e}".as_bytes(), &[b'x'; 3000]] {
        let line = record(MOMENT, "us", Reason::Malformed, raw);
        fixture.write("q.jsonl", &line);
        let shown = fixture.good(&["show", "--json", "--reason", "malformed"]);
        assert_eq!(shown.as_bytes(), line);
        assert_eq!(record::read(shown.trim_end().as_bytes()).unwrap().raw, raw);
    }
}

#[test]
fn lines_of_one_source_are_sent_again() {
    let fixture = with_lines();
    let receiver = Receiver::start([Answer::receipt(2, 1, 0)]);
    let to = receiver.endpoint().to_string();
    let failure = fixture.failed(&["resend", "--to", &to]);
    assert_eq!(failure.exit, Exit::Usage);
    assert!(failure.message.ends_with("choose one with --source: eu, us"), "{failure}");
    let whole = record(MOMENT, "us", Reason::UndecodableBody, b"x\ny");
    let later = bad(i64::MAX / 2_000_000, "later");
    let added = [
        &fs::read(fixture.path("q.jsonl.20260103T000000Z-0001.zst")).unwrap(),
        &zstd::encode_all(&[whole, later].concat()[..], 1).unwrap()[..],
    ]
    .concat();
    fixture.write("q.jsonl.20260103T000000Z-0001.zst", &added);

    let args = ["resend", "--to", &to, "--source", "us", "--authorization", "Bearer x"];
    let (out, result) = fixture.run(&args);
    // The body without an event cannot be sent; what arrived after the start is not.
    assert_eq!(result.unwrap_err().message, "1 input line could not be sent");
    assert_eq!(out.lines().next(), Some("batch 1: 3 events, 200, accepted 2, duplicates 1, quarantined 0"));
    let requests = receiver.requests();
    assert_eq!(requests.iter().flat_map(Request::lines).collect::<Vec<_>>(), ["a", "c\u{1b}[31m", "d"]);
    assert!(requests[0].head.contains("authorization: Bearer x\r\n"));
    let out = fixture.good(&["resend", "--to", &to, "--reason", "line_too_long"]);
    assert_eq!(out, "no quarantined line to send\n");
    assert_eq!(receiver.requests().len(), 1);
}

#[test]
fn only_old_rotated_files_of_quarantined_lines_are_pruned() {
    let fixture = Fixture::new();
    let (old, new) = (bad(MOMENT, "a"), bad(MOMENT + 5 * DAY, "b"));
    let mut accepted = Vec::new();
    let raw = br#"{"rt":1,"trace_id":"t"}"#;
    write_accepted(&mut accepted, &Accepted { received_at: MOMENT, source: "us", key_id: None, raw });
    let packed = zstd::encode_all(&old[..], 1).unwrap();
    let files: [(&str, Vec<u8>, Option<&str>); 9] = [
        ("q.jsonl.20260103T000000Z-0001", old.clone(), None),
        ("q.jsonl.20260103T000000Z-0002.zst", packed, None),
        (
            "q.jsonl.20260103T000000Z-0003",
            [&old[..], &new].concat(),
            Some("a line in it arrived at 2026-01-07T"),
        ),
        (
            "q.jsonl.20260103T000000Z-0004",
            [&old[..], &accepted].concat(),
            Some("1 of its lines are not quarantine"),
        ),
        ("q.jsonl.20260103T000000Z-0005", old.clone(), Some("a process has locked it")),
        (
            "q.jsonl.20260103T000000Z-0006",
            String::from_utf8(old.clone()).unwrap().replace("2026-01-02T", "long ago T").into_bytes(),
            Some("a record in it has no valid time"),
        ),
        ("q.jsonl.20260105T000000Z-0001", old.clone(), Some("it was rotated at 2026-01-05T00:00:00.000Z")),
        ("q.jsonl.1", old.clone(), Some("another program has rotated it")),
        ("q.jsonl", old.clone(), Some("the daemon writes to it")),
    ];
    for (name, bytes, _) in &files {
        fixture.write(name, bytes);
    }
    let lock = File::open(fixture.path("q.jsonl.20260103T000000Z-0005")).unwrap();
    lock.lock().unwrap();
    let args = ["prune", "--before", "2026-01-04"];
    let would = fixture.good(&[&args[..], &["--dry-run"]].concat());
    assert!(files.iter().all(|(name, ..)| fs::exists(fixture.path(name)).unwrap()));
    let did = fixture.good(&args);
    assert_eq!(would.replace("would remove", "removed"), did);
    for (name, _, why) in files {
        let path = fs::canonicalize(fixture.dir.path()).unwrap().join(name);
        let line = match why {
            None => format!("removed {}\n", path.display()),
            Some(why) => format!("kept {}: {why}", path.display()),
        };
        assert!(did.contains(&line), "{line} is not in {did}");
        assert_eq!(path.exists(), why.is_some(), "{name}");
    }
    // A file that is named must be called like a rotated one.
    fixture.write("copy.jsonl", &old);
    let kept = fixture.good(&["prune", "--before", "2026-01-04", &fixture.path("copy.jsonl")]);
    assert!(kept.contains("copy.jsonl: it is not named like a rotated file"), "{kept}");
    fixture.write("x.20260103T000000Z-0001", &old);
    fixture.good(&["prune", "--before", "2026-01-04", &fixture.path("x.20260103T000000Z-0001")]);
    assert!(!fs::exists(fixture.path("x.20260103T000000Z-0001")).unwrap());
    // Nothing is removed of what cannot be read to its end.
    fixture.write("q.jsonl.20260103T000000Z-0002.zst", b"\x28\xb5\x2f\xfd\x00");
    assert_eq!(fixture.failed(&args).exit, Exit::Io);
    assert!(fs::exists(fixture.path("q.jsonl.20260103T000000Z-0002.zst")).unwrap());
}

#[test]
fn the_command_line_is_consistent() {
    use clap::CommandFactory as _;
    Program::command().debug_assert();
    crate::cli::Cli::command().debug_assert();
    assert!(Program::try_parse_from(["quarantine", "list", "--reason", "other"]).is_err());
    assert!(Program::try_parse_from(["quarantine", "prune"]).is_err());
    assert!(Program::try_parse_from(["quarantine", "list", "--sink", "a", "b.jsonl"]).is_err());
}
