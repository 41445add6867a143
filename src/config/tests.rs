//! Tests of the configuration: a valid file, and what is reported when it is changed.

use super::*;
use crate::deliver::file::Rendering;

mod document;
mod sink;
mod source;

/// One source and two sinks with which nothing is wrong, on known lines.
const GOOD: &str = r#"data_dir = "data"
[listen]
address = "127.0.0.1:8443"
tls = "off"
[sources.us]
path = "/us"
authorization = { value = "Bearer abc" }
jwks = { url = "https://us.example.com/jwks.json" }
[sinks.good]
type = "file"
path = "good.log"
format = "raw"
[sinks.bad]
type = "file"
path = "bad.jsonl"
format = "json"
stream = "quarantine"
"#;

fn read_text(text: &str, secrets: Secrets) -> Result<Config, Vec<Problem>> {
    let environment = |name: &str| match name {
        "TOKEN" => Some("Bearer env".into()),
        "TOKEN_ONLY" => Some("env".into()),
        _ => None,
    };
    read(text, PathBuf::from("/nonexistent/base/config.toml"), &environment, secrets)
}

fn config(text: &str) -> Config {
    read_text(text, Secrets::Require).unwrap_or_else(|problems| panic!("{problems:#?}"))
}

/// The problems as `LINE: message`, line 0 for those without one.
fn problems(text: &str) -> Vec<String> {
    let mut problems = read_text(text, Secrets::Require).expect_err("all is well");
    problems.sort_by_key(|problem| problem.line);
    problems.iter().map(|Problem { line, message }| format!("{}: {message}", line.unwrap_or(0))).collect()
}

/// GOOD with a replacement has exactly one problem, which begins with `expected`.
#[track_caller]
fn refused(from: &str, to: &str, expected: &str) {
    assert!(GOOD.contains(from), "{from}");
    let found = problems(&GOOD.replacen(from, to, 1));
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(found[0].starts_with(expected), "{found:#?}");
}

#[track_caller]
fn accepted(from: &str, to: &str) -> Config {
    assert!(GOOD.contains(from), "{from}");
    config(&GOOD.replacen(from, to, 1))
}

#[test]
fn what_is_not_written_has_its_default() {
    let config = config(GOOD);
    assert_eq!(config.file, Path::new("/nonexistent/base/config.toml"));
    assert_eq!(config.data_dir, Path::new("/nonexistent/base/data"));
    assert!(matches!(config.listen.tls, Tls::Off));
    assert_eq!(config.admin.address, AdminAddress::Tcp("127.0.0.1:9464".parse().unwrap()));
    assert!(config.admin.token.is_none());
    assert_eq!((config.log.level.as_str(), config.log.format), ("info", logging::Format::Human));
    assert_eq!(config.limits, Limits::default());
    let source = &config.sources["us"];
    assert_eq!(source.path, "/us");
    assert!(source.authorization[0].matches(b"Bearer abc"));
    assert_eq!(source.signatures, Policy::Require);
    assert_eq!(source.dedup, Dedup { by: DedupKey::Event, window: Duration::from_secs(8 * 86_400) });
    let Some(jwks @ JwksOptions { url: Some(url), ca: None, token: None, .. }) = &source.jwks else {
        panic!("{source:?}");
    };
    assert_eq!(url.to_string(), "https://us.example.com/jwks.json");
    assert_eq!(jwks.refresh, Some(Duration::from_secs(3600)));
    assert_eq!(jwks.retired_for, Duration::from_secs(8 * 86_400));
    assert_eq!(config.sinks.keys().collect::<Vec<_>>(), ["bad", "good"]);
    assert_eq!(config.sinks["good"].streams, [Stream::Verified]);
    assert_eq!(config.sinks["good"].sources, None);
}

