//! `auditgate verify`: what was delivered can be proved again, offline, by whoever has the keys.

use std::io::Write as _;
use std::path::Path;
use std::process::{Output, Stdio};

use serde_json::{Value, json};

use crate::harness::daemon::Daemon;
use crate::harness::programs::auditgate;
use crate::harness::site::{Site, sink};
use crate::harness::{body, gzip, sign};

/// What `verify` says about some files, with the site's keys.
fn verify(site: &Site, files: &[&str]) -> Output {
    let mut command = auditgate();
    command.arg("verify").arg("--jwks").arg(site.path("jwks.json"));
    command.args(files.iter().map(|file| site.path(file))).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn all_good(output: &Output, count: usize) {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(stdout(output), format!("good {count}, bad 0, unsigned 0, malformed 0\n"));
}

fn names(output: &Output, site: &Site, file: &str, line: usize) {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let place = format!("{}:{line}:", site.path(file).display());
    let said = stdout(output) + &String::from_utf8_lossy(&output.stderr);
    assert!(said.contains(&place), "{place} is not in: {said}");
}

/// A daemon's own files with 300 events.
fn delivered() -> Site {
    let site = Site::new().sinks(
        &[
            sink("verified", "raw", "\"verified\""),
            sink("events", "json", "\"verified\""),
            sink("quarantine", "json", "\"quarantine\""),
        ]
        .concat(),
    );
    let daemon = Daemon::start(&site);
    let mut lines = site.producer.events(0..300);
    lines.push(sign::cef(300, "rt=1684454619000"));
    assert_eq!(daemon.deliver(&lines).accepted, 300);
    daemon.settle();
    daemon.terminate();
    site
}

#[test]
fn what_was_delivered_verifies_in_every_wrapping() {
    let site = delivered();
    for name in ["verified.log", "events.jsonl"] {
        let bytes = site.read(name);
        site.write(&format!("{name}.gz"), gzip(&bytes));
        site.write(&format!("{name}.zst"), zstd::stream::encode_all(&bytes[..], 3).unwrap());
        for extension in ["", ".gz", ".zst"] {
            all_good(&verify(&site, &[&format!("{name}{extension}")]), 300);
        }
    }
    all_good(&verify(&site, &["verified.log", "events.jsonl.gz", "verified.log.zst"]), 900);

    let mut child = auditgate()
        .arg("verify")
        .arg("--jwks")
        .arg(site.path("jwks.json"))
        .arg("-")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&site.read("verified.log")).unwrap();
    all_good(&child.wait_with_output().unwrap(), 300);
}

#[test]
fn one_changed_byte_is_named_by_file_and_line() {
    let site = delivered();
    let raw = site.read("verified.log");
    // Three formats in turn: one line of each.
    for line in [100, 101, 102] {
        let mut lines: Vec<Vec<u8>> = raw.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
        lines.pop();
        let at = lines[line - 1].windows(8).position(|window| window == b"trace_id").unwrap();
        lines[line - 1][at] = b'T';
        let changed = body(&lines);
        site.write("changed.log", &changed);
        site.write("changed.log.gz", gzip(&changed));
        for file in ["changed.log", "changed.log.gz"] {
            let output = verify(&site, &["verified.log", file]);
            names(&output, &site, file, line);
            assert!(stdout(&output).ends_with("good 599, bad 1, unsigned 0, malformed 0\n"), "{output:?}");
        }
    }

    // In a record, the line itself and what is said about it.
    let json = String::from_utf8(site.read("events.jsonl")).unwrap();
    for (from, to) in [("granted=true", "granted=TRUE"), ("\"granted\":true", "\"granted\":false")] {
        let (line, changed) = json
            .lines()
            .enumerate()
            .find_map(|(at, line)| line.contains(from).then(|| (at + 1, line.replacen(from, to, 1))))
            .unwrap();
        let all: Vec<&str> =
            json.lines().enumerate().map(|(at, old)| if at + 1 == line { &changed } else { old }).collect();
        site.write("changed.jsonl", body(&all));
        names(&verify(&site, &["changed.jsonl"]), &site, "changed.jsonl", line);
    }
}

