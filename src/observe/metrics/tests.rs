use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::wire::event::class::{EventKind, EventSeverity};

fn metrics() -> Metrics {
    Metrics::new(&["us".into(), "eu".into()], &["verified".into(), "siem".into()]).unwrap()
}

fn text(metrics: &Metrics) -> String {
    String::from_utf8(metrics.render(TextFormat::Prometheus).unwrap()).unwrap()
}

/// Returns the name and labels of every series.
fn series(metrics: &Metrics) -> BTreeSet<String> {
    text(metrics)
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.rsplit_once(' ').unwrap().0.to_owned())
        .collect()
}

fn assert_has(text: &str, line: &str) {
    assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
}

#[test]
fn every_documented_metric_is_present_before_the_first_event() {
    let text = text(&metrics());
    for family in [
        "auditgate_http_requests_total counter",
        "auditgate_http_request_duration_seconds histogram",
        "auditgate_http_connections gauge",
        "auditgate_http_authorized_connections gauge",
        "auditgate_http_connections_closed_total counter",
        "auditgate_in_flight_bytes gauge",
        "auditgate_http_body_duration_seconds histogram",
        "auditgate_http_queue_duration_seconds histogram",
        "auditgate_received_bytes_total counter",
        "auditgate_decoded_bytes_total counter",
        "auditgate_accepted_events_total counter",
        "auditgate_ready gauge",
        "auditgate_warnings gauge",
        "auditgate_events_total counter",
        "auditgate_event_delay_seconds histogram",
        "auditgate_last_event_timestamp_seconds gauge",
        "auditgate_byte_order_marks_total counter",
        "auditgate_commit_duration_seconds histogram",
        "auditgate_ledger_bytes gauge",
        "auditgate_sink_events_total counter",
        "auditgate_sink_pending_events gauge",
        "auditgate_sink_oldest_pending_seconds gauge",
        "auditgate_sink_errors_total counter",
        "auditgate_sink_truncated_total counter",
        "auditgate_sink_skipped_events_total counter",
        "auditgate_jwks_keys gauge",
        "auditgate_jwks_retired_keys gauge",
        "auditgate_jwks_changes_total counter",
        "auditgate_jwks_refreshed_timestamp_seconds gauge",
        "auditgate_jwks_refresh_errors_total counter",
        "auditgate_config_reload_errors_total counter",
        "auditgate_tls_certificate_not_after_timestamp_seconds gauge",
        "auditgate_build_info gauge",
    ] {
        assert_has(&text, &format!("# TYPE {family}"));
    }
    for outcome in LineOutcome::ALL {
        assert_has(
            &text,
            &format!("auditgate_events_total{{outcome=\"{}\",source=\"eu\"}} 0", outcome.as_str()),
        );
    }
    for code in STATUS_CODES {
        assert_has(&text, &format!("auditgate_http_requests_total{{code=\"{code}\",source=\"\"}} 0"));
    }
    assert_has(&text, "auditgate_sink_events_total{sink=\"siem\"} 0");
    assert_has(&text, &format!("auditgate_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION")));
    if cfg!(target_os = "linux") {
        assert_has(&text, "# TYPE process_cpu_seconds_total counter");
        for name in [
            "resident_memory_bytes",
            "virtual_memory_bytes",
            "open_fds",
            "max_fds",
            "threads",
            "start_time_seconds",
        ] {
            assert_has(&text, &format!("# TYPE process_{name} gauge"));
        }
    }
}

#[test]
fn every_family_has_help() {
    let text = text(&metrics());
    for line in text.lines().filter(|line| line.starts_with("# TYPE auditgate_")) {
        let name = line.split(' ').nth(2).unwrap();
        let help = format!("# HELP {name} ");
        assert!(text.lines().any(|found| found.len() > help.len() && found.starts_with(&help)), "{name}");
    }
}

