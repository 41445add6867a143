//! A body: its coding, the caps, and the lines in it.

#![no_main]

use std::io::Read as _;

use auditgate::wire::batch::{Caps, Coding, DecodeError, Packing, decode, encode};
use libfuzzer_sys::{Corpus, fuzz_target};

fuzz_target!(|input: &[u8]| -> Corpus {
    let Some((&how, body)) = input.split_first() else { return Corpus::Reject };
    let caps = Caps {
        decoded: [1 << 20, 200_000, 64, 0][usize::from(how & 3)],
        lines: [1000, 3][usize::from(how >> 2 & 1)],
    };
    let declared = [None, Some("application/gzip"), Some("identity"), Some("br")][usize::from(how >> 3 & 3)];
    check(declared, body, caps);
    // The same as the content of good gzip.
    if how & 32 != 0 {
        check(None, &encode(body).expect("gzip"), caps);
    }
    Corpus::Keep
});

fn check(declared: Option<&str>, body: &[u8], caps: Caps) {
    let Ok(coding) = Coding::of(declared, body) else {
        assert!(declared == Some("br") && !body.starts_with(b"\x1f\x8b"));
        return;
    };
    // The reserved memory covers the decoded bytes, and stays near the cap.
    let mut reserved = 0;
    let decoded = decode(body, coding, caps, &mut |bytes| {
        reserved += bytes;
        true
    });
    assert!(reserved <= caps.decoded + (128 << 10), "{reserved}");

    let plain = match coding {
        Coding::Identity => Ok(body.to_vec()),
        // No bytes, no member.
        Coding::Gzip if body.is_empty() => Ok(Vec::new()),
        Coding::Gzip => {
            let inflate = |bytes: &[u8]| {
                let mut plain = Vec::new();
                let reader = flate2::read::MultiGzDecoder::new(bytes);
                reader.take(caps.decoded as u64 + 1).read_to_end(&mut plain).map(|_| plain)
            };
            // A body compressed twice is inflated twice.
            inflate(body)
                .and_then(|once| if once.starts_with(b"\x1f\x8b") { inflate(&once) } else { Ok(once) })
        }
    };
    let lines = |plain: &[u8]| -> Vec<Vec<u8>> {
        // A byte order mark in front belongs to no line.
        let text = plain.strip_prefix(b"\xef\xbb\xbf").unwrap_or(plain);
        text.split(|byte| *byte == b'\n')
            .map(|line| line.strip_suffix(b"\r").unwrap_or(line).to_vec())
            .filter(|line| line.iter().any(|byte| !b" \t\r".contains(byte)))
            .collect()
    };
    match (decoded, plain) {
        (Ok(decoded), Ok(plain)) => {
            assert!(plain.len() <= caps.decoded);
            let ours: Vec<Vec<u8>> = decoded.lines().map(<[u8]>::to_vec).collect();
            assert_eq!(ours, lines(&plain));
            assert!(ours.len() <= caps.lines);
            assert_eq!(decoded.into_bytes(), plain);
            // An accepted body can be decoded again, without caps.
            let packing = Packing::Lines(coding);
            let again = packing.unpack(body).expect("it was decoded before");
            assert!(packing.lines(&again).eq(ours.iter().map(Vec::as_slice)));
        }
        (Err(DecodeError::TooLarge(_)), Ok(plain)) => assert!(plain.len() > caps.decoded),
        (Err(DecodeError::TooManyLines(_)), Ok(plain)) => assert!(lines(&plain).len() > caps.lines),
        // The damage may be behind the first byte beyond the cap.
        (Err(DecodeError::TooManyLines(_) | DecodeError::TooLarge(_)), Err(_)) => {}
        (Err(DecodeError::Undecodable(_)), Err(_)) => {}
        (Err(DecodeError::Undecodable(_)), Ok(plain)) => assert!(plain.len() > caps.decoded),
        (ours, theirs) => panic!("{ours:?} and {theirs:?}"),
    }
}
