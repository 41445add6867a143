//! Posts to a receiver that answers in every way it can, and breaks off wherever it can.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::task::JoinSet;

use super::batch::Batch;
use super::post::{Delivered, Poster, Receipt, Retrying, Undelivered};
use super::receiver::{Answer, Part, Receiver};
use super::retry::{LONGEST_RETRY_AFTER, Retry};
use crate::net::{Client, Endpoint};

/// Retries without a pause of our own.
const AT_ONCE: Retry = Retry { retries: 4, minimum: Duration::ZERO, maximum: Duration::ZERO };
/// Timeout of a post to a receiver that stalls.
const SHORT: Duration = Duration::from_secs(2);
const LONG: Duration = Duration::from_secs(60);

fn poster(endpoint: Endpoint, retry: Retry, timeout: Duration) -> Poster {
    let client = Client::for_endpoint(&endpoint, None).unwrap();
    Poster::new(client, endpoint, None, timeout, retry, None)
}

/// Delivers a batch; returns the number of posts, as the sender and the receiver counted them, and
/// the result.
async fn deliver(
    script: Vec<Answer>,
    lines: Vec<u8>,
    timeout: Duration,
) -> (u32, Result<Delivered, Undelivered>) {
    let receiver = Receiver::start(script);
    let batch = Batch { body: lines.clone(), events: 1 };
    let poster = poster(receiver.endpoint(), AT_ONCE, timeout);
    let (attempts, kept, result) = poster.deliver(1, batch).await;
    assert!(kept == lines);
    assert_eq!(receiver.begun(), attempts as usize);
    let requests = receiver.requests();
    assert!(requests.iter().all(|request| request.body == requests[0].body));
    (attempts, result)
}

/// Returns bytes that gzip cannot shorten, more than the system buffers for a connection.
fn long_line() -> Vec<u8> {
    use rand::{RngExt as _, SeedableRng as _};
    let mut rng = rand::rngs::StdRng::seed_from_u64(1);
    // Repeated, but not within the 32 KiB that gzip looks back.
    let block: Vec<u8> = (0..64 << 10).map(|_| rng.random_range(32..=255)).collect();
    let mut line = block.repeat(256);
    line.push(b'\n');
    line
}

/// Expected result of a batch.
#[derive(Clone, Copy, Debug)]
enum Expected {
    /// Delivered; whether there is a receipt.
    Delivered(bool),
    /// Refused with this status, and not posted again.
    Refused(u16),
}

#[track_caller]
fn assert_result(name: &str, result: &Result<Delivered, Undelivered>, expected: Expected) {
    match (expected, result) {
        (Expected::Delivered(true), Ok(Delivered { receipt: Some(Receipt { accepted: 1, .. }), .. }))
        | (Expected::Delivered(false), Ok(Delivered { receipt: None, .. })) => {}
        (Expected::Refused(wanted), Err(Undelivered::Refused { status, .. })) if *status == wanted => {}
        _ => panic!("{name}: {result:?}, expected {expected:?}"),
    }
}

#[tokio::test]
async fn every_status_is_a_delivery_a_retry_or_the_end() {
    for status in 200..=999 {
        let answer = Answer::new(status, "connection: close\r\n", "");
        let (attempts, result) = deliver(vec![answer, Answer::receipt(1, 0, 0)], b"x\n".to_vec(), LONG).await;
        let (posts, expected) = match status {
            200..=299 => (1, Expected::Delivered(false)),
            429 | 500 => (2, Expected::Delivered(true)),
            _ => (1, Expected::Refused(status)),
        };
        assert_eq!(attempts, posts, "{status}");
        assert_result(&status.to_string(), &result, expected);
    }
}

