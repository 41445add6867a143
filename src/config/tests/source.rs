//! Tests of sources.

use super::*;

#[test]
fn senders_can_be_known_by_their_networks() {
    let path = "path = \"/us\"";
    let with = |networks: &str| format!("{path}\nallow = {networks}");
    accepted(path, &with("[\"192.0.2.0/24\", \"2001:db8::/32\", \"198.51.100.7\", \"::1\"]"));
    let mapped = GOOD.replace(path, &with("[\"::ffff:192.0.2.7\", \"::ffff:192.0.2.0/120\"]"));
    let config = read_text(&mapped, Secrets::Require).unwrap();
    assert_eq!(
        config.sources["us"].allow,
        ["192.0.2.7/32", "192.0.2.0/24"].map(|text| text.parse().unwrap())
    );
    refused(path, &with("[]"), "7: `allow` in [sources.us]: the array is empty; list");
    for wrong in ["192.0.2.1/24", "192.0.2", "example.com", "192.0.2.0/33", ""] {
        let text = with(&format!("[\"{wrong}\"]"));
        refused(
            path,
            &text,
            &format!("7: `allow` in [sources.us]: `{wrong}` is not a network; write an address"),
        );
    }
}

#[test]
fn source_paths_are_paths_and_unique() {
    for path in ["us", "", "/us?x=1", "/us#x", "/u s", "/ü", "https://x/us"] {
        refused(
            "\"/us\"",
            &format!("\"{path}\""),
            &format!("6: `path` in [sources.us]: `{path}` is not the path of a request; "),
        );
    }
    accepted("\"/us\"", "\"/a%20b/c-d_e.f~g\"");
    let twin = "[sources.eu]\npath = \"/us\"\nauthorization = { env = \"TOKEN\" }\njwks.file = \"j\"\n";
    let root = GOOD.replace("/us\"", "/\"") + &twin.replace("\"/us\"", "5");
    assert_eq!(problems(&root).len(), 1, "what is read in the place of 5 belongs to no key");
    assert_eq!(
        problems(&(GOOD.to_owned() + twin)),
        ["6: the sources `eu` and `us` share the path `/us`; give each its own path"]
    );
}

#[test]
fn a_source_says_who_may_send() {
    let secret = "{ value = \"Bearer abc\" }";
    refused(secret, "[]", "7: `authorization` in [sources.us]: the array is empty");
    refused(secret, "{}", "7: the secret has no origin; write { file");
    refused(secret, "[{ value = \"x\" }, {}]", "7: the secret has no origin");
    refused(secret, "{ value = \"x\", env = \"y\" }", "7: the secret has more than one origin");
    refused(secret, "{ value = \"\" }", "7: the secret is empty");
    refused(secret, "{ value = \"a\\nb\" }", "7: the secret contains a control character");
    refused(secret, "{ value = \" a\" }", "7: the secret begins or ends with white space");
    refused(
        secret,
        "[\n{ value = \"x\" },\n{ env = \"NONE\" }]",
        "9: the environment variable `NONE` is not set; set",
    );
    // It may be the secret itself.
    for name in ["Bearer abc", "", "a=b", "geheim!"] {
        let form = format!("{{ env = \"{name}\" }}");
        refused(secret, &form, "7: what `env` names cannot be an environment variable; write its name");
    }
    refused(secret, "{ credential = \"us\" }", "7: the credential `us` was not passed");
    refused(
        secret,
        "{ file = \"tokens/us\" }",
        "7: cannot read the secret file `/nonexistent/base/tokens/us`: No such file or directory \
         (os error 2); it must exist, and the daemon's user must be able to read it",
    );
}

#[test]
fn missing_secrets_can_be_left_unread_but_wrong_ones_not() {
    for form in ["{ file = \"tokens/us\" }", "{ env = \"NONE\" }", "{ credential = \"us\" }"] {
        let text = GOOD.replace("{ value = \"Bearer abc\" }", form);
        let config = read_text(&text, Secrets::SkipMissing).unwrap();
        assert!(!config.sources["us"].authorization[0].matches(b""));
    }
    let text = GOOD.replace("Bearer abc", "");
    assert!(read_text(&text, Secrets::SkipMissing).is_err());
}