#[test]
fn what_cannot_be_proved_is_counted() {
    let site = delivered();
    let unsigned = sign::cef(1, "rt=1");
    let foreign = sign::Producer::new(2).event(1);
    site.write("mixed.log", body(&[&site.producer.event(1), &unsigned, &foreign, "rubbish"]));
    let output = verify(&site, &["mixed.log"]);
    names(&output, &site, "mixed.log", 2);
    names(&output, &site, "mixed.log", 3);
    names(&output, &site, "mixed.log", 4);
    assert!(stdout(&output).ends_with("good 1, bad 1, unsigned 1, malformed 1\n"), "{output:?}");

    // The quarantine is full of what cannot be proved.
    assert_eq!(verify(&site, &["quarantine.jsonl"]).status.code(), Some(1));
    assert_eq!(verify(&site, &["not-there.log"]).status.code(), Some(74));
    let no_keys =
        auditgate().args(["verify", "--jwks"]).arg(Path::new("/not/there")).arg("-").output().unwrap();
    assert_eq!(no_keys.status.code(), Some(78), "{no_keys:?}");
}

/// `verify` with the site's keys and further arguments, in the site's directory.
fn verify_with(site: &Site, arguments: &[&str]) -> Output {
    let mut command = auditgate();
    command
        .current_dir(site.path(""))
        .args(["verify", "--jwks", "jwks.json"])
        .args(arguments)
        .output()
        .unwrap()
}

fn report(site: &Site, arguments: &[&str]) -> (Option<i32>, Value) {
    let output = verify_with(site, &[&["--json"], arguments].concat());
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    (output.status.code(), report)
}

/// The findings of a report: file, line and verdict.
fn findings(report: &Value) -> Vec<(String, u64, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let one = |finding: &Value| {
        assert!(!text(&finding["reason"]).is_empty());
        (text(&finding["file"]), finding["line"].as_u64().unwrap(), text(&finding["verdict"]))
    };
    report["findings"].as_array().unwrap().iter().map(one).collect()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 1).unwrap()
}

/// A site without a daemon, and so many distinct signed lines.
fn signed_lines(count: u64) -> (Site, Vec<String>) {
    let site = Site::new();
    let lines = site.producer.events(0..count);
    (site, lines)
}

#[test]
fn twenty_planted_faults_in_rotated_files_are_found_each_by_file_and_line() {
    let (site, lines) = signed_lines(12_000);
    std::fs::create_dir_all(site.path("log/deep")).unwrap();
    // Five files in the order of their time, whatever their names' order: (name, how it is packed).
    let names = [
        "log/z.log.20260101T000000Z-0001.zst",
        "log/deep/a.log.20260101T000000Z-0002.gz",
        "log/z.log.20260102T000000Z-0001.zst",
        "log/deep/a.log.20260103T000000Z-0001",
        "log/z.log",
    ];
    let mut planted: Vec<(String, u64, String)> = Vec::new();
    let mut total = 0;
    for (file, name) in names.iter().enumerate() {
        let mut part: Vec<String> =
            lines.iter().skip(file * 2_000).take(2_000 + file * 500).cloned().collect();
        total += part.len() as u64;
        for fault in 0..4 {
            let at = (fault * 613 + file * 97 + 1) % part.len();
            let line = part[at].clone();
            let (changed, verdict) = match fault {
                0 => (line.replacen("2023-05-19T", "2023-05-18T", 1), "bad"),
                1 => (sign::Producer::new(9).event(at as u64), "bad"),
                2 => (sign::cef(at as u64, "rt=1684454619000"), "unsigned"),
                _ => (line[..line.len() / 3].replace("CEF:", "").replace('{', "["), "malformed"),
            };
            assert_ne!(changed, line);
            part[at] = changed;
            planted.push(((*name).to_owned(), at as u64 + 1, verdict.to_owned()));
        }
        let bytes = body(&part);
        // Two members, two frames, cut within a line.
        let (head, tail) = bytes.split_at(bytes.len() / 2);
        let packed = match name.rsplit_once('.').unwrap().1 {
            "zst" => [zstd(head), zstd(tail)].concat(),
            "gz" => [gzip(head), gzip(tail)].concat(),
            _ => bytes,
        };
        site.write(name, packed);
    }
    site.write("log/deep/a.log.20260103T000000Z-0001.zst.unfinished", "half");
    let (code, report) = report(&site, &["log"]);
    assert_eq!(code, Some(1));
    let mut wanted = planted.clone();
    wanted.sort_by_key(|(file, line, _)| (names.iter().position(|name| name == file), *line));
    assert_eq!(findings(&report), wanted);
    assert_eq!(wanted.len(), 20);
    assert_eq!(
        (&report["bad"], &report["unsigned"], &report["malformed"]),
        (&10.into(), &5.into(), &5.into())
    );
    assert_eq!(report["good"], total - 20);
    assert_eq!(report["keys"][0]["good"], total - 20);
    assert_eq!(report["keys"][0]["kid"], "key-1");
    let files: Vec<_> = report["files"].as_array().unwrap().iter().collect();
    assert!(files.iter().map(|file| file["file"].as_str().unwrap()).eq(names), "{files:?}");
    assert!(
        files
            .iter()
            .map(|file| file["kind"].as_str().unwrap())
            .eq(["zstd", "gzip", "zstd", "plain", "plain"])
    );
    assert_eq!(files[0]["good"], 1996);
    assert_eq!(report["left_out"][0]["file"], "log/deep/a.log.20260103T000000Z-0001.zst.unfinished");
    assert_eq!(
        (report["first"].as_str().unwrap(), &report["unreadable"]),
        ("2023-05-19T00:03:39.000Z", &json!([]))
    );

    // The same in words.
    let output = verify_with(&site, &["log"]);
    let said = stdout(&output);
    for (file, line, verdict) in &planted {
        assert!(said.contains(&format!("{file}:{line}: {verdict}: ")), "{file}:{line}");
    }
    assert!(
        String::from_utf8_lossy(&output.stderr)
            .contains("left out log/deep/a.log.20260103T000000Z-0001.zst.unfinished")
    );
}

