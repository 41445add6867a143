use std::collections::BTreeMap;

use super::*;
use crate::escape::is_hazardous;
use crate::observe::health::Problem;

const NOW: i64 = 1_800_000_000;

fn problem(condition: &str, problem: &str) -> Problem {
    Problem { condition: condition.to_owned(), problem: problem.to_owned() }
}

fn source(name: &str) -> SourceReport {
    SourceReport {
        name: name.to_owned(),
        path: "/konnect/us".to_owned(),
        signatures: "require".to_owned(),
        last_event_at: Some(NOW - 3),
        minute_rate: 12.345,
        hour_rate: 0.001,
        lines: [("accepted", 1_234_567), ("duplicate", 12), ("bad_signature", 4), ("unsigned", 1)]
            .map(|(outcome, lines)| (outcome.to_owned(), lines))
            .into(),
        mean_delay_seconds: Some(1.25),
        keys: Some(KeysReport {
            count: 2,
            retired: 1,
            refreshed_at: Some(NOW - 240),
            ..KeysReport::default()
        }),
    }
}

fn error() -> ErrorReport {
    ErrorReport {
        time: NOW - 30,
        error: "cannot write /x: no space".to_owned(),
        advice: "make room".to_owned(),
    }
}

fn healthy() -> StatusReport {
    StatusReport {
        version: "1.2.3".to_owned(),
        time: NOW,
        started_at: NOW - 3 * 86_400,
        ready: true,
        listener: "https://0.0.0.0:8443".to_owned(),
        sources: vec![source("us")],
        sinks: vec![SinkReport {
            name: "verified".to_owned(),
            kind: "file".to_owned(),
            target: "/var/log/auditgate/verified.log".to_owned(),
            delivered: 1_234_567,
            ..SinkReport::default()
        }],
        certificate: Some(CertificateReport {
            names: vec!["CN=log".to_owned(), "log.example.com".to_owned()],
            not_after: Some(NOW + 89 * 86_400 + 5),
        }),
        ledger: LedgerReport { bytes: 3 << 20, backlog_limit_bytes: 4 << 30, ..LedgerReport::default() },
        configuration: ConfigurationReport {
            file: "/etc/auditgate/config.toml".to_owned(),
            loaded_at: NOW - 3_600,
            ..ConfigurationReport::default()
        },
        ..StatusReport::default()
    }
}

#[test]
fn a_healthy_daemon_is_short() {
    let text = report(&healthy());
    let expected = "\
auditgate 1.2.3 is ready; running for 3 d, at 2027-01-15 08:00:00 UTC

SOURCE              last event  /s 1min   /s 1h  accepted  duplicate quarantined
us                     3 s ago       12   <0.01   1234567         12           5
  /konnect/us; signatures: require; 2 keys (1 retired) read 4 min ago; mean
    delay 1.2 s

SINK                   pending      oldest     delivered     /s 1min      errors
verified                     0           -       1234567           0           0
  file /var/log/auditgate/verified.log

certificate    valid for 89 d, until 2027-04-14; CN=log, log.example.com
ledger         3.0 MiB; backlog 0 B of 4.0 GiB, of it quarantined 0 B of 0 B
configuration  /etc/auditgate/config.toml, loaded 60 min ago
listener       https://0.0.0.0:8443
";
    assert_eq!(text, expected, "{text}");
}

#[test]
fn problems_come_first_and_say_what_to_do() {
    let mut status = healthy();
    status.ready = false;
    status.problems = vec![problem("sink verified", "cannot write /x: no space")];
    status.warnings = vec![problem("configuration", "not reloaded")];
    status.sinks[0].failing_since = Some(NOW - 300);
    status.sinks[0].last_error = Some(error());
    status.sinks[0].skipped = 7;
    status.sources[0].keys = Some(KeysReport { refresh_error: Some(error()), ..KeysReport::default() });
    status.certificate = Some(CertificateReport { names: vec![], not_after: Some(NOW - 86_400 * 5) });
    status.configuration.reload_at = Some(NOW - 10);
    status.configuration.reload_error = Some("line 3".to_owned());
    let text = report(&status);
    let head: Vec<_> = text.lines().take(3).collect();
    assert!(head[0].contains("is NOT READY"), "{text}");
    assert_eq!(
        head[1..],
        ["problem: sink verified: cannot write /x: no space", "warning: configuration: not reloaded"]
    );
    for words in [
        "  FAILING for 5 min; last error 30 s ago: cannot write /x: no space\n    what to do: make room\n",
        "; NO KEYS",
        "  keys not refreshed; last error 30 s ago: ",
        "; 7 LOST (skipped)",
        "EXPIRED 5 d ago, on ",
        "last reload FAILED 10 s ago: line 3\n",
    ] {
        assert!(text.contains(words), "{words} is not in\n{text}");
    }
    // A sink that works again is no longer anything to act on.
    status.sinks[0].failing_since = None;
    let text = report(&status);
    assert!(text.contains("  works again; last error 30 s ago: cannot write /x: no space\n"), "{text}");
    assert_eq!(text.matches("what to do").count(), 1, "only that of the keys: {text}");
}