#[tokio::test]
async fn a_batch_is_posted_again_until_there_is_a_status_and_then_as_the_status_says() {
    use Answer::{Closing, HangUp, HangUpIn, Stalling};
    use Expected::{Delivered, Refused};
    const RECEIPT: &str = r#"{"accepted":1,"duplicates":0,"quarantined":0}"#;
    let closing = |text: &str| Closing(text.as_bytes().to_vec());
    let stalling = |text: &str| Stalling(text.as_bytes().to_vec());
    let whole = format!("HTTP/1.1 200 OK\r\ncontent-length: 45\r\n\r\n{RECEIPT}");
    let interim =
        "HTTP/1.1 102 Processing\r\n\r\n".repeat(50) + "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n";
    let long = "x".repeat(70_000);
    let table = [
        // Broken off by the receiver.
        ("at accept", HangUpIn(Part::Nothing), 2, Delivered(true)),
        ("in the request's head", HangUpIn(Part::Head), 2, Delivered(true)),
        ("in the request's body", HangUpIn(Part::Body), 2, Delivered(true)),
        ("after the request", HangUp, 2, Delivered(true)),
        ("in the status line", closing("HTTP/1.1 20"), 2, Delivered(true)),
        ("after the status line", closing("HTTP/1.1 200 OK\r\n"), 2, Delivered(true)),
        ("in a header", closing("HTTP/1.1 200 OK\r\ncontent-le"), 2, Delivered(true)),
        (
            "200, in the body",
            closing("HTTP/1.1 200 OK\r\ncontent-length: 45\r\n\r\n{\"acc"),
            1,
            Delivered(false),
        ),
        (
            "200, in a chunk",
            closing("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n45\r\n{\"acc"),
            1,
            Delivered(false),
        ),
        ("429, in the body", closing("HTTP/1.1 429 No\r\ncontent-length: 9\r\n\r\nha"), 2, Delivered(true)),
        ("500, in the body", closing("HTTP/1.1 500 No\r\ncontent-length: 9\r\n\r\nha"), 2, Delivered(true)),
        ("401, in the body", closing("HTTP/1.1 401 No\r\ncontent-length: 9\r\n\r\nha"), 1, Refused(401)),
        ("200, after the body", closing(&whole), 1, Delivered(true)),
        (
            "200 with a body to the end",
            closing(&format!("HTTP/1.1 200 OK\r\n\r\n{RECEIPT}")),
            1,
            Delivered(true),
        ),
        ("200 of HTTP/1.0", closing(&format!("HTTP/1.0 200 OK\r\n\r\n{RECEIPT}")), 1, Delivered(true)),
        // Stalled.
        ("silent", stalling(""), 2, Delivered(true)),
        ("stalled in a header", stalling("HTTP/1.1 200 OK\r\ncontent-le"), 2, Delivered(true)),
        (
            "200, stalled",
            stalling("HTTP/1.1 200 OK\r\ncontent-length: 45\r\n\r\n{\"acc"),
            1,
            Delivered(false),
        ),
        ("401, stalled", stalling("HTTP/1.1 401 No\r\ncontent-length: 45\r\n\r\n{"), 1, Refused(401)),
        ("500, stalled", stalling("HTTP/1.1 500 No\r\ncontent-length: 45\r\n\r\n{"), 2, Delivered(true)),
        // Longer than the limits.
        ("200, too long", Answer::new(200, "", &long), 1, Delivered(false)),
        ("429, too long", Answer::new(429, "retry-after: 0\r\n", &long), 2, Delivered(true)),
        ("413, too long", Answer::new(413, "", &long), 1, Refused(413)),
        ("long header", Answer::new(200, &format!("x: {}\r\n", "x".repeat(1 << 20)), ""), 2, Delivered(true)),
        ("many headers", Answer::new(200, &"x: y\r\n".repeat(1000), ""), 2, Delivered(true)),
        // Not HTTP, or wrong in it.
        ("another protocol", closing("SSH-2.0-OpenSSH_9.2\r\n"), 2, Delivered(true)),
        ("a TLS alert", Closing(b"\x15\x03\x01\x00\x02\x02\x46".to_vec()), 2, Delivered(true)),
        ("zeros", Closing(vec![0; 100]), 2, Delivered(true)),
        ("HTTP/2", Closing(b"\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\x64".to_vec()), 2, Delivered(true)),
        ("no status", closing("HTTP/1.1 OK\r\n\r\n"), 2, Delivered(true)),
        ("status 99", closing("HTTP/1.1 099 Test\r\ncontent-length: 0\r\n\r\n"), 2, Delivered(true)),
        ("negative length", closing("HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n"), 2, Delivered(true)),
        (
            "two lengths",
            closing("HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nxx"),
            2,
            Delivered(true),
        ),
        (
            "bad chunk",
            closing("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"),
            1,
            Delivered(false),
        ),
        // Interim responses (RFC 9110, section 15.2).
        (
            "100, then 200",
            closing(&("HTTP/1.1 100 Continue\r\n\r\n".to_owned() + &whole)),
            1,
            Delivered(true),
        ),
        ("many, then 200", closing(&(interim + &whole)), 1, Delivered(true)),
        ("100, then the end", closing("HTTP/1.1 100 Continue\r\n\r\n"), 2, Delivered(true)),
        ("100, then nothing", stalling("HTTP/1.1 100 Continue\r\n\r\n"), 2, Delivered(true)),
        ("101", stalling("HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n"), 1, Refused(101)),
        // Bodies that are no receipt.
        ("204", closing("HTTP/1.1 204 No Content\r\n\r\n"), 1, Delivered(false)),
        ("negative counts", Answer::new(200, "", &RECEIPT.replace(":1", ":-1")), 1, Delivered(false)),
        ("a page", Answer::new(200, "content-type: text/html\r\n", "<html>"), 1, Delivered(false)),
    ];
    let mut rows = JoinSet::new();
    for (name, answer, posts, expected) in table {
        let timeout = if matches!(answer, Stalling(_)) { SHORT } else { LONG };
        rows.spawn(async move {
            let (attempts, result) =
                deliver(vec![answer, Answer::receipt(1, 0, 0)], b"x\n".to_vec(), timeout).await;
            assert_eq!(attempts, posts, "{name}: {result:?}");
            assert_result(name, &result, expected);
        });
    }
    while let Some(row) = rows.join_next().await {
        row.unwrap();
    }
}

