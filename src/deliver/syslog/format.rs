//! One line as one syslog message (RFC 5424). Pure.
//!
//! | part | what it holds |
//! | --- | --- |
//! | facility | as configured |
//! | severity | [`severity_of`] the event; `warning` in quarantine |
//! | TIMESTAMP | the event's own time in UTC with milliseconds, or that of its arrival |
//! | HOSTNAME, PROCID | this machine, this process |
//! | APP-NAME | as configured |
//! | MSGID | the stream, so that a receiver can tell verified lines from others |
//! | STRUCTURED-DATA | `-` or, when asked for, where the line came from and what was found out |
//! | MSG | the line as it came; in quarantine its JSON record |
//!
//! MSG begins without the byte order mark that RFC 5424, section 6.4, asks for before UTF-8:
//! rsyslog and syslog-ng hand it on as text, and the line would no longer be the one that was
//! signed.

use std::io::Write as _;

use crate::deliver::sink::Item;
use crate::escape::escape;
use crate::net::{Facility, SMALLEST_MAX_SIZE};
use crate::wire::event::{Stream, Verdict};
use crate::wire::line::Line;
use crate::wire::record::{self};

/// Maximum length of HOSTNAME, in bytes (RFC 5424, section 6).
const LONGEST_HOSTNAME: usize = 255;

/// The element of our structured data. 32473 is the enterprise number for documentation (RFC 5612),
/// since auditgate has none of its own.
const ELEMENT: &str = "auditgate@32473";

/// Severities (RFC 5424, table 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// 3
    Error = 3,
    /// 4
    Warning = 4,
    /// 5
    Notice = 5,
    /// 6
    Informational = 6,
}

/// Returns the severity of an event, from its own. Konnect's are CEF's: 0 to 10, or words.
///
/// 0 to 3, `Low`: informational. 4 and 5, `Medium`: notice. 6 to 8, `High`: warning. 9, 10,
/// `Very-High`: error. One that is missing, ambiguous or something else: informational.
pub fn severity_of(written: Option<&str>) -> Severity {
    match written {
        Some("4" | "5" | "Medium") => Severity::Notice,
        Some("6" | "7" | "8" | "High") => Severity::Warning,
        Some("9" | "10" | "Very-High") => Severity::Error,
        _ => Severity::Informational,
    }
}

/// Parts that all messages have in common.
#[derive(Clone, Debug)]
pub(super) struct Formatter {
    facility: Facility,
    /// HOSTNAME APP-NAME PROCID.
    origin: String,
    structured_data: bool,
    max_size: usize,
}

impl Formatter {
    /// Creates a formatter. Characters of `hostname` that a header cannot hold are left out.
    /// `app_name` must be valid by [`is_app_name`](crate::net::is_app_name). `max_size` is in
    /// bytes, at least [`SMALLEST_MAX_SIZE`].
    pub(super) fn new(
        facility: Facility,
        hostname: &str,
        app_name: &str,
        process_id: u32,
        structured_data: bool,
        max_size: usize,
    ) -> Self {
        let mut host: String = hostname.chars().filter(char::is_ascii_graphic).collect();
        host.truncate(LONGEST_HOSTNAME);
        let host = if host.is_empty() { "-" } else { &host };
        let origin = format!("{host} {app_name} {process_id}");
        Self { facility, origin, structured_data, max_size: max_size.max(SMALLEST_MAX_SIZE) }
    }

    /// Appends the message for a line, which never holds a line feed. Returns whether something of
    /// it had to be left out: the end of MSG, or structured data that alone is too long.
    pub(super) fn write(&self, out: &mut Vec<u8>, item: &Item<'_>) -> bool {
        let start = out.len();
        let limit = start + self.max_size;
        // A quarantined line may hold anything.
        let line = match item.verdict {
            Verdict::Rejected { .. } => None,
            Verdict::Verified { .. } | Verdict::Unverified => Line::parse(item.raw).ok(),
        };
        self.write_header(out, item, line.as_ref());
        let mut is_cut = false;
        let data = out.len();
        if self.structured_data {
            write_structured_data(out, item, line.as_ref());
            is_cut = out.len() > limit;
        }
        if is_cut || !self.structured_data {
            out.truncate(data);
            out.push(b'-');
        }
        out.push(b' ');
        let message = out.len();
        write_message(out, item);
        if out.len() > limit {
            let mut end = limit.max(message);
            while end > message && is_inside_character(out[end]) {
                end -= 1;
            }
            out.truncate(end);
            is_cut = true;
        }
        is_cut
    }

