//! Tests of sinks.

use super::*;
use crate::deliver::file::{Compression, Period, Rendering, Rotation, Syncing};
use crate::net::Framing;

#[test]
fn every_stream_has_a_sink() {
    refused(
        "stream = \"quarantine\"",
        "stream = \"verified\"",
        "5: no sink takes the stream `quarantine` of source `us`: a 200 would lose lines; add",
    );
    let unsigned = GOOD.replace("[sinks.good]", "signatures = \"accept-unsigned\"\n[sinks.good]");
    assert!(problems(&unsigned)[0].starts_with("9: no sink takes the stream `unverified`"));
    let off = GOOD.replace("[sinks.good]", "signatures = \"off\"\n[sinks.good]");
    assert!(problems(&off)[0].starts_with("9: no sink takes the stream `unverified`"));
    let off = off.replace("format = \"raw\"", "format = \"raw\"\nstream = \"unverified\"");
    assert_eq!(config(&off).sinks["good"].streams, [Stream::Unverified]);

    let other = "[sources.eu]\npath = \"/eu\"\nauthorization = { value = \"x\" }\njwks = { file = \"j\" }\n";
    let limited = GOOD.replace("format = \"raw\"", "format = \"raw\"\nsources = [\"us\"]") + other;
    let found = problems(&limited);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(found[0].starts_with("19: no sink takes the stream `verified` of source `eu`"), "{found:#?}");
}

#[test]
fn a_sink_that_is_wrong_does_not_make_its_stream_untaken() {
    refused("path = \"bad.jsonl\"", "path = \"\"", "15: `path` in [sinks.bad]: not a path; write");
}

#[test]
fn sinks_name_known_sources_and_streams_once() {
    refused(
        "format = \"raw\"",
        "format = \"raw\"\nsources = [\"su\", \"us\"]",
        "13: `sources` names the unknown source `su`; ",
    );
    refused(
        "format = \"raw\"",
        "format = \"raw\"\nsources = []",
        "13: `sources` in [sinks.good]: the array is empty; list",
    );
    refused("\"quarantine\"", "[]", "17: `stream` in [sinks.bad]: the array is empty; list");
    refused("\"quarantine\"", "[\"quarantine\", \"quarantine\"]", "17: `stream` names `quarantine` twice");
}

/// GOOD with a syslog sink at its end, whose `type` is on line 19.
fn with_syslog(lines: &str) -> String {
    format!("{GOOD}[sinks.siem]\ntype = \"syslog\"\n{lines}\n")
}

#[test]
fn a_syslog_sink_has_defaults_that_fit_its_address() {
    for (address, shown, framing, max_size) in [
        ("udp://siem", "udp://siem:514", None, 2048),
        ("tcp://siem:601", "tcp://siem:601", Some(Framing::OctetCounting), 65_536),
        ("tls://siem", "tls://siem:6514", Some(Framing::OctetCounting), 65_536),
        ("unix:///dev/log", "unix:///dev/log", Some(Framing::Newline), 8192),
    ] {
        let config = config(&with_syslog(&format!("address = \"{address}\"")));
        let SinkKind::Syslog(options) = &config.sinks["siem"].kind else { panic!("{config:?}") };
        assert_eq!((options.address.to_string().as_str(), options.framing), (shown, framing));
        assert_eq!((&options.ca, &options.cert, &options.key), (&None, &None, &None));
        assert_eq!((options.facility.code(), options.app_name.as_str()), (16, "auditgate"));
        assert_eq!((options.structured_data, options.max_size), (false, Some(max_size)));
    }
    let config = config(&with_syslog(
        "address = \"tls://[::1]:7\"\nca = \"ca.pem\"\ncert = \"c.pem\"\nkey = \"/k.pem\"\n\
         framing = \"newline\"\nfacility = \"authpriv\"\napp_name = \"gate-1\"\n\
         structured_data = true\nmax_size = \"1MiB\"\nstream = [\"verified\", \"quarantine\"]",
    ));
    let SinkKind::Syslog(options) = &config.sinks["siem"].kind else { panic!("{config:?}") };
    let paths =
        [&options.ca, &options.cert, &options.key].map(|path| path.as_ref().unwrap().to_str().unwrap());
    assert_eq!(paths, ["/nonexistent/base/ca.pem", "/nonexistent/base/c.pem", "/k.pem"]);
    assert_eq!((options.framing, options.max_size), (Some(Framing::Newline), Some(1 << 20)));
    assert_eq!((options.facility.code(), &*options.app_name, options.structured_data), (10, "gate-1", true));
}