#[test]
fn an_outcome_is_counted_under_its_own_name() {
    for (index, outcome) in LineOutcome::ALL.into_iter().enumerate() {
        let metrics = metrics();
        metrics.events("us", outcome, index as u64 + 5);
        assert_has(
            &text(&metrics),
            &format!(
                "auditgate_events_total{{outcome=\"{}\",source=\"us\"}} {}",
                outcome.as_str(),
                index + 5
            ),
        );
    }
}

#[test]
fn an_accepted_event_is_counted_under_its_own_kind_and_severity() {
    let metrics = metrics();
    let classes = EventKind::ALL
        .into_iter()
        .flat_map(|kind| EventSeverity::ALL.into_iter().map(move |severity| EventClass { kind, severity }));
    let classes: Vec<_> = (1..).zip(classes).collect();
    classes.iter().for_each(|(n, class)| metrics.accepted_events("us", *class, *n));
    let text = text(&metrics);
    for (n, EventClass { kind, severity }) in classes {
        let (kind, severity) = (kind.as_str(), severity.as_str());
        let labels = format!("kind=\"{kind}\",severity=\"{severity}\"");
        assert_has(&text, &format!("auditgate_accepted_events_total{{{labels},source=\"us\"}} {n}"));
        assert_has(&text, &format!("auditgate_accepted_events_total{{{labels},source=\"eu\"}} 0"));
    }
}

#[test]
fn values_reach_their_series() {
    let metrics = metrics();
    metrics.http_request(Some("us"), 200, Duration::from_millis(2));
    metrics.http_request(None, 404, Duration::from_millis(1));
    metrics.http_body("us", 70, Duration::from_millis(30));
    metrics.batch("us", 700, Duration::from_millis(300));
    metrics.health(true, 2);
    metrics.last_event("us", 1_700_000_000);
    for (index, reason) in CloseReason::ALL.into_iter().enumerate() {
        (0..=index).for_each(|_| metrics.connection_ended(reason));
    }
    metrics.authorized_connections(3);
    metrics.in_flight_bytes(4096);
    metrics.commit(Duration::from_micros(50), Duration::from_micros(200));
    metrics.ledger_bytes(u64::MAX);
    metrics.sink_delivered("siem", 7);
    metrics.sink_pending("siem", 3, 1.5);
    metrics.sink_error("siem");
    metrics.sink_truncated("siem", 4);
    metrics.sink_skipped("siem", 6);
    metrics.jwks_keys("us", 2, 1);
    metrics.jwks_refreshed("us", 1_700_000_001, true);
    metrics.jwks_refresh_error("us");
    metrics.certificate_not_after(1_800_000_000);
    let text = text(&metrics);
    for line in [
        "auditgate_http_requests_total{code=\"200\",source=\"us\"} 1",
        "auditgate_http_requests_total{code=\"200\",source=\"eu\"} 0",
        "auditgate_http_requests_total{code=\"404\",source=\"\"} 1",
        "auditgate_http_request_duration_seconds_bucket{source=\"us\",le=\"0.001\"} 0",
        "auditgate_http_request_duration_seconds_bucket{source=\"us\",le=\"0.0025\"} 1",
        "auditgate_received_bytes_total{source=\"us\"} 70",
        "auditgate_received_bytes_total{source=\"eu\"} 0",
        "auditgate_decoded_bytes_total{source=\"us\"} 700",
        "auditgate_http_body_duration_seconds_bucket{source=\"us\",le=\"0.025\"} 0",
        "auditgate_http_body_duration_seconds_bucket{source=\"us\",le=\"0.05\"} 1",
        "auditgate_http_queue_duration_seconds_bucket{source=\"us\",le=\"0.25\"} 0",
        "auditgate_http_queue_duration_seconds_bucket{source=\"us\",le=\"0.5\"} 1",
        "auditgate_ready 1",
        "auditgate_warnings 2",
        "auditgate_last_event_timestamp_seconds{source=\"us\"} 1700000000",
        "auditgate_commit_duration_seconds_bucket{le=\"0.00025\"} 1",
        "auditgate_http_connections_closed_total{reason=\"done\"} 1",
        "auditgate_http_connections_closed_total{reason=\"header_timeout\"} 4",
        "auditgate_http_connections_closed_total{reason=\"per_peer_limit\"} 10",
        "auditgate_http_authorized_connections 3",
        "auditgate_in_flight_bytes 4096",
        "auditgate_sink_events_total{sink=\"siem\"} 7",
        "auditgate_sink_pending_events{sink=\"siem\"} 3",
        "auditgate_sink_oldest_pending_seconds{sink=\"siem\"} 1.5",
        "auditgate_sink_errors_total{sink=\"siem\"} 1",
        "auditgate_sink_truncated_total{sink=\"siem\"} 4",
        "auditgate_sink_skipped_events_total{sink=\"siem\"} 6",
        "auditgate_jwks_keys{source=\"us\"} 2",
        "auditgate_jwks_retired_keys{source=\"us\"} 1",
        "auditgate_jwks_changes_total{source=\"us\"} 1",
        "auditgate_jwks_refreshed_timestamp_seconds{source=\"us\"} 1700000001",
        "auditgate_jwks_refresh_errors_total{source=\"us\"} 1",
        "auditgate_tls_certificate_not_after_timestamp_seconds 1800000000",
    ] {
        assert_has(&text, line);
    }
    // Beyond i64 the value saturates instead of becoming negative; the text has the digits of an
    // f64.
    assert_has(&text, "auditgate_ledger_bytes 9223372036854776000");
}

