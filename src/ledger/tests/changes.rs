//! Changes of the configuration of sinks while events wait: what each sink gets.

use super::*;

/// Commits a batch of each source, with a verified line (0) and a rejected one (1).
fn post(fixture: &Fixture, line: &str) {
    for source in ["us", "eu"] {
        fixture.commit(source, vec![fixture.entry(source, line, None), fixture.reject(source, line)]);
    }
}

/// Returns the lines that a sink gets, as `batch.line`.
fn handed_out(fixture: &Fixture, subscription: &Subscription) -> String {
    let lines =
        fixture.handed_out_to(subscription).into_iter().map(|(batch, line)| format!("{batch}.{line}"));
    lines.collect::<Vec<_>>().join(" ")
}

/// Commits batches 1 and 2, changes the sinks, gives up the events that prevent a start, and
/// commits batches 3 and 4. Returns which events prevented the start, and the lines that each sink
/// gets, before and after another restart.
fn change(before: &[Subscription], after: &[Subscription]) -> Vec<String> {
    let mut fixture = Fixture::new();
    fixture.close();
    Ledger::forget_sink(fixture.dir.path(), "all", None, true).unwrap();
    let mut options = fixture.options(&[]);
    options.subscriptions = before.to_vec();
    fixture.change(options.clone());
    post(&fixture, "waits");
    fixture.close();
    options.subscriptions = after.to_vec();
    let mut found = Vec::new();
    loop {
        let (sink, pending) = match Ledger::open(options.clone()) {
            Ok(open) => {
                fixture.open = Some(open);
                break;
            }
            Err(OpenError::Orphaned { sink, pending } | OpenError::Narrowed { sink, pending }) => {
                (sink, pending)
            }
            Err(error) => panic!("{error}"),
        };
        found.push(format!("{sink}: {pending} prevent the start"));
        let configured = after.iter().find(|subscription| subscription.sink == sink);
        Ledger::forget_sink(fixture.dir.path(), &sink, configured, false).unwrap();
    }
    post(&fixture, "comes later");
    for is_restarted in [false, true] {
        if is_restarted {
            fixture.close();
            fixture.open = Some(Ledger::open(options.clone()).unwrap());
        }
        let lines = after
            .iter()
            .map(|subscription| format!("{}: {}", subscription.sink, handed_out(&fixture, subscription)));
        let lines: Vec<String> = lines.collect();
        assert!(!is_restarted || found.ends_with(&lines), "{found:?} and after a restart {lines:?}");
        if !is_restarted {
            found.extend(lines);
        }
    }
    // The counts match the lines, and a batch without a waiting sink is deleted.
    for subscription in after {
        let events = fixture.ledger().pending(&subscription.sink).unwrap().events;
        let lines = handed_out(&fixture, subscription).split_ascii_whitespace().count();
        assert_eq!(events, lines as u64, "{}", subscription.sink);
        fixture
            .ledger()
            .advance_now(&subscription.sink, Position { batch: 99, line: 0 }, Vec::new())
            .unwrap();
    }
    assert_eq!(fixture.ledger().backlog(), Backlog::default());
    found
}

/// A change's name, the sinks before and after it, and the expected result of [`change`].
type Change<'a> = (&'a str, Vec<Subscription>, Vec<Subscription>, &'a [&'a str]);

#[test]
fn each_sink_gets_the_right_events_when_sinks_change() {
    let verified = [Stream::Verified];
    let all = || file_sink("all", &Stream::ALL, None);
    let us = || file_sink("us", &Stream::ALL, Some(&["us"]));
    let good = |name| file_sink(name, &verified, None);
    let table: [Change<'_>; 9] = [
        ("unchanged", vec![all()], vec![all()], &["all: 1.0 1.1 2.0 2.1 3.0 3.1 4.0 4.1"]),
        (
            "added",
            vec![all()],
            vec![all(), good("new")],
            &["all: 1.0 1.1 2.0 2.1 3.0 3.1 4.0 4.1", "new: 3.0 4.0"],
        ),
        (
            "narrowed to a stream",
            vec![all()],
            vec![good("all")],
            &["all: 2 prevent the start", "all: 1.0 2.0 3.0 4.0"],
        ),
        (
            "narrowed to a source",
            vec![all()],
            vec![file_sink("all", &Stream::ALL, Some(&["us"]))],
            &["all: 2 prevent the start", "all: 1.0 1.1 3.0 3.1"],
        ),
        ("widened by a stream", vec![good("all")], vec![all()], &["all: 1.0 2.0 3.0 3.1 4.0 4.1"]),
        (
            "widened by a source",
            vec![us(), good("eu")],
            vec![file_sink("us", &Stream::ALL, None), good("eu")],
            &["us: 1.0 1.1 3.0 3.1 4.0 4.1", "eu: 1.0 2.0 3.0 4.0"],
        ),
        (
            "renamed",
            vec![all()],
            vec![file_sink("every", &Stream::ALL, None)],
            &["all: 4 prevent the start", "every: 3.0 3.1 4.0 4.1"],
        ),
        (
            "removed",
            vec![all(), us()],
            vec![all()],
            &["us: 2 prevent the start", "all: 1.0 1.1 2.0 2.1 3.0 3.1 4.0 4.1"],
        ),
        (
            "made to skip",
            vec![all()],
            vec![Subscription { skips: true, ..all() }],
            &["all: 1.0 1.1 2.0 2.1 3.0 3.1 4.0 4.1"],
        ),
    ];
    for (name, before, after, expected) in table {
        assert_eq!(change(&before, &after), expected, "{name}");
    }
}

#[test]
fn the_state_of_an_input_is_committed_with_its_lines_or_alone() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.ledger().checkpoint("app").unwrap(), None);
    let checkpoint = |state: &[u8]| Some(Checkpoint { input: "app".into(), state: state.to_vec() });
    let first =
        Batch { checkpoint: checkpoint(b"1"), ..Fixture::batch("us", vec![fixture.entry("us", "a", None)]) };
    fixture.commit_batch(first);
    fixture.reopen();
    assert_eq!(fixture.ledger().checkpoint("app").unwrap().unwrap(), b"1");
    let without_lines = Batch { checkpoint: checkpoint(b"2"), ..Fixture::batch("us", Vec::new()) };
    fixture.commit_batch(without_lines);
    fixture.reopen();
    assert_eq!(fixture.ledger().checkpoint("app").unwrap().unwrap(), b"2");
    assert_eq!(fixture.ledger().checkpoint("other").unwrap(), None);
    assert_eq!(fixture.ledger().pending("all").unwrap().events, 1);
}
