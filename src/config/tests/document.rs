//! Tests of the problems that are found while the file is read.

use super::*;

/// Everything that is required, so that nothing but what a case adds can be wrong.
const BEFORE: &str = "data_dir = \"d\"\n";

#[test]
fn an_unknown_key_is_told_with_the_likely_one() {
    let with = |from: &str, to: &str, expected: &str| refused(from, to, expected);
    with(
        "data_dir",
        "a = 1\ndata_dir",
        "1: unknown key `a` at the file's top level; known keys: data_dir, listen, admin, log, limits, sources, sinks",
    );
    with(
        "tls = \"off\"",
        "tls = \"off\"\nadress = \"x\"",
        "5: unknown key `adress` in [listen]; did you mean `address`?",
    );
    let table = "[sources.us]";
    for (lines, expected) in [
        ("[limit]", "5: unknown key `limit` at the file's top level; did you mean `limits`?"),
        ("[admin]\ntls = 1", "6: unknown key `tls` in [admin]; known keys: address, token"),
        ("[log]\nlevels = 1", "6: unknown key `levels` in [log]; did you mean `level`?"),
        ("[limits]\nlane = 1", "6: unknown key `lane` in [limits]; did you mean `line`?"),
        (
            "[log]\n\"x`, expected `y\" = 1",
            "6: unknown key `x`, expected `y` in [log]; known keys: level, format",
        ),
    ] {
        with(table, &format!("{lines}\n{table}"), expected);
    }
    with("\"off\"", "{ crt = 1, key = \"k\" }", "4: unknown key `tls.crt` in [listen]; did you mean `cert`?");
    let source = "path = \"/us\"";
    for (lines, expected) in [
        ("dedup.windows = 1", "7: unknown key `dedup.windows` in [sources.us]; did you mean `window`?"),
        ("allow = [\"::1\"]\nalow = 1", "8: unknown key `alow` in [sources.us]; did you mean `allow`?"),
    ] {
        with(source, &format!("{source}\n{lines}"), expected);
    }
    with("{ url", "{ uri = 1, url", "8: unknown key `jwks.uri` in [sources.us]; did you mean `url`?");
    with(
        "{ value = \"Bearer abc\" }",
        "[\n{ value = \"x\" }, { fil = 1 }]",
        "8: unknown key `authorization.fil` in [sources.us]; did you mean `file`?",
    );
    with(
        "jwks.json\"",
        "jwks.json\", token.fil = 1",
        "8: unknown key `jwks.token.fil` in [sources.us]; did you mean `file`?",
    );
    with(
        "format = \"raw\"",
        "format = \"raw\"\nzzz = 1",
        "13: unknown key `zzz` in [sinks.good]; known keys: type, stream, sources, when_full, path, format, rotate, fsync, \
         fsync_interval, mode, owner",
    );
    with(
        "format = \"raw\"",
        "format = \"raw\"\nstreams = 1",
        "13: unknown key `streams` in [sinks.good]; did you mean `stream`?",
    );
    with(
        "format = \"raw\"",
        "format = \"raw\"\nrotate.sizes = 1",
        "13: unknown key `rotate.sizes` in [sinks.good]; did you mean `size`?",
    );
}

#[test]
fn a_wrong_type_is_told_without_the_value() {
    let authorization = "{ value = \"Bearer abc\" }";
    let jwks = "{ url = \"https://us.example.com/jwks.json\" }";
    for (from, to, expected) in [
        (
            "\"data\"",
            "5",
            "1: wrong type of `data_dir` at the file's top level: found integer; write path string",
        ),
        (
            "\"off\"",
            "true",
            "4: wrong type of `tls` in [listen]: found boolean; write { cert = \"PATH\", key",
        ),
        ("\"off\"", "\"hush\"", "4: `tls` in [listen]: unknown word; write { cert"),
        (
            "[sources.us]",
            "[limits]\nbody = 1.5\n[sources.us]",
            "6: `body` in [limits]: not a size; write a number",
        ),
        (
            "[sources.us]",
            "[limits]\nlines = \"hush\"\n[sources.us]",
            "6: wrong type of `lines` in [limits]: found string; write an integer",
        ),
        (
            "[sources.us]",
            "[limits]\nrequest_timeout = 30\n[sources.us]",
            "6: wrong type of `request_timeout` in [limits]: found integer; write a string",
        ),
        (
            "[sources.us]",
            "[admin]\naddress = []\n[sources.us]",
            "6: `address` in [admin]: the array is empty; list at least one, or remove the key",
        ),
        (
            authorization,
            "\"hush\"",
            "7: wrong type of `authorization` in [sources.us]: found string; write a table such as { file",
        ),
        (
            authorization,
            "5",
            "7: wrong type of `authorization` in [sources.us]: found integer; write a table such as",
        ),
        (
            authorization,
            "[\n\"hush\"]",
            "8: wrong type of `authorization` in [sources.us]: found string; write a table",
        ),
        (
            authorization,
            "{ value = [\"hush\"] }",
            "7: wrong type of `authorization.value` in [sources.us]: found array; write a string",
        ),
        (
            jwks,
            "\"hush\"",
            "8: wrong type of `jwks` in [sources.us]: found string; write a table such as { url",
        ),
        (
            "format = \"raw\"",
            "format = \"raw\"\nsources = \"hush\"",
            "13: wrong type of `sources` in [sinks.good]: found string; write an array",
        ),
        ("\"raw\"", "5", "12: wrong type of `format` in [sinks.good]; write a string"),
        ("\"quarantine\"", "[1]", "17: wrong type of `stream` in [sinks.bad]; write a string"),
        ("type = \"file\"", "type = 5", "10: wrong type of `type` in [sinks.good]; write a string"),
        (
            "type = \"file\"",
            "type.file.path = \"x\"",
            "10: wrong type of `type` in [sinks.good]; write a string",
        ),
    ] {
        refused(from, to, expected);
        assert!(!problems(&GOOD.replacen(from, to, 1)).concat().contains("hush"), "{to}");
    }
    for (text, expected) in [
        (
            "listen = \"hush\"",
            "2: wrong type of `listen` at the file's top level: found string; write a table",
        ),
        (
            "sources = 5",
            "2: wrong type of `sources` at the file's top level: found integer; write a table for each, as in [sources.NAME]",
        ),
        (
            "[[sinks]]\n",
            "2: wrong type of `sinks` at the file's top level: found array; write a table for each, as in [sinks.NAME]",
        ),
        ("[sinks]\na = 5", "3: wrong type of [sinks.a]: found integer; write a table"),
        ("[sources]\na = 5", "3: wrong type of [sources.a]: found integer; write a table"),
    ] {
        let found = problems(&format!("{BEFORE}{text}"));
        assert!(found.iter().any(|problem| problem == expected), "{text:?}: {found:#?}");
        assert!(!found.concat().contains("hush"), "{found:#?}");
    }
}

