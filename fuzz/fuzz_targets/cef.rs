//! A line that is not JSON: header, extension, ambiguous keys, and writing it again.

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
        // A written line is read as the same event, by the naive reader too.
        assert!(check_line(&written));
        assert_eq!(Line::parse(&written).expect("our own line").event(), read.event());
    }
    Corpus::Keep
});
