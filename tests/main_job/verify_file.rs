//! `auditgate verify`: anyone with the keys can verify delivered events again, offline.

use std::io::Write as _;
use std::path::Path;
use std::process::{Output, Stdio};

use serde_json::{Value, json};

use crate::harness::daemon::Daemon;
use crate::harness::programs::auditgate;
use crate::harness::site::{Site, raw_and_json_sinks, raw_sinks, sink, sqlite_sink};
use crate::harness::verify::{assert_all_good, findings, report, stdout, verify, verify_with};
use crate::harness::{body, gzip, sign, zstd};

/// Checks that the output names a line of a file.
#[track_caller]
fn assert_found_at(output: &Output, site: &Site, file: &str, line: usize) {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let place = format!("{}:{line}:", site.path(file).display());
    let said = stdout(output) + &String::from_utf8_lossy(&output.stderr);
    assert!(said.contains(&place), "{place} is not in: {said}");
}

/// Returns a site whose daemon has delivered 300 events.
fn delivered() -> Site {
    let site = Site::new().sinks(&raw_and_json_sinks());
    let daemon = Daemon::start(&site);
    let mut lines = site.producer.events(0..300);
    lines.push(sign::cef(300, "rt=1684454619000"));
    assert_eq!(daemon.deliver(&lines).accepted, 300);
    daemon.settle();
    daemon.terminate();
    site
}

#[test]
fn delivered_files_verify_plain_and_compressed() {
    let site = delivered();
    for name in ["verified.log", "events.jsonl"] {
        let bytes = site.read(name);
        site.write(&format!("{name}.gz"), gzip(&bytes));
        site.write(&format!("{name}.zst"), zstd(&bytes));
        for extension in ["", ".gz", ".zst"] {
            assert_all_good(&verify(&site, &[&format!("{name}{extension}")]), 300);
        }
    }
    assert_all_good(&verify(&site, &["verified.log", "events.jsonl.gz", "verified.log.zst"]), 900);

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
    assert_all_good(&child.wait_with_output().unwrap(), 300);
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
            assert_found_at(&output, &site, file, line);
            assert!(stdout(&output).ends_with("good 599, bad 1, unsigned 0, malformed 0\n"), "{output:?}");
        }
    }

    // In a record: the raw line, and a field of the event.
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
        assert_found_at(&verify(&site, &["changed.jsonl"]), &site, "changed.jsonl", line);
    }
}

#[test]
fn lines_that_do_not_verify_are_counted_by_class() {
    let site = delivered();
    let unsigned = sign::cef(1, "rt=1");
    let by_unknown_key = sign::Producer::new(2).event(1);
    site.write("mixed.log", body(&[&site.producer.event(1), &unsigned, &by_unknown_key, "not an event"]));
    let output = verify(&site, &["mixed.log"]);
    assert_found_at(&output, &site, "mixed.log", 2);
    assert_found_at(&output, &site, "mixed.log", 3);
    assert_found_at(&output, &site, "mixed.log", 4);
    assert!(stdout(&output).ends_with("good 1, bad 1, unsigned 1, malformed 1\n"), "{output:?}");

    // The quarantine holds a line that does not verify.
    assert_eq!(verify(&site, &["quarantine.jsonl"]).status.code(), Some(1));
    assert_eq!(verify(&site, &["not-there.log"]).status.code(), Some(74));
    let no_keys =
        auditgate().args(["verify", "--jwks"]).arg(Path::new("/not/there")).arg("-").output().unwrap();
    assert_eq!(no_keys.status.code(), Some(78), "{no_keys:?}");
}

/// Returns a site without a daemon, and that many distinct signed lines.
fn signed_lines(count: u64) -> (Site, Vec<String>) {
    let site = Site::new();
    let lines = site.producer.events(0..count);
    (site, lines)
}