#[test]
fn delays_are_bounded_and_counted_one_by_one() {
    let metrics = metrics();
    metrics.event_delays("us", &[-5.0, f64::NAN, 0.5, 20.0, 1e300, f64::INFINITY]);
    metrics.event_delays("us", &[]);
    let text = text(&metrics);
    assert_has(&text, "auditgate_event_delay_seconds_bucket{source=\"us\",le=\"1\"} 3");
    assert_has(&text, "auditgate_event_delay_seconds_bucket{source=\"us\",le=\"30\"} 4");
    assert_has(&text, "auditgate_event_delay_seconds_bucket{source=\"us\",le=\"691200\"} 4");
    assert_has(&text, "auditgate_event_delay_seconds_count{source=\"us\"} 6");
    let sum = 20.5 + 2.0 * LONGEST_DELAY;
    assert_has(&text, &format!("auditgate_event_delay_seconds_sum{{source=\"us\"}} {sum}"));
}

#[test]
fn a_connection_counts_until_its_guard_is_dropped() {
    let metrics = metrics();
    let first = metrics.connection_opened();
    let second = metrics.connection_opened();
    drop(first);
    assert_has(&text(&metrics), "auditgate_http_connections 1");
    drop(second);
    assert_has(&text(&metrics), "auditgate_http_connections 0");
}

#[test]
fn hostile_traffic_adds_no_series() {
    let metrics = metrics();
    let before = series(&metrics);
    for code in STATUS_CODES {
        for source in [None, Some("us"), Some("eu")] {
            metrics.http_request(source, code, Duration::from_secs(100_000));
        }
    }
    for outcome in LineOutcome::ALL {
        metrics.events("us", outcome, u64::from(u32::MAX));
    }
    metrics.event_delays("us", &[f64::MIN, f64::MAX, f64::NAN]);
    let _connections: Vec<_> = (0..1000).map(|_| metrics.connection_opened()).collect();

    // Mistakes of a call site: a debug build panics, a release build ignores them.
    let mistakes: [&dyn Fn(); 8] = [
        &|| metrics.http_request(Some("../../etc/passwd"), 200, Duration::ZERO),
        &|| metrics.http_request(None, 599, Duration::ZERO),
        &|| metrics.events("", LineOutcome::Accepted, 1),
        &|| metrics.event_delays("US", &[1.0]),
        &|| metrics.last_event("us\n", 1),
        &|| metrics.sink_delivered("us", 1),
        &|| metrics.sink_pending("\"} 1", 1, 1.0),
        &|| metrics.jwks_keys("siem", 1, 1),
    ];
    for mistake in mistakes {
        assert_eq!(catch_unwind(AssertUnwindSafe(mistake)).is_err(), cfg!(debug_assertions));
    }
    assert_eq!(series(&metrics), before);
}