#[test]
fn nothing_is_wider_than_the_terminal_or_controls_it() {
    let hostile = format!("\x1b]0;title\x07\u{202e}{}\n", "x".repeat(300));
    let most = u64::MAX;
    let error = || Some(ErrorReport { time: i64::MIN / 2, error: hostile.clone(), advice: hostile.clone() });
    let status = StatusReport {
        version: hostile.clone(),
        time: NOW,
        problems: vec![problem(&hostile, &hostile)],
        warnings: vec![problem(&hostile, "many words ".repeat(50).trim())],
        configuration: ConfigurationReport {
            file: hostile.clone(),
            reload_at: Some(0),
            reload_error: Some(hostile.clone()),
            ..ConfigurationReport::default()
        },
        listener: hostile.clone(),
        certificate: Some(CertificateReport { names: vec![hostile.clone(); 3], not_after: Some(i64::MAX) }),
        ledger: LedgerReport {
            bytes: i64::MAX,
            backlog_bytes: most,
            backlog_limit_bytes: most,
            quarantine_bytes: most,
            quarantine_limit_bytes: most,
        },
        sources: vec![SourceReport {
            name: "n".repeat(64),
            last_event_at: Some(0),
            minute_rate: 1e12,
            hour_rate: 1e12,
            lines: BTreeMap::from([
                ("accepted".to_owned(), most / 4),
                ("duplicate".to_owned(), most / 4),
                ("unsigned".to_owned(), most / 4),
            ]),
            mean_delay_seconds: Some(f64::MAX),
            keys: Some(KeysReport {
                count: i64::MAX,
                retired: i64::MAX,
                refreshed_at: Some(0),
                refresh_errors: most,
                refresh_error: error(),
            }),
            ..source("")
        }],
        sinks: vec![SinkReport {
            name: hostile.clone(),
            kind: "syslog".to_owned(),
            target: hostile.clone(),
            pending: i64::MAX,
            oldest_pending_seconds: 1e10,
            delivered: most,
            minute_rate: 1e12,
            errors: most,
            truncated: most,
            skipped: most,
            failing_since: Some(0),
            stuck_since: Some(0),
            last_error: error(),
        }],
        quarantine: vec![QuarantineReport {
            source: "n".repeat(64),
            reason: "undecodable_body".to_owned(),
            total: most,
            last_hour: most,
            last_at: Some(0),
        }],
        ..StatusReport::default()
    };
    let text = report(&status);
    for line in text.lines() {
        assert!(line.chars().count() <= WIDTH, "{} characters: {line}\n{text}", line.chars().count());
        assert!(!line.contains(is_hazardous), "{line:?}");
    }
}

#[test]
fn long_words_are_broken_and_none_is_lost() {
    let text = format!("begin {} end", "y".repeat(200));
    let written = lines(&text);
    assert_eq!(written.replace(['\n', ' '], ""), text.replace(' ', ""));
    assert!(written.lines().all(|line| line.chars().count() <= WIDTH), "{written}");
    assert_eq!(lines(""), "\n");
}

#[test]
fn a_sender_tells_of_its_deliveries() {
    let webhook = WebhookReport {
        webhook_status: "inactive".to_owned(),
        is_paused: true,
        last_attempt_at: Some("2027-01-15T08:00:00Z".to_owned()),
        last_response_code: Some(404),
        last_response_message: Some("audit.example.com answered 404: check the path of the URL".to_owned()),
        accepted: 7,
        ..WebhookReport::default()
    };
    let page = report(&StatusReport { webhook: Some(webhook), certificate: None, ..healthy() });
    for words in [
        "webhook        inactive, PAUSED until the cause is fixed; last post at",
        "2027-01-15T08:00:00Z, status 404",
        "audit.example.com answered 404: check the path of the URL",
        "receipts       accepted 7, duplicates 0, quarantined 0, set aside 0",
    ] {
        assert!(page.contains(words), "{page}");
    }
    assert!(!page.contains("certificate") && !page.contains("listener"), "{page}");
    assert!(page.lines().all(|line| line.chars().count() <= WIDTH), "{page}");
}

#[test]
fn a_screen_is_overwritten_and_never_scrolled() {
    let text = "a\nb\nc\nd\n";
    assert_eq!(screen(text, 0, true), "\x1b[2J\x1b[H\x1b[Ka\n\x1b[Kb\n\x1b[Kc\n\x1b[Kd\n\x1b[J");
    assert_eq!(screen(text, 5, false), "\x1b[H\x1b[Ka\n\x1b[Kb\n\x1b[Kc\n\x1b[Kd\n\x1b[J");
    assert_eq!(screen(text, 4, false), "\x1b[H\x1b[Ka\n\x1b[Kb\n\x1b[K... 2 more lines\n\x1b[J");
}

#[test]
fn numbers_stay_exact_as_long_as_they_fit() {
    assert_eq!([0, 999_999_999, 1_234_567_890].map(count), ["0", "999999999", "1.2 G"]);
    assert_eq!([0.0, 0.001, 1.5, 123.4].map(rate), ["0", "<0.01", "1.50", "123"]);
    assert_eq!(
        [-5, 0, 119, 120, 7_199, 7_200, 172_800].map(duration),
        ["0 s", "0 s", "119 s", "2 min", "119 min", "2 h", "2 d"]
    );
}
