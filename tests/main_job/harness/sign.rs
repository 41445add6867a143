//! A producer that shares no code with the daemon.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ed25519_dalek::{Signer as _, SigningKey};

/// A signing key and the events that it signs.
pub(crate) struct Producer {
    key: SigningKey,
}

impl Producer {
    /// Returns the producer with that number, which always has the same key.
    pub(crate) fn new(number: u8) -> Self {
        Self { key: SigningKey::from_bytes(&[number; 32]) }
    }

    /// Returns the public key as a JWKS document.
    pub(crate) fn jwks(&self) -> String {
        jwks(&[("key-1", &self.public())])
    }

    /// Returns the public key.
    pub(crate) fn public(&self) -> [u8; 32] {
        self.key.verifying_key().to_bytes()
    }

    /// Signs a message, and returns the signature as Konnect writes it.
    pub(crate) fn signature(&self, message: &str) -> String {
        URL_SAFE_NO_PAD.encode(self.key.sign(message.as_bytes()).to_bytes())
    }

    /// Signs a CEF line.
    pub(crate) fn sign_cef(&self, line: &str) -> String {
        format!("{line} sig={}", self.signature(line))
    }

    /// Signs a JSON object; the signature is the last member.
    pub(crate) fn sign_json(&self, object: &str) -> String {
        let open = object.strip_suffix('}').unwrap();
        format!("{open},\"sig\":\"{}\"}}", self.signature(object))
    }

    /// Returns the signed event with that number, dated in May 2023: CEF, JSON and CPS in turn.
    pub(crate) fn event(&self, number: u64) -> String {
        let rt = 1_684_454_619_000 + number;
        match number % 3 {
            0 => self.sign_cef(&cef(number, &format!("rt={rt}"))),
            1 => self.sign_json(&json(number, rt)),
            _ => {
                let inner = self.sign_json(&json(number, rt));
                format!("{{\"event\":{inner}}}")
            }
        }
    }

    /// Returns the signed events with these numbers.
    pub(crate) fn events(&self, numbers: std::ops::Range<u64>) -> Vec<String> {
        numbers.map(|number| self.event(number)).collect()
    }
}

/// Returns an unsigned authorization event in CEF; `rt` is the whole pair, or empty.
pub(crate) fn cef(number: u64, rt: &str) -> String {
    format!(
        "2023-05-19T00:03:39Z konghq.com CEF:0|KongInc|Konnect|1.0|konnect|Authz.usage|1|{rt} src=127.0.0.6 \
         action=retrieve granted=true org_id=b065b594 principal_id=87655c36 actor_id= trace_id={number} \
         user_agent=grpc-node/1.24.11 grpc-c/8.0.0 (linux; chttp2; ganges)"
    )
}

/// Returns an unsigned access event in JSON.
pub(crate) fn json(number: u64, rt: u64) -> String {
    format!(
        "{{\"cef_version\":0,\"event_class_id\":\"khcp\",\"event_product\":\"Konnect\",\"event_ts\":\
         \"2023-05-19T00:03:39Z\",\"event_vendor\":\"KongInc\",\"event_version\":\"1.0\",\"name\":\"Ingress\",\
         \"org_id\":\"b065b594\",\"principal_id\":\"87655c36\",\"query\":\"{{\\\"end\\\":\\\"{number}\\\"}}\",\
         \"request\":\"/v2/\\u00fc/{number}\",\"rt\":{rt},\"severity\":1,\"src\":\"127.0.0.6\",\"status\":200,\
         \"trace_id\":\"{number}\",\"user_agent\":\"Grüße/1.0\"}}"
    )
}

/// Returns a JWKS document (RFC 7517, RFC 8037).
pub(crate) fn jwks(keys: &[(&str, &[u8; 32])]) -> String {
    let keys: Vec<_> = keys
        .iter()
        .map(|(kid, key)| {
            serde_json::json!({
                "alg": "EdDSA", "crv": "Ed25519", "kid": kid, "kty": "OKP", "x": URL_SAFE_NO_PAD.encode(key),
            })
        })
        .collect();
    serde_json::json!({ "keys": keys }).to_string()
}