#[test]
fn a_syslog_sink_s_keys_fit_its_address() {
    #[track_caller]
    fn refused(lines: &str, expected: &str) {
        let found = problems(&with_syslog(lines));
        assert_eq!(found.len(), 1, "{found:#?}");
        assert!(found[0].starts_with(expected), "{found:#?}");
    }
    refused("", "18: missing key `address` in [sinks.siem]; add address = \"tls://");
    refused("address = \"siem:514\"", "20: `address` in [sinks.siem]: `siem:514` does not begin with udp://");
    refused(
        "address = \"tcp://siem\"",
        "20: `address` in [sinks.siem]: `tcp://siem` has no port, and plain TCP has no usual one; add",
    );
    refused(
        "address = \"unix://dev/log\"",
        "20: `address` in [sinks.siem]: `unix://dev/log` has no absolute path; write it with three",
    );
    let udp = "address = \"udp://siem\"\n";
    let tcp = "address = \"tcp://siem:1\"\n";
    let tls = "address = \"tls://siem\"\n";
    for key in ["ca", "cert", "key"] {
        let found = problems(&with_syslog(&format!("{tcp}{key} = \"x\"")));
        let expected = format!("21: `{key}` with the address tcp://siem:1; `{key}` is for tls:// only");
        assert!(found[0].starts_with(&expected), "{found:#?}");
    }
    refused(&format!("{udp}framing = \"newline\""), "21: `framing` with the address udp://siem:514");
    refused(&format!("{tls}cert = \"x\""), "21: only one of `cert` and `key`; a client");
    refused(&format!("{tls}key = \"x\""), "21: only one of `cert` and `key`");
    refused(
        &format!("{tcp}framing = \"lf\""),
        "21: unknown word `lf` for `framing` in [sinks.siem]; known words: octet",
    );
    refused(
        &format!("{tcp}facility = \"local8\""),
        "21: unknown word `local8` for `facility` in [sinks.siem]; did you",
    );
    refused(
        &format!("{tcp}app_name = \"a b\""),
        "21: `app_name` in [sinks.siem]: it cannot stand in a syslog header; use 1",
    );
    refused(&format!("{tcp}max_size = 479"), "21: `max_size` cannot be 479B with the address tcp://");
    refused(&format!("{udp}max_size = \"64KiB\""), "21: `max_size` cannot be 65536B with the address udp");
    refused(&format!("{tcp}max_size = \"17MiB\""), "21: `max_size` cannot be 17825792B");
}

#[test]
fn every_sink_holds_or_skips() {
    let with = |word: &str| format!("format = \"raw\"\nwhen_full = \"{word}\"");
    assert_eq!(config(GOOD).sinks["good"].when_full, WhenFull::Hold);
    assert_eq!(accepted("format = \"raw\"", &with("hold")).sinks["good"].when_full, WhenFull::Hold);
    assert_eq!(accepted("format = \"raw\"", &with("skip")).sinks["good"].when_full, WhenFull::Skip);
    let syslog = with_syslog("address = \"udp://siem\"\nwhen_full = \"skip\"");
    assert_eq!(config(&syslog).sinks["siem"].when_full, WhenFull::Skip);
    let sqlite = GOOD.replace("\"file\"\npath = \"good.log\"", "\"sqlite\"\npath = \"good.db\"");
    let sqlite = sqlite.replace("format = \"raw\"", "when_full = \"skip\"");
    assert_eq!(config(&sqlite).sinks["good"].when_full, WhenFull::Skip);
    refused(
        "format = \"raw\"",
        &with("drop"),
        "13: unknown word `drop` for `when_full` in [sinks.good]; known words: hold, skip",
    );
}

