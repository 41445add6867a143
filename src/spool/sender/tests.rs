use super::*;
use crate::send::receiver::{Answer, Receiver, Request};
use crate::send::{self, SigningKey};
use crate::wire::event::Value;
use crate::wire::line::Line;

/// Size of a spool that is never full.
const LARGE: u64 = 1 << 30;
/// More than a post to loopback needs.
const LONG: Duration = Duration::from_secs(60);

fn builder(receiver: &Receiver) -> Builder {
    let limits = BatchLimits { events: 7, bytes: 1 << 20, linger: Duration::ZERO };
    send::Sender::builder(receiver.endpoint())
        .format(Format::Json)
        .batch(limits)
        .signing_key(SigningKey::from_seed(&[7; 32]))
}

fn event(number: u64) -> Event {
    let mut event = Event::new();
    event.set("name", Value::Text("Ingress".to_owned()));
    event.set("n", Value::Number(number.to_string()));
    send::complete(&mut event, 1_767_323_045_678);
    event
}

/// Numbers of the posted events, which must be signed.
fn posted(receiver: &Receiver) -> Vec<u64> {
    let lines = receiver.requests();
    let number = |text: String| {
        let line = Line::parse(text.as_bytes()).unwrap();
        assert!(line.signed().is_some(), "{text}");
        line.text("n").unwrap().parse().unwrap()
    };
    lines.iter().flat_map(Request::lines).map(number).collect()
}

#[tokio::test]
async fn events_wait_for_the_receiver_beyond_the_end_of_the_program() {
    let dir = tempfile::tempdir().unwrap();
    let away = Receiver::start([Answer::HangUp]);
    let sender = Sender::open(&dir.path().join("spool"), LARGE, builder(&away)).unwrap();
    for number in 0..40 {
        sender.enqueue(&event(number)).await.unwrap();
    }
    assert_eq!(sender.waiting().unwrap(), 40);
    assert_eq!(sender.close(Duration::ZERO).await.unwrap(), 40);

    let receiver = Receiver::start([Answer::receipt(7, 0, 0)]);
    let sender = Sender::open(&dir.path().join("spool"), LARGE, builder(&receiver)).unwrap();
    let last = event(40);
    for _ in 0..2 {
        // The second time it is known.
        sender.enqueue(&last).await.unwrap();
    }
    assert_eq!(sender.close(LONG).await.unwrap(), 0);
    assert_eq!(posted(&receiver), (0..=40).collect::<Vec<_>>());
}

#[test]
fn a_program_without_a_runtime_sends_from_several_threads() {
    let dir = tempfile::tempdir().unwrap();
    let receiver = Receiver::start([Answer::receipt(7, 0, 0)]);
    let sender = Sender::open(&dir.path().join("spool"), LARGE, builder(&receiver)).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let sender = &sender;
            scope.spawn(move || {
                (0..25).for_each(|number| sender.blocking_enqueue(&event(thread * 25 + number)).unwrap());
            });
        }
    });
    assert_eq!(sender.blocking_close(LONG).unwrap(), 0);
    let mut posted = posted(&receiver);
    posted.sort_unstable();
    assert_eq!(posted, (0..100).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_full_spool_holds_the_program_until_the_receiver_takes_events() {
    let dir = tempfile::tempdir().unwrap();
    let away = Receiver::start([Answer::HangUp]);
    let sender = Sender::open(&dir.path().join("spool"), 1, builder(&away)).unwrap();
    sender.enqueue(&event(0)).await.unwrap();
    let held = tokio::time::timeout(Duration::from_millis(50), sender.enqueue(&event(1))).await;
    assert!(held.is_err(), "the spool is full");
    drop(sender);

    let receiver = Receiver::start([Answer::receipt(1, 0, 0)]);
    let sender = Sender::open(&dir.path().join("spool"), 1, builder(&receiver)).unwrap();
    sender.enqueue(&event(2)).await.unwrap();
    assert_eq!(sender.close(LONG).await.unwrap(), 0);
    let posted = posted(&receiver);
    assert!(posted.first() == Some(&0) && posted.last() == Some(&2), "{posted:?}");
}

#[tokio::test]
async fn what_cannot_be_done_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let receiver = Receiver::start([Answer::new(401, "", "no")]);
    let spool = dir.path().join("spool");
    let sender = Sender::open(&spool, LARGE, builder(&receiver)).unwrap();
    let Err(second) = Sender::open(&spool, LARGE, builder(&receiver)) else { panic!("opened twice") };
    assert!(second.to_string().contains("in use by another"), "{second}");
    let Err(no_header) = Sender::open(&spool, LARGE, builder(&receiver).authorization("a\nb")) else {
        panic!("a header with a line break")
    };
    assert!(matches!(no_header, SpoolError::Send(SendError::Authorization)), "{no_header}");

    let mut event = event(0);
    event.set("text", Value::Text("x".repeat(2 << 20)));
    let too_long = sender.enqueue(&event).await.unwrap_err();
    assert!(matches!(too_long, SpoolError::Send(SendError::Line(_))), "{too_long}");

    sender.enqueue(&super::tests::event(1)).await.unwrap();
    let state = loop {
        let state = sender.deliveries();
        if state.is_paused {
            break state;
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(state.last_response_code, Some(401));
    assert!(state.last_error.unwrap().contains("answered 401 (no)"));
}

#[tokio::test]
async fn an_audit_layer_goes_on_without_a_receiver() {
    use tracing_subscriber::layer::SubscriberExt as _;

    let dir = tempfile::tempdir().unwrap();
    let away = Receiver::start([Answer::new(401, "", "no")]);
    let sender = Sender::open(&dir.path().join("spool"), LARGE, builder(&away)).unwrap();
    let (audit, handle) = send::layer::audit(sender);
    tracing::subscriber::with_default(tracing_subscriber::registry().with(audit), || {
        (0..500).for_each(|n| tracing::info!(target: "audit", n, "Ingress"));
        tracing::info!(target: "audit", n = 500, what = "x".repeat(2 << 20), "Ingress");
    });
    while handle.dropped() == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(handle.dropped(), 1, "it is too long");
    assert_eq!(handle.close().await.unwrap(), 500);

    let receiver = Receiver::start([Answer::receipt(7, 0, 0)]);
    let sender = Sender::open(&dir.path().join("spool"), LARGE, builder(&receiver)).unwrap();
    assert_eq!(sender.close(LONG).await.unwrap(), 0);
    assert_eq!(posted(&receiver), (0..500).collect::<Vec<_>>());
}
