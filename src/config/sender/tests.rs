use super::*;

const GOOD: &str = r#"data_dir = "spool"
[receiver]
url = "https://audit.example.com:8443/konnect/us"
authorization = { value = "Bearer abc" }
[signing]
keys = [{ file = "key.pem" }]
[inputs.app]
type = "file"
path = "app.log"
"#;

fn read_text(text: &str) -> Result<SenderConfig, Vec<Problem>> {
    read(text, PathBuf::from("/nonexistent/base/send.toml"), &|_| None, Secrets::Require)
}

/// GOOD with a replacement has exactly one problem, which begins with `expected`: its line, then
/// the text.
#[track_caller]
fn refused(from: &str, to: &str, expected: &str) {
    assert!(GOOD.contains(from), "{from}");
    let found = read_text(&GOOD.replacen(from, to, 1)).expect_err("all is well");
    let found: Vec<_> =
        found.iter().map(|Problem { line, message }| format!("{}: {message}", line.unwrap_or(0))).collect();
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(found[0].starts_with(expected), "{found:#?}");
}

#[test]
fn defaults_are_filled_in_and_paths_start_from_the_files_directory() {
    let config = read_text(GOOD).unwrap();
    assert_eq!(config.data_dir, Path::new("/nonexistent/base/spool"));
    assert_eq!(config.inputs["app"].kind.path(), Path::new("/nonexistent/base/app.log"));
    assert_eq!(
        config.signing.as_ref().unwrap().keys[0].file.as_deref(),
        Some(Path::new("/nonexistent/base/key.pem"))
    );
    assert_eq!((config.spool_size, config.receiver.connections), (4 << 30, 1));
    assert_eq!(config.admin.address.to_string(), "127.0.0.1:9465");
    let with_token = read_text(&GOOD.replace("[signing]", "[admin]\ntoken = { value = \"x\" }\n[signing]"));
    assert_eq!(with_token.unwrap().admin.address.to_string(), "127.0.0.1:9465");
    let directory = read_text(&GOOD.replace("app.log", "/var/log/app/")).unwrap();
    assert_eq!(directory.inputs["app"].kind.path(), Path::new("/var/log/app"));
}

#[test]
fn what_contradicts_itself_is_refused() {
    for (from, to, expected) in [
        ("[signing]\nkeys = [{ file = \"key.pem\" }]\n", "", "0: missing table [signing]"),
        ("[receiver]", "signatures = \"relay\"\n[receiver]", "2: [signing] without"),
        ("keys = [{ file = \"key.pem\" }]", "", "5: missing key `keys` in [signing]"),
        ("{ file = \"key.pem\" }", "{}", "6: a signing key has one origin"),
        ("{ file = \"key.pem\" }", "{ file = \"a\" }, { file = \"b\" }", "6: two signing keys begin"),
        (
            "{ file = \"key.pem\" }",
            "{ file = \"a\", from = \"2026-12-01T00:00:00Z\" }",
            "6: every signing key has a `from`",
        ),
        (
            "{ file = \"key.pem\" }",
            "{ file = \"a\", from = \"tomorrow\" }",
            "6: `keys.from` in [signing]: `tomorrow` is not a time",
        ),
        ("type = \"file\"", "type = \"pipe\"", "8: unknown word `pipe`"),
        ("type = \"file\"\n", "", "7: missing key `type` in [inputs.app]; add type = \"file\", \"unix-"),
        ("path = \"app.log\"", "", "7: missing key `path` in [inputs.app]"),
        (
            "path = \"app.log\"",
            "path = \"app.log\"\nstat = \"end\"",
            "10: unknown key `stat` in [inputs.app]; did you mean `start`",
        ),
        ("[signing]", "cert = \"c.pem\"\n[signing]", "5: `cert` and `key` belong together"),
        (
            "[signing]",
            "pin = [\"sha256//abc\"]\n[signing]",
            "5: `pin` in [receiver]: not the SHA-256 of a public key",
        ),
        ("[signing]", "rate = 0\n[signing]", "5: `rate` in [receiver]: 0 is out of range"),
        ("url = \"https://audit.example.com:8443/konnect/us\"\n", "", "2: missing key `url` in [receiver]"),
        ("https://audit", "http://audit", "3: `url` in [receiver]"),
        ("[inputs.app]", "[inputs.\"a b\"]", "7: `a b` is not a name for an input"),
    ] {
        refused(from, to, expected);
    }
}

#[test]
fn inputs_do_not_share_a_path() {
    let second = format!("{GOOD}[inputs.again]\ntype = \"unix-stream\"\npath = \"app.log\"\n");
    let found = read_text(&second).unwrap_err();
    assert!(found[0].message.contains("share the path"), "{found:?}");
}

#[test]
fn what_is_printed_reads_the_same() {
    let text = r#"data_dir = "spool"
        spool_size = "1GiB"
        format = "json"
        [receiver]
        url = "https://audit.example.com/us"
        ca = "ca.pem"
        cert = "c.pem"
        key = "k.pem"
        pin = ["sha256//47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="]
        rate = 100
        [signing]
        keys = [{ file = "key.pem" }, { credential = "next", from = "2026-12-01T00:00:00Z" }]
        jwks = "jwks.json"
        serve_jwks = "127.0.0.1:0"
        [inputs.app]
        type = "file"
        path = "app*.log"
        start = "end"
        [inputs.local]
        type = "unix-datagram"
        path = "/run/auditgate-send/app.sock"
        mode = "0666"
    "#;
    let config = read_text(text).unwrap();
    let printed = config.to_toml().unwrap();
    let again =
        read(&printed, PathBuf::from("/elsewhere/send.toml"), &|_| None, Secrets::SkipMissing).unwrap();
    assert_eq!(SenderConfig { file: config.file.clone(), ..again }, config, "{printed}");
}