#[test]
fn a_file_is_rotated_and_synced_as_asked() {
    let with = |more: &str| format!("format = \"raw\"\n{more}");
    let options = |more: &str| {
        let config = accepted("format = \"raw\"", &with(more));
        let SinkKind::File(options) = &config.sinks["good"].kind else { panic!("of type file") };
        options.clone()
    };
    let default = FileOptions {
        path: "/nonexistent/base/good.log".into(),
        format: Rendering::Raw,
        rotate: Some(Rotation::default()),
        fsync: Syncing::Batch,
        fsync_interval: None,
        mode: 0o640,
        owner: None,
    };
    assert_eq!(options(""), default);
    let rotate = Some(Rotation {
        size: Some(256 << 20),
        every: Some(Period::Daily),
        keep: Some(14),
        compress: Some(Compression::Zstd),
    });
    let written = "rotate = { size = \"256MiB\", every = \"daily\", keep = 14, compress = \"zstd\" }\nfsync = \"interval\"\nmode = \"0600\"\nowner = \"audit:adm\"";
    let fsync_interval = Some(Duration::from_secs(1));
    let expected = FileOptions {
        rotate,
        fsync: Syncing::Interval,
        fsync_interval,
        mode: 0o600,
        owner: Some("audit:adm".to_owned()),
        ..default
    };
    assert_eq!(options(written), expected);
    for (more, problem) in [
        ("rotate = { every = \"weekly\" }", "13: unknown word `weekly` for `rotate.every` in [sinks.good]"),
        ("rotate = { keep = 0 }", "13: `rotate.keep` in [sinks.good]: 0 is out of range"),
        ("rotate = { size = \"0B\" }", "13: `rotate.size` in [sinks.good]: `0B` is not a size"),
        ("fsync_interval = \"1s\"", "13: `fsync_interval` without"),
        ("mode = \"0888\"", "13: `mode` in [sinks.good]: `0888` is not a file mode"),
        ("mode = \"0040\"", "13: `mode` in [sinks.good]: `0040` is not a file mode"),
        ("owner = \":\"", "13: `owner` in [sinks.good]: `:` is not an owner"),
        ("owner = \"a:b:c\"", "13: `owner` in [sinks.good]: `a:b:c` is not an owner"),
    ] {
        refused("format = \"raw\"", &with(more), problem);
    }
}

#[test]
fn a_file_of_nothing_but_quarantined_lines_is_bounded_by_default() {
    let rotation = |text: &str, sink: &str| {
        let SinkKind::File(options) = config(text).sinks[sink].kind.clone() else { panic!("of type file") };
        options.rotate.unwrap()
    };
    let bounded = Rotation { size: Some(64 << 20), keep: Some(16), ..Rotation::default() };
    assert_eq!(rotation(GOOD, "bad"), bounded);
    let shown = config(GOOD).to_toml().unwrap();
    assert_eq!(shown.matches("keep = 16").count(), 1, "{shown}");
    assert!(shown.contains("size = \"64MiB\""), "{shown}");
    // Whatever else a sink takes must not be removed for the sake of quarantined lines.
    for streams in ["\"verified\"", "[\"quarantine\", \"verified\"]", "[\"unverified\", \"quarantine\"]"] {
        let text = GOOD.replace("[sinks.bad]", &format!("[sinks.more]\ntype = \"file\"\npath = \"more.jsonl\"\nformat = \"json\"\nstream = {streams}\n[sinks.bad]"));
        assert_eq!(rotation(&text, "more"), Rotation::default(), "{streams}");
    }
    // What is written wins, also that the file is never rotated.
    for (written, wanted) in [
        ("rotate = {}", Rotation::default()),
        ("rotate = { every = \"daily\" }", Rotation { every: Some(Period::Daily), ..Rotation::default() }),
    ] {
        let text = GOOD.replace("format = \"json\"", &format!("format = \"json\"\n{written}"));
        assert_eq!(rotation(&text, "bad"), wanted);
    }
}

#[test]
fn raw_is_for_one_stream() {
    let text = GOOD.replace("format = \"json\"", "format = \"raw\"");
    assert_eq!(config(&text).sinks["bad"].streams, [Stream::Quarantine]);
    let text = text.replace("\"quarantine\"", "[\"quarantine\", \"verified\"]");
    assert!(problems(&text)[0].starts_with("17: format = \"raw\" with several streams in [sinks.bad]"));
}

#[test]
fn two_sinks_never_share_a_file() {
    for path in ["good.log", "./good.log", "x/../good.log", "/nonexistent/base//good.log"] {
        refused("bad.jsonl", path, "11: the sinks `bad` and `good` write to one file, ");
    }
    refused("bad.jsonl", "bad/", "15: `path` in [sinks.bad]: a directory, not a file");
    refused("bad.jsonl", "..", "15: `path` in [sinks.bad]: a directory, not a file");
}