/// RFC 8032, section 7.1, TEST 1.
const KEY: &str = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";

#[test]
fn key_sets_are_required_and_come_from_one_place() {
    let jwks = "jwks = { url = \"https://us.example.com/jwks.json\" }";
    refused(
        jwks,
        "",
        "5: missing key `jwks` in [sources.us], without which no signature can be checked; add jwks",
    );
    refused(jwks, "jwks = {}", "8: `jwks` has neither `url` nor `file` nor `keys`");
    refused(jwks, "jwks = { url = \"https://x\", file = \"y\" }", "8: `jwks` has more than one of");
    refused(jwks, "jwks = { file = \"y\", refresh = \"1h\" }", "8: `refresh` with a `jwks` that has no url");
    refused(jwks, "jwks = { url = \"http://us.example.com/\" }", "8: `jwks.url` in [sources.us]: ");
    refused(jwks, "jwks = { url = \"nonsense\" }", "8: `jwks.url` in [sources.us]: ");
    refused(
        jwks,
        "jwks = { url = \"https://x/\", refresh = \"0s\" }",
        "8: `jwks.refresh` in [sources.us]: `0s` is not a time",
    );
    refused(jwks, "jwks = { url = \"https://x/\", token = {} }", "8: the secret has no origin");
    refused(
        jwks,
        "jwks = { url = \"https://x/\", token = { value = \"Bearer x\" } }",
        "8: the token of [sources.us.jwks] contains a space; write the token alone",
    );
    accepted(jwks, "jwks = { url = \"http://localhost:1/\" }");
    accepted(jwks, &format!("jwks = {{ url = \"https://x/\", pin = [\"{KEY}\"], revoked = [\"{KEY}\"] }}"));
    refused(
        jwks,
        "jwks = { url = \"https://x/\", pin = [] }",
        "8: `jwks.pin` in [sources.us]: the array is empty; list",
    );
    refused(
        jwks,
        "jwks = { url = \"https://x/\", revoked = [\"k1\"] }",
        "8: `revoked` of `jwks`: `k1` is not a thumbprint; write the key's thumbprint (RFC 7638)",
    );
    refused(
        jwks,
        "jwks = { url = \"https://x/\", retired_for = \"soon\" }",
        "8: `jwks.retired_for` in [sources.us]: `soon` is not a time",
    );
    accepted(jwks, &format!("jwks = {{ keys = [\"{KEY}\"] }}"));
    refused(jwks, "jwks = { keys = [] }", "8: `jwks.keys` in [sources.us]: the array is empty; list");
    refused(
        jwks,
        "jwks = { keys = [\"AAAA\"] }",
        "8: `jwks.keys` in [sources.us]: a key of `jwks` has an x of 3 bytes, but an Ed25519 public key has 32",
    );
    let weak = format!("jwks = {{ keys = [\"{}\"] }}", "A".repeat(43));
    refused(jwks, &weak, "8: `jwks.keys` in [sources.us]: a key of `jwks` is weak");
    let both = format!("jwks = {{ keys = [\"{KEY}\"], pin = [\"k1\"] }}");
    refused(jwks, &both, "8: `pin` with a `jwks` that has `keys`");
}

#[test]
fn trace_ids_are_believed_only_when_signed() {
    for signatures in ["off", "accept-unsigned"] {
        let written = format!("signatures = \"{signatures}\"\ndedup = {{ by = \"trace_id\" }}\n[sinks.good]");
        let text = GOOD
            .replace("[sinks.good]", &written)
            .replace("\"quarantine\"", "[\"quarantine\", \"unverified\"]");
        let found = problems(&text);
        assert_eq!(found.len(), 1, "{found:#?}");
        assert!(found[0].starts_with("10: by = \"trace_id\" without signatures = \"require\""), "{found:#?}");
    }
}