#[test]
fn what_is_cut_off_or_damaged_is_a_finding_and_the_lines_before_it_count() {
    let (site, lines) = signed_lines(3_000);
    let bytes = body(&lines);
    for (name, packed) in [("cut.log.gz", gzip(&bytes)), ("cut.log.zst", zstd(&bytes))] {
        site.write(name, &packed[..packed.len() * 2 / 3]);
        let (code, report) = report(&site, &[name]);
        assert_eq!(code, Some(1), "{report}");
        let good = report["good"].as_u64().unwrap();
        assert!(good > 500, "{report}");
        assert_eq!(findings(&report), [(name.to_owned(), good + 1, "damaged".to_owned())]);

        let mut damaged = packed;
        let middle = damaged.len() / 2;
        damaged[middle..middle + 40].fill(0xa5);
        site.write(name, damaged);
        let output = verify_with(&site, &[name]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(stdout(&output).contains("damaged 1\n"), "{output:?}");
    }
    // Not a byte of a frame is left, or another thing stands there.
    for bytes in [&b""[..], b"\0\0\0\0\0\0"] {
        site.write("empty.log.zst", bytes);
        let (code, report) = report(&site, &["empty.log.zst"]);
        assert_eq!((code, findings(&report).len()), (Some(1), 1), "{report}");
    }

    // A torn last line; one that only lacks its line end proves itself.
    site.write("torn.log", &bytes[..bytes.len() - 20]);
    let (code, torn) = report(&site, &["torn.log"]);
    assert_eq!((code, torn["good"].as_u64()), (Some(1), Some(2999)));
    assert_eq!(findings(&torn), [("torn.log".to_owned(), 3000, "torn".to_owned())]);
    site.write("whole.log", &bytes[..bytes.len() - 1]);
    all_good(&verify(&site, &["whole.log"]), 3000);

    // Nothing to check is no proof.
    std::fs::create_dir(site.path("empty")).unwrap();
    assert_eq!(verify(&site, &["empty"]).status.code(), Some(2));

    // What cannot be opened is said, and the others are checked nevertheless.
    let output = verify_with(&site, &["gone.log", "whole.log", "torn.log"]);
    assert_eq!(output.status.code(), Some(74), "{output:?}");
    assert!(stdout(&output).ends_with("good 5999, bad 0, unsigned 0, malformed 0, torn 1\n"), "{output:?}");
    let (code, report) = report(&site, &["gone.log", "whole.log"]);
    assert_eq!(
        (code, &report["unreadable"][0]["file"], &report["good"]),
        (Some(74), &"gone.log".into(), &3000.into())
    );
}

#[test]
fn what_is_packed_is_known_by_its_beginning_whatever_its_name() {
    let (site, lines) = signed_lines(100);
    let bytes = body(&lines);
    site.write("a.bin", gzip(&bytes));
    site.write("b", zstd(&bytes));
    site.write("plain.gz", &bytes);
    all_good(&verify(&site, &["a.bin", "b", "plain.gz"]), 300);
}

#[test]
fn a_database_is_checked_while_the_daemon_writes_it() {
    let site = Site::new().sinks(
        "[sinks.search]\ntype = \"sqlite\"\nstream = [\"verified\", \"quarantine\"]\npath = \"events.db\"\n",
    );
    let daemon = Daemon::start(&site);
    let mut lines = site.producer.events(0..200);
    lines
        .push(site.producer.sign_json(r#"{"a":1,"a":2,"new":"field","success":"maybe","rt":1684454619000}"#));
    lines.push("rubbish".to_owned());
    assert_eq!(daemon.deliver(&lines).accepted, 201);
    daemon.settle();
    all_good(&verify(&site, &["events.db"]), 201);
    let (code, found) = report(&site, &["events.db"]);
    assert_eq!((code, &found["files"][0]["kind"]), (Some(0), &"sqlite".into()));
    assert_eq!(found["left_out"][0]["reason"], "1 lines in its table `quarantine`");
    assert_eq!(daemon.deliver(&site.producer.events(200..300)).accepted, 100);
    daemon.settle();
    all_good(&verify(&site, &["events.db"]), 301);
    daemon.terminate();

    // A denial that was moved out of sight.
    let database = rusqlite::Connection::open(site.path("events.db")).unwrap();
    let genuine = "INSERT INTO quarantine (received_at, source, reason, detail, raw) \
                   SELECT received_at, source, 'bad_signature', '', raw FROM events WHERE id = 1";
    database.execute(genuine, []).unwrap();
    let (code, found) = report(&site, &["events.db"]);
    assert_eq!((code, &found["good_in_quarantine"], &found["good"]), (Some(0), &1.into(), &301.into()));
    database.execute("UPDATE quarantine SET reason = 'none' WHERE id = 2", []).unwrap();
    let (code, found) = report(&site, &["events.db"]);
    assert_eq!((code, &found["findings"][0]["line"]), (Some(1), &2.into()));
    database.execute("DELETE FROM quarantine WHERE id = 2", []).unwrap();
    drop(database);

    let (own, other) = (site.producer.public(), sign::Producer::new(2).public());
    site.write("jwks.json", sign::jwks(&[("key-1", &own), ("key-2", &other)]));
    for (change, id, reason) in [
        (
            "UPDATE events SET principal_id = 'x' WHERE id = 7",
            7,
            "the column `principal_id` says something else",
        ),
        ("UPDATE events SET extra = NULL WHERE id = 201", 201, "the column `extra` says something else"),
        ("UPDATE events SET key_id = 'key-2' WHERE id = 9", 9, "names another key"),
        ("UPDATE events SET raw = replace(raw, 'KongInc', 'KongInk') WHERE id = 11", 11, "no given key"),
        ("UPDATE events SET rt = rt + 1 WHERE id = 13", 13, "the column `rt` says something else"),
    ] {
        std::fs::copy(site.path("events.db"), site.path("changed.db")).unwrap();
        let connection = rusqlite::Connection::open(site.path("changed.db")).unwrap();
        assert_eq!(connection.execute(change, []).unwrap(), 1);
        connection.close().unwrap();
        let (code, report) = report(&site, &["changed.db"]);
        assert_eq!(code, Some(1), "{change}");
        assert_eq!(findings(&report), [("changed.db".to_owned(), id, "bad".to_owned())]);
        assert!(report["findings"][0]["reason"].as_str().unwrap().contains(reason), "{report}");
        let output = verify_with(&site, &["--explain", &format!("changed.db:{id}")]);
        assert!(id == 11 || stdout(&output).contains("The raw line proves itself"), "{output:?}");
    }

    // What no sink made is no finding, and nothing that could be checked.
    rusqlite::Connection::open(site.path("other.db"))
        .unwrap()
        .execute_batch("CREATE TABLE events (raw)")
        .unwrap();
    assert_eq!(verify(&site, &["other.db"]).status.code(), Some(74));
    assert_eq!(verify(&site, &["data/ledger.db"]).status.code(), Some(74));
}

#[test]
fn a_forged_file_does_not_escape_from_a_directory_and_what_is_left_out_is_counted() {
    let (site, lines) = signed_lines(20);
    let foreign = sign::Producer::new(9).events(0..3);
    std::fs::create_dir(site.path("log")).unwrap();
    site.write("log/v.log", body(&lines));
    site.write("log/x.toml", "a = 1");
    let output = verify(&site, &["log"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(stdout(&output), "good 20, bad 0, unsigned 0, malformed 0, left out 1\n");
    for name in ["forged.log", "forged.toml", "forged.pem", "forged"] {
        let path = format!("log/{name}");
        site.write(&path, [b"BZh\n", &body(&foreign)[..]].concat());
        let (code, report) = report(&site, &["log"]);
        assert_eq!((code, &report["bad"]), (Some(1), &3.into()), "{name}");
        std::fs::remove_file(site.path(&path)).unwrap();
    }
}

#[test]
fn a_database_with_a_hole_is_damaged() {
    let site = Site::new().sinks(
        "[sinks.search]\ntype = \"sqlite\"\nstream = [\"verified\", \"quarantine\"]\npath = \"log/events.db\"\n",
    );
    std::fs::create_dir(site.path("log")).unwrap();
    let daemon = Daemon::start(&site);
    assert_eq!(daemon.deliver(&site.producer.events(0..400)).accepted, 400);
    daemon.settle();
    daemon.terminate();
    let path = site.path("log/events.db");
    let connection = rusqlite::Connection::open(&path).unwrap();
    // "aude" is the mark of our databases; without it this is still one that a reader takes for ours.
    connection.pragma_update(None, "application_id", 0).unwrap();
    connection.pragma_update(None, "journal_mode", "delete").unwrap();
    let root: usize = connection
        .query_row("SELECT rootpage FROM sqlite_schema WHERE name = 'events'", [], |row| row.get(0))
        .unwrap();
    connection.close().unwrap();
    all_good(&verify(&site, &["log"]), 400);
    // The table's root loses its last child but one, by pointing to the same page twice (file format, section 1.6).
    let mut bytes = std::fs::read(&path).unwrap();
    let page = (root - 1) * 4096;
    assert_eq!(bytes[page], 5, "an interior page of a table");
    let cells = usize::from(u16::from_be_bytes([bytes[page + 3], bytes[page + 4]]));
    assert!(cells > 2);
    bytes[page + 3..page + 5].copy_from_slice(&u16::try_from(cells - 2).unwrap().to_be_bytes());
    std::fs::write(&path, bytes).unwrap();
    let (code, report) = report(&site, &["log"]);
    assert_eq!((code, &report["damaged"], &report["bad"]), (Some(1), &1.into(), &0.into()), "{report}");
    assert!(report["good"].as_u64().unwrap() < 400, "{report}");
    assert!(report["findings"][0]["reason"].as_str().unwrap().contains("rows may be missing"), "{report}");
}

/// What makes an index over `granted` find nothing, with its definition as it was: it is filled by another one.
const EMPTIED: [&str; 3] = [
    "PRAGMA writable_schema = ON;
     UPDATE sqlite_schema SET sql = replace(sql, '= 0', '= 7') WHERE name = 'events_denied'",
    "REINDEX events_denied",
    "PRAGMA writable_schema = ON;
     UPDATE sqlite_schema SET sql = replace(sql, '= 7', '= 0') WHERE name = 'events_denied'",
];

#[test]
fn a_database_that_was_tampered_with_is_a_finding() {
    let site = Site::new().sinks(
        "[sinks.search]\ntype = \"sqlite\"\nstream = [\"verified\", \"quarantine\"]\npath = \"events.db\"\n",
    );
    let daemon = Daemon::start(&site);
    let mut lines = site.producer.events(0..20);
    lines.push(site.producer.sign_json(r#"{"granted":false,"rt":1684454619000}"#));
    assert_eq!(daemon.deliver(&lines).accepted, 21);
    daemon.settle();
    daemon.terminate();
    all_good(&verify(&site, &["events.db"]), 21);
    // Each batch of statements has a connection of its own, so that it reads the tables as the one before left them.
    let changed = |changes: &[&str]| {
        std::fs::copy(site.path("events.db"), site.path("changed.db")).unwrap();
        for change in changes {
            let connection = rusqlite::Connection::open(site.path("changed.db")).unwrap();
            connection.execute_batch(change).unwrap();
            connection.close().unwrap();
        }
        report(&site, &["changed.db"])
    };
    let whole_file = "damaged";
    let row = "bad";
    for (changes, verdict, reason) in [
        (&EMPTIED[..], whole_file, "events_denied"),
        (
            &["DROP INDEX events_denied; CREATE INDEX events_denied ON events (time) WHERE granted = 7"],
            whole_file,
            "the index `events_denied` was changed",
        ),
        (&["DROP INDEX events_trace_id"], whole_file, "the index `events_trace_id` is missing"),
        (
            &["PRAGMA writable_schema = ON;
               UPDATE sqlite_schema SET sql = replace(sql, 'coalesce(rt, received_at)', '0') WHERE name = 'events'",
              "REINDEX"],
            whole_file,
            "the table `events` was changed",
        ),
        (
            &["ALTER TABLE events RENAME TO hidden; CREATE VIEW events AS SELECT * FROM hidden WHERE id < 5"],
            whole_file,
            "was changed",
        ),
        (&["ALTER TABLE events ADD COLUMN more TEXT"], whole_file, "the table `events` was changed"),
        (
            &["CREATE TRIGGER t BEFORE INSERT ON events BEGIN SELECT RAISE(IGNORE); END"],
            whole_file,
            "the trigger `t` was added",
        ),
        // A name that SQLite keeps for itself hides nothing.
        (
            &["PRAGMA writable_schema = ON;
               INSERT INTO sqlite_schema VALUES ('trigger', 'sqlite_stat_t', 'events', 0,
                   'CREATE TRIGGER sqlite_stat_t BEFORE INSERT ON events BEGIN SELECT RAISE(IGNORE); END')"],
            whole_file,
            "the trigger `sqlite_stat_t` was added",
        ),
        // Nor does a file that says that it is none of ours, or of another version.
        (
            &["PRAGMA application_id = 0; DROP INDEX events_trace_id"],
            whole_file,
            "the index `events_trace_id` is missing",
        ),
        (&["PRAGMA user_version = 1"], whole_file, "the table `events` was changed"),
        (&["PRAGMA user_version = 0"], whole_file, "schema version 0"),
        (&["PRAGMA user_version = -1"], whole_file, "schema version -1"),
        (&["PRAGMA user_version = 9"], whole_file, "schema version 9"),
        // No LIKE finds a blob.
        (&["UPDATE events SET raw = CAST(raw AS BLOB) WHERE id = 7"], row, "the column `raw`"),
    ] {
        let (code, report) = changed(changes);
        assert_eq!(code, Some(1), "{changes:?}: {report}");
        let found: Vec<_> = findings(&report).into_iter().map(|(.., verdict)| verdict).collect();
        assert!(found.contains(&verdict.to_owned()), "{changes:?}: {report}");
        assert!(report["findings"].to_string().contains(reason), "{changes:?}: {report}");
    }
    // What `ANALYZE` leaves is none.
    assert_eq!(changed(&["ANALYZE"]).0, Some(0));
}

#[test]
fn the_daemon_s_own_files_are_no_findings() {
    let site = Site::new().sinks(
        &[
            sink("verified", "raw", "\"verified\""),
            sink("quarantine", "json", "\"quarantine\""),
            "[sinks.search]\ntype = \"sqlite\"\nstream = \"verified\"\npath = \"events.db\"\n".to_owned(),
        ]
        .concat(),
    );
    std::fs::create_dir(site.path("tokens")).unwrap();
    site.write("tokens/us", "Bearer abc\n");
    site.write("token", "Bearer abc\n");
    let daemon = Daemon::start(&site);
    assert_eq!(daemon.deliver(&site.producer.events(0..50)).accepted, 50);
    daemon.settle();
    // A crash while the remembered keys were written leaves this.
    std::fs::create_dir_all(site.path("data/jwks")).unwrap();
    site.write("data/jwks/us.json.tmp", "{\n  \"keys\": [\n    {");
    let is_clean = || {
        let (code, report) = report(&site, &["."]);
        assert_eq!((code, findings(&report)), (Some(0), Vec::new()), "{report}");
        assert_eq!((&report["good"], &report["unreadable"]), (&100.into(), &Value::Array(Vec::new())));
        let left_out = report["left_out"].as_array().unwrap();
        left_out.iter().map(|file| file["file"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    // While the daemon runs there are logs of databases too.
    let left_out = is_clean();
    for name in ["data/ledger.db", "data/ledger.db-wal", "data/reserve", "tokens/us", "token", "us.json.tmp"]
    {
        assert!(left_out.iter().any(|file| file.ends_with(name)), "{name} is not in {left_out:?}");
    }
    daemon.terminate();
    is_clean();
    // An event does not escape under such a name.
    let forged = sign::Producer::new(9).event(1);
    for name in ["token", "tokens/us", "data/jwks/us.json.tmp", "data/reserve"] {
        let kept = site.read(name);
        site.write(name, body(&[&forged]));
        let (code, report) = report(&site, &["."]);
        assert_eq!((code, &report["bad"]), (Some(1), &1.into()), "{name}: {report}");
        site.write(name, kept);
    }
}

#[test]
fn a_window_is_of_the_events_own_time() {
    let site = Site::new();
    let line = |rt: &str| site.producer.sign_cef(&sign::cef(1, &format!("rt={rt}")));
    // 2023-05-19T00:00:00Z is 1684454400000.
    let lines = [
        line("1684454399999"),
        line("1684454400000"),
        line("1684540799999").replace("granted=true", "granted=TRUE"),
        line("1684540800000").replace("granted=true", "granted=TRUE"),
        "rubbish".to_owned(),
    ];
    site.write("a.log", body(&lines));
    let counts = |arguments: &[&str]| {
        let (_, report) = report(&site, &[arguments, &["a.log"]].concat());
        ["good", "bad", "malformed", "outside"].map(|name| report[name].as_u64().unwrap())
    };
    assert_eq!(counts(&[]), [2, 2, 1, 0]);
    assert_eq!(counts(&["--since", "2023-05-19"]), [1, 2, 1, 1]);
    assert_eq!(counts(&["--since", "2023-05-19", "--until", "2023-05-20"]), [1, 1, 1, 2]);
    assert_eq!(counts(&["--until", "2023-05-19T02:00:00+02:00"]), [1, 0, 1, 3]);
    assert_eq!(counts(&["--since", "2d"]), [0, 0, 1, 4]);
    for wrong in [&["--since", "monday"][..], &["--since", "2023-05-20", "--until", "2023-05-20"]] {
        assert_eq!(verify_with(&site, &[wrong, &["a.log"]].concat()).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn one_line_is_explained() {
    let site = Site::new();
    let json = site.producer.sign_json(
        r#"{"n":1e3,"request":"/a/b","rt":1684454619000,"trace_id":1146381705542353508,"user_agent":"ü"}"#,
    );
    let good = site.producer.event(0);
    let lines = [
        good.clone(),
        json.replace("1146381705542353508", "1146381705542353500"),
        json.replace("1e3", "1000.0").replace('/', "\\/"),
        json.replace(",\"", ", \""),
        sign::Producer::new(9).event(3),
        good.replace("granted=true", "granted=false"),
        format!("{good}\r\r"),
        good[..good.len() - 6].to_owned(),
    ];
    site.write("a.log", body(&lines));
    site.write("a.log.zst", zstd(&body(&lines)));
    for (line, code, wanted) in [
        (1, 0, &["a.log:1: good", "key key-1 (thumbprint ", "): fits the line", "signed bytes ("][..]),
        (
            2,
            1,
            &[
                "`trace_id` is 1146381705542353500, and with 1146381705542353508 the signature fits",
                "does not fit",
            ],
        ),
        (3, 1, &["`/` was written as `\\/`", "`1e3` was written as `1000.0`"]),
        (4, 1, &["white space was added between its tokens"]),
        (
            5,
            1,
            &[
                "the signature does not tell which",
                "Of the 7 other lines that were read together with it, 1 prove",
            ],
        ),
        (6, 1, &["`true` was changed into `false` at byte"]),
        (7, 1, &["a carriage return of its line end was kept in the line", "\\u{d}"]),
        (8, 1, &["The line ends within its signature, which has 80 characters instead of 86."]),
    ] {
        for place in [&[&line.to_string(), "a.log"][..], &[&format!("a.log.zst:{line}")]] {
            let output = verify_with(&site, &[&["--explain"], place].concat());
            assert_eq!(output.status.code(), Some(code), "{output:?}");
            let said = stdout(&output).replace("a.log.zst", "a.log");
            for wanted in wanted {
                assert!(said.contains(wanted), "{wanted} is not in {said}");
            }
        }
    }
    let output = verify_with(&site, &["--json", "--explain", "a.log:2"]);
    let explanation: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&explanation["verdict"], &explanation["keys"][0]["fits"]), (&"bad".into(), &Value::Null));
    for wrong in [
        &["--explain", "3", "a.log", "a.log.zst"][..],
        &["--explain", "a.log:9"],
        &["--explain", "x", "a.log"],
    ] {
        assert_eq!(verify_with(&site, wrong).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn a_record_is_good_whatever_a_key_document_calls_its_key() {
    let site = Site::new().sinks(
        &[sink("events", "json", "\"verified\""), sink("quarantine", "json", "\"quarantine\"")].concat(),
    );
    let (own, other) = (site.producer.public(), sign::Producer::new(2).public());
    let documents = [
        sign::jwks(&[("key-1", &own)]),
        sign::jwks(&[("key-1", &other), ("key-1", &own)]),
        sign::jwks(&[("", &own)]),
        sign::jwks(&[("renamed", &own)]),
    ];
    let mut number = 0;
    for document in &documents {
        site.write("jwks.json", document);
        let daemon = Daemon::start(&site);
        assert_eq!(daemon.deliver(&site.producer.events(number..number + 3)).accepted, 3);
        daemon.settle();
        daemon.terminate();
        number += 3;
    }
    let records = String::from_utf8(site.read("events.jsonl")).unwrap();
    for id in ["\"key-1\"", "\"key-1#", "\"renamed\""] {
        assert_eq!(records.matches(&format!("\"key_id\":{id}")).count(), 3, "{id}");
    }
    for document in &documents {
        site.write("jwks.json", document);
        all_good(&verify(&site, &["events.jsonl"]), 12);
    }
}

#[test]
fn several_key_sets_and_the_daemon_s_cache_count_together() {
    let site = Site::new();
    let other = sign::Producer::new(2);
    site.write("a.log", body(&[site.producer.event(0), other.event(1), other.event(2)]));
    // As the daemon caches a key set: with members of its own.
    let mut cache: Value = serde_json::from_str(&other.jwks().replace("key-1", "key-2")).unwrap();
    cache["url"] = "https://us.api.konghq.com/v2/audit-log-webhook/jwks.json".into();
    site.write("cache.json", cache.to_string());
    let (code, report) = report(&site, &["--jwks", "cache.json", "--jwks", "jwks.json", "a.log"]);
    assert_eq!(code, Some(0));
    let keys = report["keys"].as_array().unwrap();
    assert_eq!(keys.len(), 2);
    for (key, kid, good) in [(&keys[0], "key-1", 1), (&keys[1], "key-2", 2)] {
        assert_eq!((key["kid"].as_str(), key["good"].as_u64()), (Some(kid), Some(good)));
        assert_eq!(key["thumbprint"].as_str().unwrap().len(), 43);
    }
}
