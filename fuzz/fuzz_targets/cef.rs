//! A line that is no JSON: header, extension, ambiguous keys, and the way back.

#![no_main]

use auditgate::wire::cef;
use auditgate::wire::line::Line;
use auditgate_fuzz::oracle::check_line;
use libfuzzer_sys::{Corpus, fuzz_target};

fuzz_target!(|line: &[u8]| -> Corpus {
    if line.trim_ascii_start().starts_with(b"{") || line.contains(&b'\n') {
        return Corpus::Reject;
    }
    if check_line(line)
        && let Ok(read) = Line::parse(line)
        && let Ok(written) = cef::write(&read.event())
    {
        // What is written is read as the same event, and by the naive reader too.
        assert!(check_line(&written));
        assert_eq!(Line::parse(&written).expect("our own line").event(), read.event());
    }
    Corpus::Keep
});
