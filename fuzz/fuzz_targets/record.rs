//! The daemon's records, read from files with any content and written for any line.

#![no_main]

use auditgate::wire::event::Reason;
use auditgate::wire::line::Line;
use auditgate::wire::record::{Kind, Quarantined, read, write_quarantined};
use auditgate_fuzz::oracle::one_harmless_line;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some(saved) = read(bytes)
        && let Ok(line) = Line::parse(&saved.raw)
        && let Kind::Accepted(claims) = saved.kind
    {
        // Any result is right, but not a panic.
        let _ = claims.hold_for(&line);
    }
    let detail = String::from_utf8_lossy(bytes);
    let record = Quarantined {
        received_at: i64::MAX,
        source: &detail,
        reason: Reason::Malformed,
        detail: &detail,
        raw: bytes,
    };
    let mut written = Vec::new();
    write_quarantined(&mut written, &record);
    let saved = read(one_harmless_line(&written).as_bytes()).expect("our own record");
    assert_eq!(saved.raw.as_ref(), bytes);
    assert!(matches!(saved.kind, Kind::Quarantined(about) if about.reason == "malformed"));
});