#[test]
fn callbacks_run_at_each_rendering_in_order() {
    let metrics = metrics();
    let size = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&size);
    metrics.before_render(Box::new(|metrics| metrics.ledger_bytes(99)));
    metrics.before_render(Box::new(move |metrics| {
        metrics.ledger_bytes(seen.fetch_add(10, Ordering::Relaxed));
    }));
    assert_has(&text(&metrics), "auditgate_ledger_bytes 0");
    assert_has(&text(&metrics), "auditgate_ledger_bytes 10");
}

/// Rows of the table of metrics in `docs/metrics.md`: name, type and labels.
fn documented() -> BTreeSet<(String, String, String)> {
    let document = include_str!("../../../docs/metrics.md");
    let is_metric = |line: &&str| line.starts_with("| `auditgate_") || line.starts_with("| `process_");
    document
        .lines()
        .filter(is_metric)
        .map(|row| {
            let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
            let [name, kind, labels, meaning] = cells[..] else { panic!("not four cells: {row}") };
            assert!(!meaning.is_empty(), "{name} says not what it means");
            (name.trim_matches('`').to_owned(), kind.to_owned(), labels.replace('`', ""))
        })
        .collect()
}

#[test]
fn the_documentation_lists_every_metric_with_its_type_and_labels() {
    let metrics = metrics();
    let families = metrics.registry.gather();
    let found: BTreeSet<_> = families
        .iter()
        .map(|family| {
            let kind = format!("{:?}", family.get_field_type()).to_lowercase();
            let labels: Vec<_> =
                family.get_metric()[0].get_label().iter().map(|label| label.name().to_owned()).collect();
            (family.name().to_owned(), kind, labels.join(", "))
        })
        .collect();
    let documented = documented();
    let missing: Vec<_> = found.difference(&documented).collect();
    let stale: Vec<_> = documented.difference(&found).collect();
    assert!(
        missing.is_empty() && stale.is_empty(),
        "not documented: {missing:#?}\nnot in the code: {stale:#?}"
    );
}

#[cfg(target_os = "linux")]
#[test]
fn the_number_of_series_is_the_documented_one() {
    let documented = include_str!("../../../docs/metrics.md");
    assert!(documented.contains("92 series, 149 more for each source and 6 more for each sink"));
    let (none, both) = (Metrics::new(&[], &[]).unwrap(), metrics());
    assert_eq!((series(&none).len(), series(&both).len()), (92, 92 + 2 * 149 + 2 * 6));
}

#[test]
fn both_formats_have_the_same_series() {
    let metrics = metrics();
    let open = String::from_utf8(metrics.render(TextFormat::OpenMetrics).unwrap()).unwrap();
    assert!(open.ends_with("\n# EOF\n"));
    let names = |text: &str| -> BTreeSet<String> {
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        // A bound is spelled in another way.
        samples.map(|line| line.rsplit_once(' ').unwrap().0.replace(".0\"", "\"")).collect()
    };
    assert_eq!(names(&open), names(&text(&metrics)));
}

#[test]
fn the_format_is_what_the_client_accepts() {
    // What Prometheus 2.42 sends.
    let prometheus = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;\
                      q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
    for (accept, format) in [
        (prometheus, TextFormat::OpenMetrics),
        ("text/plain, Application/OpenMetrics-Text ; version=1.0.0", TextFormat::OpenMetrics),
        ("*/*", TextFormat::Prometheus),
        ("", TextFormat::Prometheus),
        ("application/openmetrics-texts", TextFormat::Prometheus),
    ] {
        assert_eq!(TextFormat::accepted(accept), format, "{accept}");
    }
}

#[test]
fn status_codes_are_ascending() {
    assert!(STATUS_CODES.is_sorted());
}