    /// Appends everything up to the space before STRUCTURED-DATA.
    fn write_header(&self, out: &mut Vec<u8>, item: &Item<'_>, line: Option<&Line<'_>>) {
        let stream = item.verdict.stream();
        let severity = match stream {
            Stream::Quarantine => Severity::Warning,
            Stream::Verified | Stream::Unverified => {
                severity_of(line.and_then(|line| line.text("severity")).as_deref())
            }
        };
        let priority = self.facility.code() * 8 + severity as u8;
        let mut times = line.and_then(Line::time).into_iter().chain([item.received_at]);
        // Writing into memory cannot fail.
        let _ = write!(out, "<{priority}>1 ");
        match times.find(|time| is_four_digit_year(*time)) {
            Some(time) => record::write_time_stamp(out, time),
            None => out.push(b'-'),
        }
        for part in [&self.origin, stream.as_str()] {
            out.push(b' ');
            out.extend_from_slice(part.as_bytes());
        }
        out.push(b' ');
    }
}

/// Returns whether a time can be written. RFC 3339 has years of four digits only; a sender can
/// write any number into `rt`.
fn is_four_digit_year(milliseconds: i64) -> bool {
    const YEAR_0: i64 = -62_167_219_200_000;
    const YEAR_10000: i64 = 253_402_300_800_000;
    (YEAR_0..YEAR_10000).contains(&milliseconds)
}

/// Appends one element (RFC 5424, section 6.3): only what we know ourselves, and the trace ID of an
/// accepted line.
fn write_structured_data(out: &mut Vec<u8>, item: &Item<'_>, line: Option<&Line<'_>>) {
    out.push(b'[');
    out.extend_from_slice(ELEMENT.as_bytes());
    write_parameter(out, "source", item.source);
    if let Some(key_id) = item.key_id {
        write_parameter(out, "key_id", key_id);
    }
    if let Some((_, trace)) = line.and_then(Line::trace) {
        write_parameter(out, "trace_id", &trace);
    }
    if let Verdict::Rejected { reason, .. } = item.verdict {
        write_parameter(out, "reason", reason.as_str());
    }
    out.push(b']');
}

/// Appends a parameter. RFC 5424, section 6.3.3: `"`, `\` and `]` are escaped with a backslash.
/// Controls become text first, so that no value can break a line.
fn write_parameter(out: &mut Vec<u8>, name: &str, value: &str) {
    out.push(b' ');
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"=\"");
    let value = escape(value);
    let mut written = 0;
    for at in memchr::memchr3_iter(b'"', b'\\', b']', value.as_bytes()) {
        out.extend_from_slice(&value.as_bytes()[written..at]);
        out.push(b'\\');
        written = at;
    }
    out.extend_from_slice(&value.as_bytes()[written..]);
    out.push(b'"');
}

fn write_message(out: &mut Vec<u8>, item: &Item<'_>) {
    if matches!(item.verdict, Verdict::Rejected { .. }) {
        item.write_record(out);
        out.pop_if(|last| *last == b'\n');
    } else {
        out.extend_from_slice(item.raw);
    }
}