#[test]
fn twenty_planted_faults_in_rotated_files_are_found_each_by_file_and_line() {
    let (site, lines) = signed_lines(12_000);
    std::fs::create_dir_all(site.path("log/deep")).unwrap();
    // Five files in the order of their time, which is not that of their names. The ending says how
    // each is compressed.
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
        // Two members or two frames, split within a line.
        let (head, tail) = bytes.split_at(bytes.len() / 2);
        let compressed = match name.rsplit_once('.').unwrap().1 {
            "zst" => [zstd(head), zstd(tail)].concat(),
            "gz" => [gzip(head), gzip(tail)].concat(),
            _ => bytes,
        };
        site.write(name, compressed);
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

    // The report as text names the same lines.
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
fn a_truncated_or_damaged_file_is_a_finding_and_the_lines_before_it_count() {
    let (site, lines) = signed_lines(3_000);
    let bytes = body(&lines);
    for (name, compressed) in [("cut.log.gz", gzip(&bytes)), ("cut.log.zst", zstd(&bytes))] {
        site.write(name, &compressed[..compressed.len() * 2 / 3]);
        let (code, report) = report(&site, &[name]);
        assert_eq!(code, Some(1), "{report}");
        let good = report["good"].as_u64().unwrap();
        assert!(good > 500, "{report}");
        assert_eq!(findings(&report), [(name.to_owned(), good + 1, "damaged".to_owned())]);

        let mut damaged = compressed;
        let middle = damaged.len() / 2;
        damaged[middle..middle + 40].fill(0xa5);
        site.write(name, damaged);
        let output = verify_with(&site, &[name]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(stdout(&output).contains("damaged 1\n"), "{output:?}");
    }
    // No byte of a frame is left, or other bytes are in its place.
    for bytes in [&b""[..], b"\0\0\0\0\0\0"] {
        site.write("empty.log.zst", bytes);
        let (code, report) = report(&site, &["empty.log.zst"]);
        assert_eq!((code, findings(&report).len()), (Some(1), 1), "{report}");
    }

    // A torn last line; a whole one without its line end verifies.
    site.write("torn.log", &bytes[..bytes.len() - 20]);
    let (code, torn) = report(&site, &["torn.log"]);
    assert_eq!((code, torn["good"].as_u64()), (Some(1), Some(2999)));
    assert_eq!(findings(&torn), [("torn.log".to_owned(), 3000, "torn".to_owned())]);
    site.write("whole.log", &bytes[..bytes.len() - 1]);
    assert_all_good(&verify(&site, &["whole.log"]), 3000);

    // A directory without a line to check is an error.
    std::fs::create_dir(site.path("empty")).unwrap();
    assert_eq!(verify(&site, &["empty"]).status.code(), Some(2));

    // A file that cannot be opened is reported, and the others are checked.
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
fn compression_is_recognised_by_content_whatever_the_name() {
    let (site, lines) = signed_lines(100);
    let bytes = body(&lines);
    site.write("a.bin", gzip(&bytes));
    site.write("b", zstd(&bytes));
    site.write("plain.gz", &bytes);
    assert_all_good(&verify(&site, &["a.bin", "b", "plain.gz"]), 300);
}

#[test]
fn forged_files_in_a_directory_are_found_and_skipped_files_are_counted() {
    let (site, lines) = signed_lines(20);
    let forged = sign::Producer::new(9).events(0..3);
    std::fs::create_dir(site.path("log")).unwrap();
    site.write("log/v.log", body(&lines));
    site.write("log/x.toml", "a = 1");
    let output = verify(&site, &["log"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(stdout(&output), "good 20, bad 0, unsigned 0, malformed 0, left out 1\n");
    for name in ["forged.log", "forged.toml", "forged.pem", "forged"] {
        let path = format!("log/{name}");
        site.write(&path, [b"BZh\n", &body(&forged)[..]].concat());
        let (code, report) = report(&site, &["log"]);
        assert_eq!((code, &report["bad"]), (Some(1), &3.into()), "{name}");
        std::fs::remove_file(site.path(&path)).unwrap();
    }
}

#[test]
fn the_daemons_own_files_are_no_findings() {
    let site = Site::new().sinks(&(raw_sinks() + &sqlite_sink("events.db", "\"verified\"")));
    std::fs::create_dir(site.path("tokens")).unwrap();
    site.write("tokens/us", "Bearer abc\n");
    site.write("token", "Bearer abc\n");
    let daemon = Daemon::start(&site);
    assert_eq!(daemon.deliver(&site.producer.events(0..50)).accepted, 50);
    daemon.settle();
    // A crash while the key cache is written leaves this.
    std::fs::create_dir_all(site.path("data/jwks")).unwrap();
    site.write("data/jwks/us.json.tmp", "{\n  \"keys\": [\n    {");
    let is_clean = || {
        let (code, report) = report(&site, &["."]);
        assert_eq!((code, findings(&report)), (Some(0), Vec::new()), "{report}");
        assert_eq!((&report["good"], &report["unreadable"]), (&100.into(), &Value::Array(Vec::new())));
        let left_out = report["left_out"].as_array().unwrap();
        left_out.iter().map(|file| file["file"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    // While the daemon runs, the databases have write-ahead logs too.
    let left_out = is_clean();
    for name in ["data/ledger.db", "data/ledger.db-wal", "data/reserve", "tokens/us", "token", "us.json.tmp"]
    {
        assert!(left_out.iter().any(|file| file.ends_with(name)), "{name} is not in {left_out:?}");
    }
    daemon.terminate();
    is_clean();
    // A forged event in a file of such a name is found.
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
fn a_window_selects_by_the_time_of_the_events() {
    let site = Site::new();
    let line = |rt: &str| site.producer.sign_cef(&sign::cef(1, &format!("rt={rt}")));
    // 2023-05-19T00:00:00Z is 1684454400000.
    let lines = [
        line("1684454399999"),
        line("1684454400000"),
        line("1684540799999").replace("granted=true", "granted=TRUE"),
        line("1684540800000").replace("granted=true", "granted=TRUE"),
        "not an event".to_owned(),
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
fn a_record_is_good_whatever_name_a_key_set_gives_its_key() {
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
        assert_all_good(&verify(&site, &["events.jsonl"]), 12);
    }
}

#[test]
fn several_key_sets_and_the_daemons_cache_are_combined() {
    let site = Site::new();
    let other = sign::Producer::new(2);
    site.write("a.log", body(&[site.producer.event(0), other.event(1), other.event(2)]));
    // The daemon's cache of a key set has further members.
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