#[test]
fn everything_can_be_written() {
    let config = config(
        r#"
        data_dir = "/data"
        listen = { address = "[::]:8443", tls = { cert = "tls/./cert.pem", key = "/key.pem" } }
        admin = { address = "0.0.0.0:1", token = { value = "look" } }
        log = { level = "info,auditgate::trust=debug", format = "json" }
        limits = { body = 1024, decoded = "2KiB", line = "1KiB", lines = 7, connections = 8, connections_per_peer = 3,
                   request_timeout = "9s", in_flight = "1GiB", backlog = "5GiB" }
        [sources.a]
        path = "/a"
        authorization = [{ env = "TOKEN" }, { value = "Splunk x" }]
        jwks = { file = "jwks.json" }
        signatures = "require"
        dedup = { by = "trace_id", window = "1d" }
        [sources.b]
        path = "/b"
        authorization = { value = "Bearer b" }
        signatures = "off"
        [sources.c]
        path = "/c"
        authorization = { value = "Bearer c" }
        jwks = { url = "http://127.0.0.1:1/jwks", refresh = "5m", ca = "ca.pem", token = { value = "t" } }
        signatures = "accept-unsigned"
        [sinks.all]
        type = "file"
        path = "all"
        format = "json"
        stream = ["verified", "unverified", "quarantine"]
        sources = ["a", "b", "c"]
        "#,
    );
    let base = Path::new("/nonexistent/base");
    let Tls::Files(Files { cert, key, .. }) = &config.listen.tls else { panic!("{config:?}") };
    assert_eq!((cert.as_path(), key.as_path()), (&*base.join("tls/cert.pem"), Path::new("/key.pem")));
    assert_eq!((config.limits.body, config.limits.decoded, config.limits.lines), (1024, 2048, 7));
    assert_eq!((config.limits.connections, config.limits.connections_per_peer), (8, 3));
    assert_eq!(config.limits.request_timeout, Duration::from_secs(9));
    assert_eq!(config.limits.backlog, 5 << 30);
    assert_eq!(config.admin.address, AdminAddress::Tcp("0.0.0.0:1".parse().unwrap()));
    assert!(config.admin.token.as_ref().unwrap().matches(b"look"));
    let [a, b, c] = ["a", "b", "c"].map(|name| &config.sources[name]);
    assert!(a.authorization[0].matches(b"Bearer env") && a.authorization[1].matches(b"Splunk x"));
    assert_eq!(a.jwks.as_ref().unwrap().file, Some(base.join("jwks.json")));
    assert_eq!(a.dedup.by, DedupKey::TraceId);
    assert!(b.jwks.is_none());
    let keys = c.jwks.as_ref().unwrap();
    assert_eq!(keys.ca, Some(base.join("ca.pem")));
    assert!(keys.token.as_ref().unwrap().matches(b"t"));
    assert_eq!(config.sinks["all"].streams, Stream::ALL);
    assert_eq!(config.sinks["all"].sources.as_deref().unwrap(), ["a", "b", "c"]);
}

#[test]
fn an_empty_file_tells_all_that_is_missing() {
    let found = problems("");
    let messages: Vec<&str> = found.iter().map(|text| text.split(';').next().unwrap()).collect();
    assert_eq!(
        messages,
        [
            "0: missing key `data_dir` at the file's top level",
            "0: missing key `listen` at the file's top level",
            "0: there is no source",
            "0: there is no sink"
        ]
    );
}

#[test]
fn every_missing_key_is_told_with_its_table() {
    let found = problems("data_dir = \"d\"\n[listen]\n[sources.s]\n[sinks.k]\ntype = \"file\"\n");
    for expected in [
        "2: missing key `address` in [listen]",
        "2: missing key `tls` in [listen]",
        "3: missing key `path` in [sources.s]",
        "3: missing key `authorization` in [sources.s]",
        "3: missing key `jwks` in [sources.s]",
        "4: missing key `path` in [sinks.k]",
        "4: missing key `format` in [sinks.k]",
    ] {
        assert!(found.iter().any(|text| text.starts_with(expected)), "{expected} in {found:#?}");
    }
    assert_eq!(found.len(), 7, "{found:#?}");
    let mutual = "tls = { cert = \"c\", key = \"k\", client_ca = \"a\", client_names = [\"n\"] }";
    accepted("tls = \"off\"", mutual);
    let without = mutual.replace("client_ca = \"a\", ", "");
    refused("tls = \"off\"", &without, "4: `client_names` without `client_ca`; name the authority");
    refused(
        "tls = \"off\"",
        &mutual.replace("\"n\"", ""),
        "4: `tls.client_names` in [listen]: the array is empty; list",
    );
    refused(
        "tls = \"off\"",
        "tls = { cert = \"c\" }",
        "4: missing key `tls.key` in [listen]; add key = \"PATH\"",
    );
    refused("\"data\"", "\"\"", "1: `data_dir` at the file's top level: not a path; write");
}