/// Returns whether a byte of UTF-8 continues a character.
fn is_inside_character(byte: u8) -> bool {
    byte & 0b1100_0000 == 0b1000_0000
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Position;
    use crate::wire::event::Reason;

    fn formatter(structured_data: bool, max_size: usize) -> Formatter {
        Formatter::new(Facility::LOCAL0, "host.example", "auditgate", 42, structured_data, max_size)
    }

    const VERIFIED: Verdict = Verdict::Verified { key: 0 };

    fn item<'a>(verdict: &'a Verdict, raw: &'a str) -> Item<'a> {
        Item {
            behind: Position::default(),
            received_at: 1_767_323_045_678,
            source: "us",
            verdict,
            key_id: matches!(verdict, Verdict::Verified { .. }).then_some("key-1"),
            raw: raw.as_bytes(),
        }
    }

    fn message(formatter: &Formatter, item: &Item<'_>) -> (String, bool) {
        let mut out = b"before".to_vec();
        let is_cut = formatter.write(&mut out, item);
        let out = String::from_utf8(out).unwrap();
        (out.strip_prefix("before").unwrap().to_owned(), is_cut)
    }

    #[test]
    fn an_event_is_one_message() {
        let raw = r#"{"rt":1684196881193,"severity":1,"trace_id":18446744073709551616,"name":"Zürich 日本"}"#;
        let (plain, is_cut) = message(&formatter(false, 2048), &item(&VERIFIED, raw));
        assert_eq!(
            plain,
            format!("<134>1 2023-05-16T00:28:01.193Z host.example auditgate 42 verified - {raw}")
        );
        assert!(!is_cut);
        let (full, _) = message(&formatter(true, 2048), &item(&VERIFIED, raw));
        assert_eq!(
            full,
            format!(
                "<134>1 2023-05-16T00:28:01.193Z host.example auditgate 42 verified \
                 [auditgate@32473 source=\"us\" key_id=\"key-1\" trace_id=\"18446744073709551616\"] {raw}"
            )
        );
        let cef = "2023-05-19T00:03:39Z konghq.com CEF:0|KongInc|Konnect|1.0|x|Ingress|7|src=1 trace_id=5";
        let (cef_message, _) = message(&formatter(true, 2048), &item(&Verdict::Unverified, cef));
        assert_eq!(
            cef_message,
            format!(
                "<132>1 2023-05-19T00:03:39.000Z host.example auditgate 42 unverified \
                 [auditgate@32473 source=\"us\" trace_id=\"5\"] {cef}"
            )
        );
    }

    #[test]
    fn severities_are_mapped() {
        use Severity::{Error, Informational, Notice, Warning};
        for (severity, expected) in [
            ("0", Informational),
            ("1", Informational),
            ("2", Informational),
            ("3", Informational),
            ("4", Notice),
            ("5", Notice),
            ("6", Warning),
            ("7", Warning),
            ("8", Warning),
            ("9", Error),
            ("10", Error),
            ("11", Informational),
            ("-1", Informational),
            ("1e1", Informational),
            ("\"10\"", Error),
            ("\"Low\"", Informational),
            ("\"Medium\"", Notice),
            ("\"High\"", Warning),
            ("\"Very-High\"", Error),
            ("\"\"", Informational),
            ("null", Informational),
            ("{}", Informational),
            ("10,\"severity\":10", Informational),
        ] {
            let (text, _) =
                message(&formatter(false, 2048), &item(&VERIFIED, &format!("{{\"severity\":{severity}}}")));
            assert!(text.starts_with(&format!("<{}>1 ", 128 + expected as u8)), "{severity}: {text}");
        }
        let (text, _) = message(&formatter(false, 2048), &item(&VERIFIED, "{}"));
        assert!(text.starts_with("<134>1 "), "{text}");
    }

    #[test]
    fn without_a_valid_time_the_arrival_is_used() {
        let stamp = |raw: &str, received_at: i64| {
            let item = Item { received_at, ..item(&VERIFIED, raw) };
            let (text, _) = message(&formatter(false, 2048), &item);
            text.split(' ').nth(1).unwrap().to_owned()
        };
        let arrival = "2026-01-02T03:04:05.678Z";
        for raw in [
            "{}",
            r#"{"rt":"3958q3097698"}"#,
            r#"{"rt":253402300800000}"#,
            r#"{"rt":9223372036854775807}"#,
            r#"{"rt":-62167219200001}"#,
        ] {
            assert_eq!(stamp(raw, 1_767_323_045_678), arrival, "{raw}");
        }
        assert_eq!(stamp(r#"{"rt":253402300799999}"#, 0), "9999-12-31T23:59:59.999Z");
        assert_eq!(stamp(r#"{"rt":-62167219200000}"#, 0), "0000-01-01T00:00:00.000Z");
        assert_eq!(stamp("{}", i64::MAX), "-");
    }

    #[test]
    fn a_quarantined_line_is_its_record_as_a_warning() {
        let verdict = Verdict::Rejected { reason: Reason::BadSignature, detail: "no key verifies it".into() };
        let raw = "{\"severity\":10,\"rt\":1,\"trace_id\":\"\\u000a\",\"x\":\"\u{1b}[31m\"}";
        let (text, _) = message(&formatter(true, 2048), &item(&verdict, raw));
        let expected = "<132>1 2026-01-02T03:04:05.678Z host.example auditgate 42 quarantine \
                        [auditgate@32473 source=\"us\" reason=\"bad_signature\"] \
                        {\"received_at\":\"2026-01-02T03:04:05.678Z\",\"source\":\"us\",\
                        \"reason\":\"bad_signature\",\"detail\":\"no key verifies it\",\"raw\":";
        assert!(text.starts_with(expected), "{text}");
        assert!(text.ends_with('}') && !text.contains(['\n', '\u{1b}']), "{text:?}");
        let binary = Item { raw: b"\xff\n", ..item(&verdict, "") };
        assert!(message(&formatter(false, 2048), &binary).0.ends_with("\"raw_base64\":\"/wo=\"}"));
    }

    #[test]
    fn no_value_can_end_the_structured_data() {
        let raw = r#"{"trace_id":"a\"b\\c]d [x y=\"z\"]\n<1>1 ü"}"#;
        let hostile = Item { key_id: Some("k\"]\\"), ..item(&VERIFIED, raw) };
        let (text, _) = message(&formatter(true, 2048), &hostile);
        assert!(
            text.contains(
                r#" [auditgate@32473 source="us" key_id="k\"\]\\" trace_id="a\"b\\c\]d [x y=\"z\"\]\\u{a}<1>1 ü"] {"#
            ),
            "{text}"
        );
        assert!(!text.contains('\n'));
    }

    #[test]
    fn a_message_is_truncated_at_a_character_and_never_in_its_header() {
        let head = message(&formatter(false, 2048), &item(&VERIFIED, "")).0.len();
        for padding in 0..8 {
            let raw = "x".repeat(padding) + &"日本ü🦀".repeat(100);
            let (text, is_cut) = message(&formatter(false, 500), &item(&VERIFIED, &raw));
            assert!(is_cut && (497..=500).contains(&text.len()), "{}", text.len());
            assert!(raw.starts_with(&text[head..]), "{text}");
        }
        let exact = "x".repeat(500 - head);
        let (text, is_cut) = message(&formatter(false, 500), &item(&VERIFIED, &exact));
        assert_eq!((text.len(), is_cut), (500, false));
        let (text, is_cut) = message(&formatter(false, 500), &item(&VERIFIED, &(exact + "x")));
        assert_eq!((text.len(), is_cut), (500, true));
    }

    #[test]
    fn structured_data_that_is_too_long_is_left_out() {
        let raw = format!("{{\"trace_id\":\"{}\"}}", "1".repeat(1000));
        let (text, is_cut) = message(&formatter(true, 600), &item(&VERIFIED, &raw));
        assert!(is_cut && text.len() == 600, "{text}");
        assert!(text.contains(" verified - {\"trace_id\":\"1"), "{text}");
    }

    #[test]
    fn every_header_fits_into_the_smallest_message() {
        let long = Formatter::new(Facility::LOCAL0, &"h".repeat(1000), &"a".repeat(48), u32::MAX, false, 0);
        let (text, is_cut) = message(&long, &item(&VERIFIED, &"x".repeat(1000)));
        assert!(is_cut && text.len() == SMALLEST_MAX_SIZE && text.contains(" verified - x"), "{text}");
    }

    #[test]
    fn a_host_name_is_reduced_to_printable_ascii() {
        for (hostname, shown) in [("", "-"), ("a b\n", "ab"), ("höst", "hst"), ("日本", "-")] {
            let formatter = Formatter::new(Facility::LOCAL0, hostname, "x", 1, false, 480);
            assert_eq!(formatter.origin, format!("{shown} x 1"));
        }
    }
}
