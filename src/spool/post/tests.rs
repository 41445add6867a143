use std::num::NonZeroUsize;
use std::sync::Mutex;

use tokio::runtime::Runtime;

use super::*;
use crate::send::receiver::{Answer, Receiver};
use crate::wire::event::Verdict;
use crate::wire::line::Line;

const BEHIND: Position = Position { batch: 2, line: 0 };

/// The sink, the receiver that it posts to, and what it sets aside.
struct Fixture {
    sink: PostSink,
    receiver: Receiver,
    aside: Arc<Mutex<Vec<String>>>,
    key: CurrentKey,
    status: Arc<SpoolStatus>,
    _runtime: Runtime,
}

fn fixture(script: &[Answer], events: usize, connections: usize) -> Fixture {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let receiver = Receiver::start(script);
    let aside = Arc::<Mutex<Vec<String>>>::default();
    let set_aside = {
        let aside = Arc::clone(&aside);
        Box::new(move |line: &[u8], reason: Reason, _detail: String| {
            aside.lock().unwrap().push(format!("{reason} {}", String::from_utf8_lossy(line)));
            Ok(())
        })
    };
    let key = CurrentKey::default();
    let status = Arc::<SpoolStatus>::default();
    let builder = crate::send::Sender::builder(receiver.endpoint())
        .batch(BatchLimits { events, bytes: 1 << 20, linger: Duration::ZERO })
        .connections(NonZeroUsize::new(connections).unwrap());
    let sink = PostSink::new(PostOptions {
        target: Target::new(builder, None).unwrap(),
        next: NextTarget::default(),
        key: Arc::clone(&key),
        status: Arc::clone(&status),
        set_aside,
        runtime: runtime.handle().clone(),
        clock: Clock::system(),
    });
    Fixture { sink, receiver, aside, key, status, _runtime: runtime }
}

impl Fixture {
    fn push(&mut self, lines: &[&str]) {
        for line in lines {
            self.sink.push(&Item {
                behind: BEHIND,
                received_at: 0,
                source: "app",
                verdict: &Verdict::Unverified,
                key_id: None,
                raw: line.as_bytes(),
            });
        }
    }

    fn flush(&mut self) -> Result<Option<Resume>, SinkError> {
        self.sink.flush(BEHIND, false)
    }

    fn posted(&self) -> Vec<Vec<String>> {
        self.receiver.requests().iter().map(crate::send::receiver::Request::lines).collect()
    }
}

#[test]
fn lines_are_posted_in_order_in_batches_within_the_limits() {
    let mut it = fixture(&[Answer::receipt(2, 0, 0), Answer::receipt(0, 1, 0)], 2, 1);
    it.push(&["a", "b", "c"]);
    let safe = it.flush().unwrap().unwrap();
    assert_eq!(safe.position, BEHIND);
    assert_eq!(it.posted(), [vec!["a", "b"], vec!["c"]]);
    let state = it.status.read();
    assert_eq!((state.batches, state.events, state.last_response_code), (2, 3, Some(200)));
    assert_eq!((state.receipts.accepted, state.receipts.duplicates), (2, 1));
    assert_eq!((it.sink.collected(), state.last_error), (0, None));
}

#[test]
fn what_was_not_taken_is_posted_again_and_the_rest_is_not() {
    for (answer, asked) in [
        (Answer::new(429, "retry-after: 7\r\n", ""), Some(Duration::from_secs(7))),
        (Answer::new(500, "retry-after: 99999999\r\n", ""), Some(LONGEST_RETRY_AFTER)),
        (Answer::new(503, "", ""), None),
        (Answer::HangUp, None),
    ] {
        let mut it = fixture(&[Answer::receipt(1, 0, 0), answer, Answer::receipt(1, 0, 0)], 1, 1);
        it.push(&["a", "b"]);
        let error = it.flush().unwrap_err();
        assert_eq!(error.retry_after, asked, "{error}");
        assert!(!it.status.read().is_paused && it.status.read().last_error.is_some());
        it.flush().unwrap().unwrap();
        assert_eq!(it.posted(), [["a"], ["b"], ["b"]]);
    }
}

#[test]
fn a_refusal_of_everything_pauses() {
    for status in [301, 401, 403, 404, 405, 415, 431] {
        let mut it = fixture(&[Answer::new(status, "", ""), Answer::receipt(1, 0, 0)], 1, 1);
        it.push(&["a"]);
        assert_eq!(it.flush().unwrap_err().retry_after, Some(PAUSE), "{status}");
        assert!(it.status.read().is_paused);
        assert_eq!(it.status.read().last_response_code, Some(status));
        it.flush().unwrap().unwrap();
        assert!(!it.status.read().is_paused);
    }
}

