//! Which bytes are signed: a line signed again is accepted, and a changed one is not.

#![no_main]

use auditgate::send;
use auditgate::wire::line::Line;
use auditgate::wire::signature;
use auditgate_fuzz::oracle::is_verified;
use auditgate_fuzz::{SIGNING_KEY, naive};
use ed25519_dalek::Signer as _;
use libfuzzer_sys::{Corpus, fuzz_target};

fuzz_target!(|input: &[u8]| -> Corpus {
    let Some((&how, rest)) = input.split_first() else { return Corpus::Reject };
    let Some((&at, rest)) = rest.split_first() else { return Corpus::Reject };
    let Some((&other, line)) = rest.split_first() else { return Corpus::Reject };
    if line.contains(&b'\n') {
        return Corpus::Reject;
    }
    is_verified(line);
    let Some(read) = naive::read(line) else { return Corpus::Keep };

    // The value of the signature is replaced by a valid one over one of the messages.
    if let (Some(value), false) = (&read.signature, read.messages.is_empty()) {
        let message = &read.messages[usize::from(how) % read.messages.len()];
        let good = signature::encode(&SIGNING_KEY.sign(message).to_bytes());
        // The message surrounds the value: both have the same bytes before the cut.
        let start = place(line, value, message);
        let signed = [&line[..start], good.as_bytes(), &line[start + value.len()..]].concat();
        assert!(is_verified(&signed), "a good signature: {}", String::from_utf8_lossy(&signed));
        let at = usize::from(at) * signed.len() / 256;
        if signed[at] != other && other != b'\n' {
            let mut changed = signed.clone();
            changed[at] = other;
            assert!(!is_verified(&changed), "byte {at} of {}", String::from_utf8_lossy(&signed));
        }
    }

    // And what we sign ourselves as a sender is accepted.
    if let Ok(read) = Line::parse(line)
        && let Ok(signed) = send::line(
            read.format(),
            &read.event(),
            Some(&send::SigningKey::from_seed(&SIGNING_KEY.to_bytes())),
        )
    {
        assert!(is_verified(&signed), "our own signature: {}", String::from_utf8_lossy(&signed));
    }
    Corpus::Keep
});

/// Returns the position of the signature's value: the one occurrence without which the rest is the
/// message.
fn place(line: &[u8], value: &[u8], message: &[u8]) -> usize {
    let naive_message = |start: usize| {
        let mut marked = line.to_vec();
        marked.splice(start..start + value.len(), *b"~");
        naive::read(&marked).is_some_and(|read| {
            read.signature.as_deref() == Some(b"~") && read.messages.iter().any(|found| found == message)
        })
    };
    (0..=line.len() - value.len())
        .find(|start| line[*start..].starts_with(value) && naive_message(*start))
        .expect("the value stands in the line")
}