#[tokio::test]
async fn an_answer_in_the_middle_of_a_long_body_is_read() {
    let early = |text: &str| Answer::Early(text.as_bytes().to_vec());
    let lines = long_line();
    let cut = Answer::HangUpIn(Part::Body);
    let (attempts, result) = deliver(vec![cut, Answer::receipt(1, 0, 0)], lines.clone(), LONG).await;
    assert_eq!(attempts, 2);
    assert_result("cut off", &result, Expected::Delivered(true));
    let refusal = early("HTTP/1.1 413 Too Long\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    let (attempts, result) = deliver(vec![refusal], lines.clone(), LONG).await;
    assert_eq!(attempts, 1);
    assert_result("413", &result, Expected::Refused(413));
    let overloaded = early("HTTP/1.1 429 Busy\r\nretry-after: 0\r\ncontent-length: 0\r\n\r\n");
    let (attempts, result) = deliver(vec![overloaded, Answer::receipt(1, 0, 0)], lines, LONG).await;
    assert_eq!(attempts, 2);
    assert_result("429", &result, Expected::Delivered(true));
}

#[tokio::test]
async fn connections_that_close_unannounced_after_each_response_lose_no_batch() {
    let answer =
        b"HTTP/1.1 200 OK\r\ncontent-length: 45\r\n\r\n{\"accepted\":1,\"duplicates\":0,\"quarantined\":0}";
    let receiver = Receiver::start([Answer::Closing(answer.to_vec())]);
    let poster = poster(receiver.endpoint(), AT_ONCE, LONG);
    for number in 0..50 {
        let batch = Batch { body: format!("{number}\n").into_bytes(), events: 1 };
        let (_, _, result) = poster.deliver(number, batch).await;
        assert_result("closed", &result, Expected::Delivered(true));
    }
    let mut lines: Vec<_> = receiver.requests().iter().flat_map(super::receiver::Request::lines).collect();
    lines.dedup();
    assert_eq!(lines, (0..50).map(|number| number.to_string()).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_wrong_retry_after_is_ignored_and_a_huge_one_is_bounded() {
    const OWN: Duration = Duration::from_secs(7);
    let huge = "1".to_owned() + &"0".repeat(30);
    let past = "Wed, 21 Oct 2015 07:28:00 GMT";
    let far = "Fri, 31 Dec 9999 23:59:59 GMT";
    let field = |value: &str| format!("retry-after: {value}\r\n");
    let table = [
        (String::new(), OWN),
        (field("30"), Duration::from_secs(30)),
        (field("0"), Duration::ZERO),
        (field("-1"), OWN),
        (field("+5"), OWN),
        (field("1.5"), OWN),
        (field("0x10"), OWN),
        (field(""), OWN),
        (field("soon"), OWN),
        (field("1, 2"), OWN),
        (field("\"5\""), OWN),
        (field("5 s"), OWN),
        (field("\u{665}"), OWN),
        (field(past), Duration::ZERO),
        (field(far), LONGEST_RETRY_AFTER),
        (field("Wed, 99 Oct 2015 07:28:00 GMT"), OWN),
        (field("601"), LONGEST_RETRY_AFTER),
        (field(&huge), LONGEST_RETRY_AFTER),
        // The first of several.
        (field("3") + &field("9"), Duration::from_secs(3)),
        (field("soon") + &field("9"), OWN),
    ];
    let long = "x".repeat(70_000);
    for (headers, pause) in table {
        for status in [429, 500] {
            for answer in [
                Answer::new(status, &headers, ""),
                // Also where the body is too long or does not end.
                Answer::new(status, &headers, &long),
                Answer::Closing(
                    format!("HTTP/1.1 {status} No\r\n{headers}content-length: 9\r\n\r\nha").into(),
                ),
            ] {
                let receiver = Receiver::start([answer]);
                let told = Arc::new(Mutex::new(None));
                let (notify, noticed) = tokio::sync::oneshot::channel();
                let (keep, notify) = (Arc::clone(&told), Mutex::new(Some(notify)));
                let observer = move |retrying: &Retrying<'_>| {
                    *keep.lock().unwrap() = Some(retrying.pause);
                    let _ = notify.lock().unwrap().take().map(|notify| notify.send(()));
                };
                let retry = Retry { retries: 4, minimum: OWN, maximum: OWN };
                let client = Client::for_endpoint(&receiver.endpoint(), None).unwrap();
                let poster =
                    Poster::new(client, receiver.endpoint(), None, LONG, retry, Some(Arc::new(observer)));
                // The pause itself is not waited for.
                tokio::select! {
                    _ = poster.deliver(1, Batch { body: b"x\n".to_vec(), events: 1 }) => {}
                    noticed = noticed => noticed.unwrap(),
                }
                assert_eq!(*told.lock().unwrap(), Some(pause), "{status} {headers}");
            }
        }
    }
}
