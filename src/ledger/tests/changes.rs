//! What each sink gets when the configuration of sinks changes while events wait.

use super::*;

fn sink(name: &str, streams: &[Stream], sources: Option<&[&str]>) -> Subscription {
    let sources = sources.map(|sources| sources.iter().map(|source| (*source).to_owned()).collect());
    Subscription { sink: name.to_owned(), kind: "file", streams: streams.to_vec(), sources, skips: false }
}

/// Commits a batch of each source with a verified line (0) and a rejected one (1).
fn post(fixture: &Fixture, line: &str) {
    for source in ["us", "eu"] {
        fixture.commit(source, vec![fixture.entry(source, line, None), fixture.reject(source, line)]);
    }
}

/// Returns what a sink gets, as `batch.line`.
fn handed_out(fixture: &Fixture, subscription: &Subscription) -> String {
    let mut outbox = fixture.ledger().outbox(subscription).unwrap();
    let (mut position, mut lines) = (0, Vec::new());
    while let Next::Batch(batch, streams) = outbox.next(position, Duration::ZERO).unwrap() {
        lines.extend(batch.lines(streams, 0).map(|(line, _)| format!("{}.{line}", batch.position)));
        position = batch.position + 1;
    }
    lines.join(" ")
}

/// Lets batches 1 and 2 wait, changes the sinks, gives up what is in the way of a start, and posts batches 3 and 4.
/// Returns what was in the way, and what each sink gets then, before and after another restart.
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
        found.push(format!("{sink}: {pending} in the way"));
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
    // What waits is what was committed and not given up, and a batch that nobody waits for is gone.
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

/// Its name, the sinks before and after it, and what was in the way and what each sink gets.
type Change<'a> = (&'a str, Vec<Subscription>, Vec<Subscription>, &'a [&'a str]);

#[test]
fn what_each_sink_gets_when_sinks_change_while_events_wait() {
    let verified = [Stream::Verified];
    let all = || sink("all", &Stream::ALL, None);
    let us = || sink("us", &Stream::ALL, Some(&["us"]));
    let good = |name| sink(name, &verified, None);
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
            &["all: 2 in the way", "all: 1.0 2.0 3.0 4.0"],
        ),
        (
            "narrowed to a source",
            vec![all()],
            vec![sink("all", &Stream::ALL, Some(&["us"]))],
            &["all: 2 in the way", "all: 1.0 1.1 3.0 3.1"],
        ),
        ("widened by a stream", vec![good("all")], vec![all()], &["all: 1.0 2.0 3.0 3.1 4.0 4.1"]),
        (
            "widened by a source",
            vec![us(), good("eu")],
            vec![sink("us", &Stream::ALL, None), good("eu")],
            &["us: 1.0 1.1 3.0 3.1 4.0 4.1", "eu: 1.0 2.0 3.0 4.0"],
        ),
        (
            "renamed",
            vec![all()],
            vec![sink("every", &Stream::ALL, None)],
            &["all: 4 in the way", "every: 3.0 3.1 4.0 4.1"],
        ),
        (
            "removed",
            vec![all(), us()],
            vec![all()],
            &["us: 2 in the way", "all: 1.0 1.1 2.0 2.1 3.0 3.1 4.0 4.1"],
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