#[test]
fn a_batch_that_is_too_large_is_halved_and_a_refused_line_set_aside() {
    let too_large = || Answer::new(413, "", "");
    // All; the first half, its first line, its second line; the second half.
    let script = [too_large(), too_large(), Answer::receipt(1, 0, 0), too_large(), Answer::receipt(2, 0, 0)];
    let mut it = fixture(&script, 4, 1);
    it.push(&["a", "b", "c", "d"]);
    it.flush().unwrap().unwrap();
    assert_eq!(it.posted(), [vec!["a", "b", "c", "d"], vec!["a", "b"], vec!["a"], vec!["b"], vec!["c", "d"]]);
    assert_eq!(*it.aside.lock().unwrap(), ["line_too_long b"]);
    assert_eq!((it.status.read().events, it.status.read().refused), (3, 1));

    let mut it = fixture(&[Answer::new(400, "", ""), Answer::receipt(1, 0, 0)], 2, 1);
    it.push(&["a", "b", "c"]);
    it.flush().unwrap().unwrap();
    assert_eq!(*it.aside.lock().unwrap(), ["malformed a", "malformed b"]);
    assert_eq!(it.posted().last().unwrap(), &["c"]);
}

#[test]
fn a_batch_that_is_posted_again_is_signed_with_the_key_of_the_day() {
    let mut it = fixture(&[Answer::new(500, "", ""), Answer::receipt(1, 0, 0)], 1, 1);
    let line = r#"{"name":"Ingress","rt":1,"trace_id":"1"}"#;
    *it.key.write() = Some(Arc::new(SigningKey::from_seed(&[1; 32])));
    it.push(&[line]);
    it.flush().unwrap_err();
    *it.key.write() = Some(Arc::new(SigningKey::from_seed(&[2; 32])));
    it.flush().unwrap().unwrap();
    let posted: Vec<String> = it.posted().into_iter().flatten().collect();
    assert_ne!(posted[0], posted[1]);
    for posted in &posted {
        let parsed = Line::parse(posted.as_bytes()).unwrap();
        assert_eq!(parsed.signed().unwrap().first.message(), line.as_bytes());
    }
}

#[test]
fn several_connections_post_at_once_and_keep_what_failed() {
    let script = [
        Answer::receipt(1, 0, 0),
        Answer::receipt(1, 0, 0),
        Answer::new(500, "", ""),
        Answer::receipt(1, 0, 0),
    ];
    let mut it = fixture(&script, 1, 3);
    it.push(&["a", "b", "c"]);
    it.flush().unwrap_err();
    it.flush().unwrap().unwrap();
    let mut posted: Vec<String> = it.posted().into_iter().flatten().collect();
    assert_eq!(posted.len(), 4);
    posted.sort_unstable();
    posted.dedup();
    assert_eq!(posted, ["a", "b", "c"]);
}

#[test]
fn a_batch_lingers_until_it_is_full_or_the_spool_ends() {
    let mut it = fixture(&[Answer::receipt(2, 0, 0)], 2, 1);
    it.sink.options.target.limits.linger = Duration::from_secs(3600);
    it.push(&["a"]);
    assert_eq!(it.flush().unwrap(), None);
    it.push(&["b"]);
    assert!(it.flush().unwrap().is_some());
    it.push(&["c"]);
    assert_eq!(it.flush().unwrap(), None);
    assert!(it.sink.flush(BEHIND, true).unwrap().is_some());
    assert_eq!(it.posted(), [vec!["a", "b"], vec!["c"]]);
}

#[test]
fn what_failed_is_posted_to_the_new_target_with_its_limits() {
    let mut it = fixture(&[Answer::new(401, "", "no")], 2, 1);
    it.push(&["a", "b", "c"]);
    it.flush().unwrap_err();
    let other = Receiver::start([Answer::receipt(2, 0, 0)]);
    let limits = BatchLimits { events: 1, bytes: 1 << 20, linger: Duration::ZERO };
    let builder = crate::send::Sender::builder(other.endpoint()).batch(limits).authorization("Bearer new");
    *it.sink.options.next.lock() = Some(Target::new(builder, None).unwrap());
    assert!(it.flush().unwrap().is_some());
    it.push(&["d", "e"]);
    assert!(it.flush().unwrap().is_some());
    let posted: Vec<_> = other.requests().iter().map(crate::send::receiver::Request::lines).collect();
    assert_eq!(posted, [vec!["a", "b"], vec!["c"], vec!["d"], vec!["e"]]);
    assert_eq!(it.posted().len(), 1, "nothing more to the former");
    assert!(!it.status.read().is_paused);
}