#[test]
fn a_database_has_its_files_to_itself() {
    let sqlite = "type = \"sqlite\"\npath = \"good.db\"\nretain = \"90d\"";
    let good = GOOD.replace("type = \"file\"\npath = \"good.log\"\nformat = \"raw\"", sqlite);
    let kind = config(&good).sinks["good"].kind.clone();
    assert!(
        matches!(&kind, SinkKind::Sqlite(SqliteOptions { path, retain: Some(retain) })
            if path == Path::new("/nonexistent/base/good.db") && retain.as_secs() == 90 * 86_400),
        "{kind:?}"
    );
    let kind = config(&good.replace("retain = \"90d\"\n", "")).sinks["good"].kind.clone();
    assert!(matches!(kind, SinkKind::Sqlite(SqliteOptions { retain: None, .. })));
    for (from, to, expected) in [
        ("90d", "0d", "12: `retain` in [sinks.good]: `0d` is not a time; "),
        ("path = \"good.db\"\n", "", "9: missing key `path` in [sinks.good]; "),
        ("good.db", "good.db/", "11: `path` in [sinks.good]: a directory, not a file; "),
        ("bad.jsonl", "x/../good.db", "11: the sinks `bad` and `good` write to one file, "),
        ("bad.jsonl", "good.db-wal", "11: the sinks `bad` and `good` write to one file, "),
        ("good.db", "data/ledger.db", "11: the sink `good` writes to the ledger's own `"),
        ("bad.jsonl", "data/ledger.db-shm", "15: the sink `bad` writes to the ledger's own `"),
        ("bad.jsonl", "data/lock", "15: the sink `bad` writes to the ledger's own `"),
    ] {
        assert!(good.contains(from), "{from}");
        let found = problems(&good.replacen(from, to, 1));
        assert_eq!(found.len(), 1, "{found:#?}");
        assert!(found[0].starts_with(expected), "{found:#?}");
    }
}

#[test]
fn a_shared_file_is_found_through_links() {
    use std::os::unix::fs::symlink;

    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let text = GOOD.replace("good.log", &root.join("a").display().to_string());
    let shared = |other: &str| {
        let text = text.replace("bad.jsonl", &root.join(other).display().to_string());
        if read_text(&text, Secrets::Require).is_ok() {
            return false;
        }
        let found = problems(&text);
        assert_eq!(found.len(), 1, "{found:#?}");
        let expected = "11: the sinks `bad` and `good` write to one file, ";
        assert!(found[0].starts_with(expected), "{found:#?}");
        true
    };
    std::fs::create_dir(root.join("real")).unwrap();
    symlink("real", root.join("link")).unwrap();
    symlink("real/a", root.join("a")).unwrap();
    symlink("missing", root.join("nowhere")).unwrap();
    symlink("circle", root.join("circle")).unwrap();
    for exists in [false, true] {
        assert_eq!(root.join("real/a").exists(), exists);
        assert!(shared("real/a") && shared("link/a") && shared("link/../link/a"), "{exists}");
        for other in ["link/b", "b", "link", "nowhere", "nowhere/a", "circle", "circle/a"] {
            assert!(!shared(other), "{other} {exists}");
        }
        std::fs::write(root.join("real/a"), "").unwrap();
    }
    std::fs::hard_link(root.join("real/a"), root.join("b")).unwrap();
    std::fs::write(root.join("c"), "").unwrap();
    assert!(shared("b") && !shared("c"));
}

#[test]
fn the_ledger_is_found_through_links() {
    let directory = tempfile::tempdir().unwrap();
    let data_dir = directory.path().join("data");
    std::fs::create_dir(&data_dir).unwrap();
    std::fs::write(data_dir.join("ledger.db"), "").unwrap();
    let hard = directory.path().join("hard");
    std::fs::hard_link(data_dir.join("ledger.db"), &hard).unwrap();
    let soft = directory.path().join("soft");
    std::os::unix::fs::symlink("data/ledger.db-wal", &soft).unwrap();
    let good = GOOD.replacen("\"data\"", &format!("{data_dir:?}"), 1);
    let with = |path: &Path| good.replace("good.log", &path.display().to_string());
    for path in [&hard, &soft] {
        let found = problems(&with(path));
        assert_eq!(found.len(), 1, "{found:#?}");
        assert!(found[0].contains("the sink `good` writes to the ledger's own `"), "{found:#?}");
    }
    config(&with(&directory.path().join("other")));
}
