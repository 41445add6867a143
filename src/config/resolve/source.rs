//! One source: who may send to it, how its events are verified and told apart; and what must differ between
//! sources.

use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::Range;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use toml::Spanned;

use super::super::file::{self, OneOrMany, Text};
use super::super::secret::Origin;
use super::super::{Dedup, DedupBy, Jwks, JwksOrigin, Secret, Secrets, Signatures, Source};
use super::Resolver;
use crate::net::Endpoint;
use crate::trust::jwks::{self, KeySet};
use crate::trust::keyring;

const DEFAULT_REFRESH: Duration = Duration::from_secs(3600);
/// What Konnect sends again is at most a week old.
const DEFAULT_RETIRED_FOR: Duration = Duration::from_secs(8 * 86_400);
const DEFAULT_WINDOW: Duration = Duration::from_secs(8 * 86_400);

impl Resolver<'_> {
    pub(super) fn source(&mut self, name: &Text, table: file::Source) -> Option<Source> {
        let at = name.span();
        let name = self.name(name, "source");
        let shown = name.as_deref().unwrap_or("NAME");
        let within = format!("[sources.{shown}]");

        let hint = format!("such as path = \"/konnect/{shown}\"");
        let path =
            self.required(table.path, &at, "path", &within, &hint).and_then(|text| self.request_path(text));
        let hint = format!("such as authorization = {{ file = \"tokens/{shown}\" }}");
        let authorization = self
            .required(table.authorization, &at, "authorization", &within, &hint)
            .and_then(|one_or_many| self.authorization(one_or_many));
        let hint = "remove it to let anybody send who has the token";
        let allow = self.networks(table.allow, "allow", "lets nobody send", hint);
        let signatures_at = table.signatures.as_ref().map(Spanned::span);
        let signatures = table.signatures.map_or(Some(Signatures::default()), |text| {
            self.word(&text, "signatures", &Signatures::ALL, Signatures::name)
        });
        let jwks = match table.jwks {
            Some(jwks) => self.jwks(jwks).map(Some),
            None if signatures.is_none_or(|word| word == Signatures::Off) => Some(None),
            None => {
                self.findings.report(
                    signatures_at.as_ref().unwrap_or(&at),
                    format!("missing key `jwks` in {within}, without which no signature can be checked"),
                    "add jwks = { url = \"https://…/jwks.json\" }, or write signatures = \"off\"",
                );
                None
            }
        };
        let dedup = self.dedup(&table.dedup.unwrap_or_default(), signatures);
        Some(Source {
            name: name?,
            path: path?,
            authorization: authorization?,
            allow: allow?,
            jwks: jwks?,
            signatures: signatures?,
            dedup: dedup?,
        })
    }

    fn authorization(&mut self, written: Spanned<OneOrMany<file::Secret>>) -> Option<Vec<Secret>> {
        let at = written.span();
        let OneOrMany(forms) = written.into_inner();
        if forms.is_empty() {
            let hint = "name at least one, or nobody could send";
            self.findings.report(&at, "`authorization` is an empty array", hint);
            return None;
        }
        let secrets: Vec<Option<Secret>> = forms.into_iter().map(|form| self.secret(form, &at)).collect();
        secrets.into_iter().collect()
    }

    /// Networks, none when there is no list. An empty list is refused, which `emptily` says and `hint` how to avoid.
    pub(super) fn networks(
        &mut self,
        networks: Option<Spanned<Vec<Text>>>,
        key: &str,
        emptily: &str,
        hint: &str,
    ) -> Option<Vec<IpNet>> {
        let Some(networks) = networks else { return Some(Vec::new()) };
        let at = networks.span();
        let networks = networks.into_inner();
        if networks.is_empty() {
            self.findings.report(&at, format!("`{key}` is an empty array: it {emptily}"), hint);
            return None;
        }
        let network = |text: &Text| {
            let written = text.get_ref();
            let address = || written.parse::<IpAddr>().map(IpNet::from).ok();
            let network = written.parse::<IpNet>().ok().or_else(address);
            // `10.0.0.1/8` is more likely a slip than a wish.
            network.map(as_ipv4).filter(|network| network.addr() == network.network())
        };
        let mut allowed = Vec::with_capacity(networks.len());
        for text in &networks {
            let Some(network) = network(text) else {
                let message = format!("`{}` in `{key}` is no network", text.get_ref());
                let hint = "write an address, or a network such as 192.0.2.0/24 or 2001:db8::/32";
                self.findings.report(&text.span(), message, hint);
                return None;
            };
            allowed.push(network);
        }
        Some(allowed)
    }

    /// `around` is the place to name when the form itself is empty.
    fn secret(&mut self, form: file::Secret, around: &Range<usize>) -> Option<Secret> {
        const FORMS: &str = "write { file = \"PATH\" }, { env = \"NAME\" }, { credential = \"NAME\" } or \
                             { value = \"SECRET\" }";

        let (origin, at) = match (form.file, form.env, form.credential, form.value) {
            (Some(path), None, None, None) => (Origin::File(self.path(&path, "file")?), path.span()),
            (None, Some(name), None, None) => {
                let at = name.span();
                (Origin::Environment(name.into_inner()), at)
            }
            (None, None, Some(name), None) => {
                let at = name.span();
                (Origin::Credential(name.into_inner()), at)
            }
            (None, None, None, Some(value)) => {
                let at = value.span();
                (Origin::Value(value.into_inner().0), at)
            }
            (None, None, None, None) => {
                self.findings.report(around, "the secret has no origin", FORMS);
                return None;
            }
            (file, env, credential, value) => {
                let texts = [file, env, credential];
                let spans =
                    texts.iter().flatten().map(Spanned::span).chain(value.as_ref().map(Spanned::span));
                let at = spans.min_by_key(|span| span.start).unwrap_or_else(|| around.clone());
                self.findings.report(&at, "the secret has more than one origin", FORMS);
                return None;
            }
        };
        match origin.read(self.environment) {
            Ok(secret) => Some(secret),
            Err(error) if error.is_absence() && self.secrets == Secrets::SkipMissing => {
                Some(Secret::unread())
            }
            Err(error) => {
                self.findings.report(&at, error.to_string(), error.hint());
                None
            }
        }
    }

    fn jwks(&mut self, table: Spanned<file::Jwks>) -> Option<Jwks> {
        let at = table.span();
        let mut table = table.into_inner();
        let retired_for = self.time(table.retired_for.as_ref(), "retired_for", DEFAULT_RETIRED_FOR);
        let (revoked, pin, with_keys) = (table.revoked.take(), table.pin.take(), table.keys.is_some());
        let origin = self.jwks_origin(table, &at);
        let revoked = self.thumbprints(revoked.unwrap_or_default(), "revoked", origin.as_ref());
        let pin = self.pins(pin, with_keys, origin.as_ref());
        Some(Jwks { origin: origin?, pin: pin?, revoked: revoked?, retired_for: retired_for? })
    }

    fn jwks_origin(&mut self, table: file::Jwks, at: &Range<usize>) -> Option<JwksOrigin> {
        const FORMS: &str =
            "write { url = \"https://…\" }, { file = \"PATH\" } or { keys = [\"BASE64URL\"] }";

        let file::Jwks { file, url, keys, refresh, ca, token, .. } = table;
        if url.is_none() && (file.is_some() || keys.is_some()) {
            let only_url = [
                ("refresh", refresh.as_ref().map(Spanned::span)),
                ("ca", ca.as_ref().map(Spanned::span)),
                ("token", token.as_ref().map(Spanned::span)),
            ];
            for (key, written) in only_url {
                if let Some(at) = written {
                    let message = format!("`{key}` with a `jwks` that has no url");
                    self.findings.report(&at, message, format!("remove `{key}`, or use url"));
                }
            }
        }
        match (file, url, keys) {
            (Some(file), None, None) => self.path(&file, "file").map(JwksOrigin::File),
            (None, Some(url), None) => {
                let url_at = url.span();
                let url = Endpoint::parse(url.get_ref())
                    .map_err(|error| {
                        let hint = "use an https:// URL; http:// is for loopback only";
                        self.findings.report(&url_at, format!("`url` of `jwks`: {error}"), hint);
                    })
                    .ok();
                let refresh = self.time(refresh.as_ref(), "refresh", DEFAULT_REFRESH);
                let ca = ca.map_or(Some(None), |text| self.path(&text, "ca").map(Some));
                let token = token.map_or(Some(None), |token| self.bearer_token(token, "`jwks`").map(Some));
                Some(JwksOrigin::Url { url: url?, refresh: refresh?, ca: ca?, token: token? })
            }
            (None, None, Some(keys)) => self.pinned_keys(keys),
            (None, None, None) => {
                self.findings.report(at, "`jwks` has neither `url` nor `file` nor `keys`", FORMS);
                None
            }
            _ => {
                self.findings.report(at, "`jwks` has more than one of `url`, `file` and `keys`", FORMS);
                None
            }
        }
    }

    fn pinned_keys(&mut self, texts: Spanned<Vec<Text>>) -> Option<JwksOrigin> {
        let at = texts.span();
        let mut keys = Vec::new();
        for text in texts.into_inner() {
            match jwks::pinned(text.get_ref()) {
                Ok(key) => keys.push(key),
                Err(refusal) => {
                    let message = format!("a key of `jwks` {refusal}");
                    let hint = "write the member `x` of the public JWK: 43 characters of base64url";
                    self.findings.report(&text.span(), message, hint);
                    return None;
                }
            }
        }
        let set = KeySet::of(keys).filter(|set| set.keys().len() <= jwks::MAX_KEYS);
        if set.is_none() {
            let message = format!("`keys` of `jwks` lists no key, or more than {}", jwks::MAX_KEYS);
            self.findings.report(&at, message, "list the public keys that events are signed with");
        }
        set.map(JwksOrigin::Keys)
    }

    fn pins(
        &mut self,
        texts: Option<Spanned<Vec<Text>>>,
        with_keys: bool,
        origin: Option<&JwksOrigin>,
    ) -> Option<Vec<String>> {
        let Some(texts) = texts else { return Some(Vec::new()) };
        let at = texts.span();
        let texts = texts.into_inner();
        if with_keys {
            let hint = "remove `pin`: `keys` are the only ones anyhow";
            self.findings.report(&at, "`pin` with a `jwks` that has `keys`", hint);
            return None;
        }
        if texts.is_empty() {
            let hint = "list thumbprints, or remove `pin` to trust every key that is listed";
            self.findings.report(&at, "`pin` of `jwks` names no key", hint);
            return None;
        }
        self.thumbprints(texts, "pin", origin)
    }

    /// Reports each text that is no thumbprint.
    fn thumbprints(
        &mut self,
        texts: Vec<Text>,
        of: &str,
        origin: Option<&JwksOrigin>,
    ) -> Option<Vec<String>> {
        let thumbprints: Vec<_> = texts.into_iter().map(|text| self.thumbprint(text, of, origin)).collect();
        thumbprints.into_iter().collect()
    }

    fn thumbprint(&mut self, text: Text, of: &str, origin: Option<&JwksOrigin>) -> Option<String> {
        if jwks::is_thumbprint(text.get_ref()) {
            return Some(text.into_inner());
        }
        let mut hint =
            "write the key's thumbprint (RFC 7638), 43 characters, as the log shows it when keys are loaded"
                .to_owned();
        if let Some(JwksOrigin::File(path)) = origin
            && let Ok(document) = keyring::read_file(path, jwks::MAX_KEPT_KEYS)
        {
            let thumbprints: Vec<String> = document.keys.keys().iter().map(jwks::Key::thumbprint).collect();
            hint = format!("{hint}; the document lists {}", thumbprints.join(", "));
        }
        self.findings.report(
            &text.span(),
            format!("`{of}` of `jwks`: `{}` is no thumbprint", text.get_ref()),
            hint,
        );
        None
    }

    /// `of` is what it belongs to.
    pub(super) fn bearer_token(&mut self, token: Spanned<file::Secret>, of: &str) -> Option<Secret> {
        let at = token.span();
        let secret = self.secret(token.into_inner(), &at)?;
        // RFC 6750, section 2.1: no white space in a token, so this has its scheme before it.
        if secret.expose().contains(&b' ') {
            let message = format!("the token of {of} contains a space");
            self.findings.report(&at, message, "write the token alone, without the word Bearer");
            return None;
        }
        Some(secret)
    }

    fn dedup(&mut self, table: &file::Dedup, signatures: Option<Signatures>) -> Option<Dedup> {
        let by = table
            .by
            .as_ref()
            .map_or(Some(DedupBy::default()), |text| self.word(text, "by", &DedupBy::ALL, DedupBy::name));
        let window = self.time(table.window.as_ref(), "window", DEFAULT_WINDOW);
        if by == Some(DedupBy::TraceId)
            && signatures.is_some_and(|word| word != Signatures::Require)
            && let Some(at) = table.by.as_ref().map(Spanned::span)
        {
            self.findings.report(
                &at,
                "by = \"trace_id\" without signatures = \"require\": an unsigned event could hide a good one",
                "write by = \"event\" or require signatures",
            );
        }
        Some(Dedup { by: by?, window: window? })
    }

    fn request_path(&mut self, text: Text) -> Option<String> {
        // RFC 3986, section 3.3: pchar and the slash.
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@%/".contains(&byte);

        let path = text.get_ref();
        let hint = if !path.starts_with('/') {
            "begin it with `/`"
        } else if path.contains(['?', '#']) {
            "leave out the query and the fragment"
        } else if !path.bytes().all(legal) {
            "use letters, digits and `-`, `_`, `.`, `/` only, and no spaces"
        } else {
            return Some(text.into_inner());
        };
        self.findings.report(&text.span(), format!("`{path}` is no path of a request"), hint);
        None
    }

    pub(super) fn unique_paths(&mut self, sources: &[(Range<usize>, Source)]) {
        let mut seen: HashMap<&str, &Source> = HashMap::new();
        for (at, source) in sources {
            // One slash at the end makes no other path.
            let path = source.path.strip_suffix('/').unwrap_or(&source.path);
            if let Some(first) = seen.insert(path, source) {
                self.findings.report(
                    at,
                    format!(
                        "the sources `{}` and `{}` share the path `{}`",
                        first.name, source.name, source.path
                    ),
                    "give each its own path",
                );
            }
        }
    }
}