#[test]
fn problems_of_all_parts_are_reported_together() {
    let text = GOOD
        .replace("127.0.0.1:8443", "localhost:8443")
        .replace("\"/us\"", "\"us\"")
        .replace("\"raw\"", "\"row\"")
        + "[limits]\nline = \"1GB\"\nlines = 0\n";
    let lines: Vec<String> =
        problems(&text).iter().map(|text| text.split(':').next().unwrap().to_owned()).collect();
    assert_eq!(lines, ["3", "6", "12", "19", "20"]);
}

#[test]
fn plain_http_is_for_loopback() {
    refused(
        "127.0.0.1:8443",
        "0.0.0.0:8443",
        "3: tls = \"off\" with `0.0.0.0:8443`, which is not a loopback address; configure cert and key",
    );
    accepted("127.0.0.1:8443", "[::1]:8443");
    accepted("127.0.0.1:8443", "[::ffff:127.0.0.1]:0");
    refused("tls = \"off\"", "tls = \"on\"", "4: `tls` in [listen]: unknown word; write {");
}

#[test]
fn addresses_are_ip_addresses_with_ports_and_differ() {
    refused(
        "127.0.0.1:8443",
        "localhost:8443",
        "3: `address` in [listen]: `localhost:8443` is not an IP address with a port; write one",
    );
    refused("127.0.0.1:8443", "127.0.0.1", "3: `address` in [listen]: `127.0.0.1` is not");
    refused(
        "127.0.0.1:8443",
        "127.0.0.1:9464",
        "3: [listen] and [admin] both want the address 127.0.0.1:9464",
    );
    refused(
        "[sources.us]",
        "[admin]\naddress = \"x\"\n[sources.us]",
        "6: `address` in [admin]: `x` is not an IP address",
    );
    accepted("127.0.0.1:8443\"", "127.0.0.1:0\"\n");
}

#[test]
fn the_admin_endpoint_is_for_this_machine_unless_it_has_a_token() {
    let admin = |lines: &str| format!("[admin]\n{lines}\n[sources.us]");
    let accepted = |lines: &str| accepted("[sources.us]", &admin(lines)).admin;
    let refused = |lines: &str, expected: &str| refused("[sources.us]", &admin(lines), expected);
    for address in ["0.0.0.0:1", "192.0.2.1:1", "[::]:1", "[2001:db8::1]:1"] {
        refused(
            &format!("address = \"{address}\""),
            &format!(
                "6: [admin] without `token` at `{address}`, which other machines may be able to reach; add"
            ),
        );
        accepted(&format!("address = \"{address}\"\ntoken = {{ value = \"t\" }}"));
    }
    accepted("address = \"[::1]:1\"");
    accepted("address = \"[::ffff:127.0.0.1]:1\"");
    let admin = accepted("address = \"unix:///run/auditgate/admin.sock\"\ntoken = { env = \"TOKEN_ONLY\" }");
    assert_eq!(admin.address, AdminAddress::Unix("/run/auditgate/admin.sock".into()));
    assert!(admin.token.unwrap().matches(b"env"));
    for path in ["", "run/a.sock", "/", "/run/auditgate/"] {
        let address = format!("unix://{path}");
        refused(
            &format!("address = \"{address}\""),
            &format!("6: `address` in [admin]: `{address}` has no absolute path; write"),
        );
    }
    let longest = format!("unix:///{}", "x".repeat(LONGEST_SOCKET_PATH - 1));
    accepted(&format!("address = \"{longest}\""));
    refused(
        &format!("address = \"{longest}x\""),
        &format!("6: `address` in [admin]: `{longest}x` is longer than the 107 bytes"),
    );
    refused("token = {}", "6: the secret has no origin");
    refused(
        "token = { value = \"Bearer t\" }",
        "6: the token of [admin] contains a space; write the token alone",
    );
    // What is missing on this machine protects nonetheless.
    let text = GOOD.replace(
        "[sources.us]",
        "[admin]\naddress = \"0.0.0.0:1\"\ntoken = { file = \"none\" }\n[sources.us]",
    );
    assert!(read_text(&text, Secrets::SkipMissing).unwrap().admin.token.is_some());
}