#[test]
fn a_missing_key_is_the_only_problem() {
    for (key, expected) in [
        (
            "data_dir = \"data\"\n",
            "0: missing key `data_dir` at the file's top level; add data_dir = \"/var/lib",
        ),
        (
            "[listen]\naddress = \"127.0.0.1:8443\"\ntls = \"off\"\n",
            "0: missing key `listen` at the file's top level",
        ),
        (
            "address = \"127.0.0.1:8443\"\n",
            "2: missing key `address` in [listen]; add address = \"0.0.0.0:8443\"",
        ),
        ("tls = \"off\"\n", "2: missing key `tls` in [listen]; add tls = { cert = \"cert.pem\""),
        ("path = \"/us\"\n", "5: missing key `path` in [sources.us]; add path = \"/konnect/us\""),
        (
            "authorization = { value = \"Bearer abc\" }\n",
            "5: missing key `authorization` in [sources.us]; add authorization = { file = \"tokens/us\" }",
        ),
        ("type = \"file\"\n", "9: missing key `type` in [sinks.good]; add type = \"file\", \"sqlite\" or"),
        (
            "path = \"good.log\"\n",
            "9: missing key `path` in [sinks.good]; add path = \"/var/log/auditgate/good.log\"",
        ),
        ("format = \"raw\"\n", "9: missing key `format` in [sinks.good]; add format = \"raw\" or \"json\""),
    ] {
        refused(key, "", expected);
    }
    refused("\"off\"", "{ cert = \"c\" }", "4: missing key `tls.key` in [listen]; add key = \"PATH\"");
    refused("\"off\"", "{ key = \"k\" }", "4: missing key `tls.cert` in [listen]; add cert = \"PATH\"");
}

#[test]
fn a_sink_has_a_known_type() {
    refused("\"file\"", "\"fil\"", "10: unknown word `fil` for `type` in [sinks.good]; did you mean `file`?");
    refused(
        "\"file\"",
        "\"kafka\"",
        "10: unknown word `kafka` for `type` in [sinks.good]; known words: file, sqlite, syslog",
    );
}

#[test]
fn one_problem_hides_no_other_in_the_same_table_or_elsewhere() {
    let text = r#"
data_dir = ""
frob = 1
[listen]
address = "x"
tls = { cert = "" }
[limits]
body = "8MB"
lines = 0
line = "65MiB"
[sources.us]
path = "us"
authorization = [{ fil = "x" }]
jwks = { url = "http://x.test/", refresh = "1w" }
dedup = { by = "trace", window = 5 }
[sinks.a]
type = "file"
format = "row"
rotate = { every = "weekly", keep = -1 }
mode = "7"
stream = ["x", "y"]
[sinks.b]
type = "syslog"
address = "siem"
facility = "local9"
app_name = ""
[sinks.c]
path = "d"
"#;
    let found = problems(text);
    let lines: Vec<usize> =
        found.iter().map(|problem| problem.split(':').next().unwrap().parse().unwrap()).collect();
    let expected =
        [2, 3, 5, 6, 6, 8, 9, 10, 12, 13, 14, 14, 15, 15, 16, 18, 19, 19, 20, 21, 21, 24, 25, 26, 27];
    assert_eq!(lines, expected, "{found:#?}");
}

#[test]
fn a_syntax_error_is_one_line_without_the_text() {
    let found = problems("data_dir = \"x\"\n[sources.s]\nauthorization = { value = \"hush }\n");
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(found[0].starts_with("3: not TOML: "), "{found:#?}");
    assert!(!found[0].contains("hush") && !found[0].contains('\n'), "{found:#?}");
    let found = problems("a = 1\na = 2\nb = \n[c\n");
    let lines: Vec<&str> = found.iter().map(|text| text.split(':').next().unwrap()).collect();
    assert_eq!(lines, ["2", "3", "4"], "{found:#?}");
}