/// An IPv4 network that is written as IPv6 (RFC 4291, section 2.5.5.2), as it is compared with addresses.
fn as_ipv4(network: IpNet) -> IpNet {
    let IpNet::V6(mapped) = network else { return network };
    let length = mapped.prefix_len().checked_sub(96);
    match (mapped.addr().to_ipv4_mapped(), length) {
        (Some(address), Some(length)) => Ipv4Net::new(address, length).map_or(network, IpNet::V4),
        _ => network,
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{GOOD, accepted, problems, refused, resolve_text};
    use super::*;

    #[test]
    fn senders_can_be_known_by_their_networks() {
        let path = "path = \"/us\"";
        let with = |networks: &str| format!("{path}\nallow = {networks}");
        accepted(path, &with("[\"192.0.2.0/24\", \"2001:db8::/32\", \"198.51.100.7\", \"::1\"]"));
        let mapped = GOOD.replace(path, &with("[\"::ffff:192.0.2.7\", \"::ffff:192.0.2.0/120\"]"));
        let config = resolve_text(&mapped, Secrets::Require).unwrap();
        assert_eq!(
            config.sources[0].allow,
            ["192.0.2.7/32", "192.0.2.0/24"].map(|text| text.parse().unwrap())
        );
        refused(path, &with("[]"), "7: `allow` is an empty array: it lets nobody send; remove it");
        for wrong in ["192.0.2.1/24", "192.0.2", "example.com", "192.0.2.0/33", ""] {
            let text = with(&format!("[\"{wrong}\"]"));
            refused(path, &text, &format!("7: `{wrong}` in `allow` is no network; write an address"));
        }
    }

    #[test]
    fn source_paths_are_paths_and_unique() {
        for path in ["us", "", "/us?x=1", "/us#x", "/u s", "/ü", "https://x/us"] {
            refused("\"/us\"", &format!("\"{path}\""), &format!("6: `{path}` is no path of a request; "));
        }
        accepted("\"/us\"", "\"/a%20b/c-d_e.f~g\"");
        let twin = "[sources.eu]\npath = \"/us\"\nauthorization = { env = \"TOKEN\" }\njwks.file = \"j\"\n";
        assert_eq!(
            problems(&(GOOD.to_owned() + twin)),
            ["5: the sources `eu` and `us` share the path `/us`; give each its own path"]
        );
    }

    #[test]
    fn a_source_says_who_may_send() {
        let secret = "{ value = \"Bearer abc\" }";
        refused(secret, "[]", "7: `authorization` is an empty array");
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
             (os error 2); create `/nonexistent/base/tokens/us` and let the daemon's user read it",
        );
    }

    #[test]
    fn missing_secrets_can_be_left_unread_but_wrong_ones_not() {
        for form in ["{ file = \"tokens/us\" }", "{ env = \"NONE\" }", "{ credential = \"us\" }"] {
            let text = GOOD.replace("{ value = \"Bearer abc\" }", form);
            let config = resolve_text(&text, Secrets::SkipMissing).unwrap();
            assert!(!config.sources[0].authorization[0].matches(b""));
        }
        let text = GOOD.replace("Bearer abc", "");
        assert!(resolve_text(&text, Secrets::SkipMissing).is_err());
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
        refused(
            jwks,
            "jwks = { file = \"y\", refresh = \"1h\" }",
            "8: `refresh` with a `jwks` that has no url",
        );
        refused(jwks, "jwks = { url = \"http://us.example.com/\" }", "8: `url` of `jwks`: ");
        refused(jwks, "jwks = { url = \"nonsense\" }", "8: `url` of `jwks`: ");
        refused(
            jwks,
            "jwks = { url = \"https://x/\", refresh = \"0s\" }",
            "8: `0s` is no time for `refresh`",
        );
        refused(jwks, "jwks = { url = \"https://x/\", token = {} }", "8: the secret has no origin");
        refused(
            jwks,
            "jwks = { url = \"https://x/\", token = { value = \"Bearer x\" } }",
            "8: the token of `jwks` contains a space; write the token alone",
        );
        accepted(jwks, "jwks = { url = \"http://localhost:1/\" }");
        accepted(
            jwks,
            &format!("jwks = {{ url = \"https://x/\", pin = [\"{KEY}\"], revoked = [\"{KEY}\"] }}"),
        );
        refused(jwks, "jwks = { url = \"https://x/\", pin = [] }", "8: `pin` of `jwks` names no key");
        refused(
            jwks,
            "jwks = { url = \"https://x/\", revoked = [\"k1\"] }",
            "8: `revoked` of `jwks`: `k1` is no thumbprint; write the key's thumbprint (RFC 7638)",
        );
        refused(
            jwks,
            "jwks = { url = \"https://x/\", retired_for = \"soon\" }",
            "8: `soon` is no time for `retired_for`",
        );
        accepted(jwks, &format!("jwks = {{ keys = [\"{KEY}\"] }}"));
        refused(jwks, "jwks = { keys = [] }", "8: `keys` of `jwks` lists no key");
        refused(
            jwks,
            "jwks = { keys = [\"AAAA\"] }",
            "8: a key of `jwks` has an x of 3 bytes, but an Ed25519 public key has 32",
        );
        let weak = format!("jwks = {{ keys = [\"{}\"] }}", "A".repeat(43));
        refused(jwks, &weak, "8: a key of `jwks` is weak");
        let both = format!("jwks = {{ keys = [\"{KEY}\"], pin = [\"k1\"] }}");
        refused(jwks, &both, "8: `pin` with a `jwks` that has `keys`");
    }

    #[test]
    fn trace_ids_are_believed_only_when_signed() {
        for signatures in ["off", "accept-unsigned"] {
            let written =
                format!("signatures = \"{signatures}\"\ndedup = {{ by = \"trace_id\" }}\n[sinks.good]");
            let text = GOOD
                .replace("[sinks.good]", &written)
                .replace("\"quarantine\"", "[\"quarantine\", \"unverified\"]");
            let found = problems(&text);
            assert_eq!(found.len(), 1, "{found:#?}");
            assert!(
                found[0].starts_with("10: by = \"trace_id\" without signatures = \"require\""),
                "{found:#?}"
            );
        }
    }
}