#[test]
fn log_levels_are_checked() {
    let log = |level: &str| format!("[log]\nlevel = \"{level}\"\n[sources.us]");
    refused("[sources.us]", &log("inof"), "6: `level` in [log]: `inof` is not a log level; write off, error");
    refused("[sources.us]", &log("info,hyper"), "6: `level` in [log]: `hyper` is not a log level; write off");
    refused("[sources.us]", &log(""), "6: `level` in [log]: `` is not a log level; write off");
    refused(
        "[sources.us]",
        &log("info,hyper=loud"),
        "6: `level` in [log]: `hyper=loud` is not a log level; write off",
    );
    for level in ["off", "WARN", "info,hyper=debug", "auditgate::trust=trace"] {
        assert_eq!(accepted("[sources.us]", &log(level)).log.level, level);
    }
    refused(
        "[sources.us]",
        "[log]\nformat = \"jsn\"\n[sources.us]",
        "6: unknown word `jsn` for `format` in [log]; did you mean `json`?",
    );
}

#[test]
fn limits_are_positive_and_in_order() {
    let limits = |lines: &str| format!("[limits]\n{lines}\n[sources.us]");
    let refused = |lines: &str, expected: &str| refused("[sources.us]", &limits(lines), expected);
    refused(
        "body = \"8MB\"",
        "6: `body` in [limits]: `8MB` is not a size; write a number and one of B, KiB, MiB, GiB",
    );
    refused("backlog = 0", "6: `backlog` in [limits]: `0` is not a size; write at least 1B");
    refused("body = -1", "6: `body` in [limits]: `-1` is not a size");
    refused(
        "lines = 0",
        "6: `lines` in [limits]: 0 is out of range; write a whole number from 1 to 4294967295",
    );
    refused("connections = -5", "6: `connections` in [limits]: -5 is out of range");
    refused("connections_per_peer = 0", "6: `connections_per_peer` in [limits]: 0 is out of range");
    refused(
        "request_timeout = \"0s\"",
        "6: `request_timeout` in [limits]: `0s` is not a time; write at least 1ms",
    );
    refused(
        "request_timeout = \"1w\"",
        "6: `request_timeout` in [limits]: `1w` is not a time; write a number and one of ms",
    );
    refused(
        "decoded = \"1KiB\"",
        "6: `line` (256KiB) is larger than `decoded` (1KiB): no line could ever be that long",
    );
    let too_small =
        |written: &str| format!("6: `in_flight` ({written}) is too small for the largest batch: ");
    refused("body = \"300MiB\"", &too_small("256MiB"));
    refused("in_flight = \"32MiB\"", &too_small("32MiB"));
    refused("lines = 1000000", &too_small("256MiB"));
    refused(
        "in_flight = \"64MiB\"\nbody = \"64MiB\"",
        "6: `in_flight` (64MiB) is too small for the largest batch: `body` (64MiB), `decoded` (64MiB) and 256 B for \
         each of `lines` (100000) are held together and may take seven eighths of it, so such a batch could never be taken; raise \
         `in_flight` to 175MiB or more",
    );
    accepted("[sources.us]", &limits("in_flight = \"175MiB\"\nbody = \"64MiB\""));
    accepted("[sources.us]", &limits("decoded = \"190MiB\"\nline = \"190MiB\""));
}

#[test]
fn names_are_plain() {
    for name in ["a b", "", "..", "ü", &"x".repeat(65)] {
        refused(
            "[sources.us]",
            &format!("[sources.\"{name}\"]"),
            &format!("5: `{name}` is not a name for a source"),
        );
        refused(
            "[sinks.good]",
            &format!("[sinks.\"{name}\"]"),
            &format!("9: `{name}` is not a name for a sink"),
        );
    }
    accepted("[sources.us]", "[sources.\"A.b_c-9\"]");
    accepted("[sources.us]", &format!("[sources.{}]", "x".repeat(64)));
}

#[test]
fn words_are_known_ones() {
    let next = "[sinks.good]";
    refused(
        next,
        "signatures = \"requird\"\n[sinks.good]",
        "9: unknown word `requird` for `signatures` in [sources.us]; did you mean `require`?",
    );
    refused(
        next,
        "dedup = { by = \"trace-id\" }\n[sinks.good]",
        "9: unknown word `trace-id` for `dedup.by` in [sources.us]; did you mean `trace_id`?",
    );
    refused(
        next,
        "dedup = { window = \"0d\" }\n[sinks.good]",
        "9: `dedup.window` in [sources.us]: `0d` is not a time",
    );
    refused(
        "\"quarantine\"",
        "\"rejects\"",
        "17: unknown word `rejects` for `stream` in [sinks.bad]; known words: verified, unverified, quarantine",
    );
    refused(
        "\"raw\"",
        "\"text\"",
        "12: unknown word `text` for `format` in [sinks.good]; known words: raw, json",
    );
}

fn problem(file: &Path) -> String {
    load(file, &|_| None, Secrets::Require).unwrap_err().to_string()
}

#[test]
fn a_file_that_cannot_be_read_is_one_sentence() {
    assert_eq!(
        problem(Path::new("/nonexistent/config.toml")),
        "/nonexistent/config.toml: cannot read the configuration file: No such file or directory \
         (os error 2); create it, starting from config.example.toml, or name another"
    );
}

#[test]
fn problems_name_the_file_and_the_line() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("config.toml");
    std::fs::write(&file, b"data_dir = \"x\"\n# \xff\n").unwrap();
    assert_eq!(
        problem(&file),
        format!("{}:2: not UTF-8, as TOML has to be; save the file as UTF-8", file.display())
    );
    std::fs::write(&file, GOOD.replace("[sources.us]", "[limit]\n[sources.us]")).unwrap();
    assert_eq!(
        problem(&file),
        format!("{}:5: unknown key `limit` at the file's top level; did you mean `limits`?", file.display())
    );
}

#[test]
fn relative_paths_start_from_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let config_file = directory.path().join("config.toml");
    std::fs::write(directory.path().join("token"), "Bearer abc\n").unwrap();
    let text = r#"
        data_dir = "data"
        listen = { address = "127.0.0.1:0", tls = "off" }
        [sources.s]
        path = "/s"
        authorization = { file = "token" }
        signatures = "off"
        [sinks.k]
        type = "file"
        path = "out/k.jsonl"
        format = "json"
        stream = ["unverified", "quarantine"]
    "#;
    std::fs::write(&config_file, text).unwrap();
    let config = load(&config_file, &|_| None, Secrets::Require).unwrap();
    assert_eq!(config.file, config_file);
    assert_eq!(config.data_dir, directory.path().join("data"));
    assert!(config.sources["s"].authorization[0].matches(b"Bearer abc"));
    let SinkKind::File(options) = &config.sinks["k"].kind else { panic!("of type file") };
    assert_eq!(options.path, directory.path().join("out/k.jsonl"));
    assert_eq!(options.format, Rendering::Json);
    let subscription = config.sinks["k"].subscription("k");
    assert!(subscription.wants("s", Stream::Unverified) && !subscription.wants("s", Stream::Verified));
    assert!(!format!("{config:?}").contains("abc"));
}
