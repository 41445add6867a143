//! Every documented status, from real requests.

use crate::harness::client::{Answer, Client, request};
use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::key_server::{KeyServer, ServerAnswer};
use crate::harness::records::{Quarantined, quarantine};
use crate::harness::sign::cef;
use crate::harness::site::{PATH, Site, TOKEN, raw_sinks, sink, source};
use crate::harness::{body, gzip, wait_until};

const NOTHING: Receipt = Receipt { accepted: 0, duplicates: 0, quarantined: 0 };

/// Sends the head of a request only, and reads the response.
fn head_only(daemon: &Daemon<'_>, method: &str, path: &str, headers: &[(&str, &str)]) -> (Client, Answer) {
    let mut client = daemon.connect();
    client.send(&request(method, path, headers, b""));
    let answer = client.answer();
    (client, answer)
}

#[test]
fn a_200_for_every_accepted_coding_and_framing() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let mut next = 0..;
    let mut sent = Vec::new();
    let mut event = || {
        let event = site.producer.event(next.next().unwrap());
        sent.push(event.clone());
        event
    };
    let one = Receipt { accepted: 1, ..NOTHING };
    let codings = ["application/gzip", "application/x-gzip", "gzip", "x-gzip", "GZip"].map(Some);
    for coding in codings.into_iter().chain([None, Some("identity"), Some("br")]) {
        // gzip is recognised whatever coding is declared.
        let bytes = gzip(event().as_bytes());
        assert_eq!(Receipt::of(&daemon.post(coding, &bytes)), one, "{coding:?}");
    }
    for coding in [None, Some("identity")] {
        assert_eq!(Receipt::of(&daemon.post(coding, event().as_bytes())), one, "{coding:?}");
    }
    let several = format!("\r\n{}\r\n\n{}", event(), event());
    assert_eq!(Receipt::of(&daemon.post(None, several.as_bytes())).accepted, 2);
    for empty in ["", "\n", "\r\n\n"] {
        assert_eq!(Receipt::of(&daemon.post(None, empty.as_bytes())), NOTHING);
        assert_eq!(Receipt::of(&daemon.post(Some("gzip"), &gzip(empty.as_bytes()))), NOTHING);
    }
    assert_eq!(Receipt::of(&daemon.post(Some("application/gzip"), b"")), NOTHING);

    // Chunked (RFC 9112, section 7.1), and several requests on one connection.
    let mut client = daemon.connect();
    let headers = [("Authorization", TOKEN), ("Transfer-Encoding", "chunked")];
    for _ in 0..3 {
        client.send(&request("POST", PATH, &headers, b""));
        for piece in event().as_bytes().chunks(100) {
            client.send(format!("{:x}\r\n", piece.len()).as_bytes());
            client.send(piece);
            client.send(b"\r\n");
        }
        client.send(b"0\r\n\r\n");
        assert_eq!(Receipt::of(&client.answer()), one);
    }

    // The sender waits for a 100 before it sends the body.
    let line = event();
    let mut client = daemon.connect();
    client.begin_post(line.len());
    client.send(line.as_bytes());
    assert_eq!(Receipt::of(&client.answer()), one);

    daemon.settle();
    assert_eq!(site.read("verified.log"), body(&sent));
    assert_eq!(site.read("quarantine.jsonl"), b"");
}

#[test]
fn a_sender_that_closes_its_half_still_gets_its_answers() {
    for site in [Site::new(), Site::new().plain()] {
        let daemon = Daemon::start(&site);
        let post = |number: u64, head: &str| {
            let event = site.producer.event(number);
            let length = event.len();
            format!(
                "POST {PATH} {head}\r\nHost: localhost\r\nAuthorization: {TOKEN}\r\nContent-Length: {length}\r\n\r\n{event}"
            )
        };
        // With TLS's close_notify, and without.
        for (number, close) in (0..).zip([Client::finish, Client::cut]) {
            let mut client = daemon.connect();
            client.send(post(number, "HTTP/1.1").as_bytes());
            close(&mut client);
            assert_eq!(Receipt::of(&client.answer()).accepted, 1);
            assert_eq!(client.rest(), b"");
        }
        let mut client = daemon.connect();
        let all: String = (10..15).map(|number| post(number, "HTTP/1.1")).collect();
        client.send(all.as_bytes());
        client.finish();
        for _ in 0..5 {
            assert_eq!(Receipt::of(&client.answer()).accepted, 1);
        }
        assert_eq!(client.rest(), b"");
        // An incomplete body is not accepted.
        for close in [Client::finish, Client::cut] {
            let mut client = daemon.connect();
            let whole = post(20, "HTTP/1.1");
            client.send(&whole.as_bytes()[..whole.len() - 1]);
            close(&mut client);
            assert_eq!(client.rest(), b"");
        }
        daemon.settle();
        assert_eq!(site.verified().len(), 7);
        assert_eq!(site.read("quarantine.jsonl"), b"");
    }
}

#[test]
fn http_1_0_is_served_and_counted() {
    let site = Site::new().limits("connections = 2");
    let daemon = Daemon::start(&site);
    let [first, second] = [0, 1].map(|number| site.producer.event(number));
    let head = |more: &str| {
        format!(
            "POST {PATH} HTTP/1.0\r\nHost: localhost\r\nAuthorization: {TOKEN}\r\nConnection: keep-alive\r\n{more}\r\n"
        )
    };
    let length = |event: &str| format!("Content-Length: {}\r\n", event.len());
    let mut idle = Vec::new();
    for event in [&first, &second] {
        let mut client = daemon.connect();
        client.send((head(&length(event)) + event).as_bytes());
        assert_eq!(Receipt::of(&client.answer()).accepted, 1);
        idle.push(client);
    }
    // Both are idle, and one is evicted at once.
    assert_eq!(Receipt::of(&daemon.post(None, first.as_bytes())).duplicates, 1);
    daemon.wait_for_count("auditgate_http_connections_closed_total{reason=\"evicted\"}", 1);
    // A body that ends with the connection (RFC 1945, section 7.2): a truncated one would look
    // complete.
    let third = site.producer.event(2);
    let mut client = daemon.connect();
    client.send((head("") + &third).as_bytes());
    client.answer().assert_problem(400);
    assert_eq!(client.rest(), b"");
    // Requests that hyper refuses get the same form of error.
    let mut client = daemon.connect();
    client.send(head("Transfer-Encoding: chunked\r\n").as_bytes());
    client.answer().assert_problem(400);
    daemon.wait_for_count("auditgate_http_requests_total{code=\"400\",source=\"\"}", 1);
    // Two `Host` headers (RFC 9112, section 3.2).
    let mut client = daemon.connect();
    client.send(&request(
        "POST",
        PATH,
        &[("Host", "other"), ("Authorization", TOKEN), ("Content-Length", "0")],
        b"",
    ));
    client.answer().assert_problem(400);
    daemon.settle();
    assert_eq!(site.verified(), [first, second]);
}

#[test]
fn a_400_keeps_the_body() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let whole = gzip(&body(&site.producer.events(0..100)));
    let mut wrong_checksum = whole.clone();
    let at = wrong_checksum.len() - 8;
    wrong_checksum[at] ^= 1;
    let bodies: [&[u8]; 4] =
        [&whole[..whole.len() / 2], b"declared as gzip, and plain", &wrong_checksum, b"\x1f\x8b"];
    for bytes in bodies {
        for _ in 0..2 {
            daemon.post(Some("application/gzip"), bytes).assert_problem(400);
        }
    }
    daemon.settle();
    let expected =
        bodies.map(|bytes| Quarantined { reason: "undecodable_body".to_owned(), raw: bytes.to_vec() });
    assert_eq!(quarantine(&site.read("quarantine.jsonl")), expected);
    assert_eq!(site.read("verified.log"), b"");
    assert_eq!(Receipt::of(&daemon.post(Some("application/gzip"), &whole)).accepted, 100);
}

#[test]
fn a_401_needs_no_body() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let longer = format!("{TOKEN}x");
    let other_case = TOKEN.to_lowercase();
    let wrong: [&[&str]; 6] =
        [&[], &["Bearer x"], &[&TOKEN[..TOKEN.len() - 1]], &[&longer], &[&other_case], &[TOKEN, TOKEN]];
    for values in wrong {
        for expect in [false, true] {
            let mut headers = vec![("Content-Length", "100")];
            headers.extend(values.iter().map(|value| ("Authorization", *value)));
            headers.extend(expect.then_some(("Expect", "100-continue")));
            // The body is held back, and the first response is final, not a 100.
            let (mut client, answer) = head_only(&daemon, "POST", PATH, &headers);
            answer.assert_problem(401);
            assert!(answer.header("www-authenticate").is_some());
            assert_eq!(client.rest(), b"", "the connection ends");
        }
    }

    // A sender that reads only after it has sent everything gets the response, not a reset.
    let mut client = daemon.connect();
    let five_megabytes = vec![b'x'; 5_000_000];
    let length = five_megabytes.len().to_string();
    client.send(&request("POST", PATH, &[("Content-Length", &length)], b""));
    for piece in five_megabytes.chunks(64 * 1024) {
        client.send(piece);
    }
    client.answer().assert_problem(401);
    daemon.settle();
    assert_eq!(site.read("quarantine.jsonl"), b"");
}

#[test]
fn a_404_and_a_405_come_before_the_token() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    for path in ["/", "/konnect", "/konnect/us//", "/konnect/us2", "/KONNECT/US", "/metrics"] {
        head_only(&daemon, "POST", path, &[("Content-Length", "5")]).1.assert_problem(404);
        head_only(&daemon, "GET", path, &[]).1.assert_problem(404);
    }
    for method in ["GET", "PUT", "DELETE", "OPTIONS", "PATCH"] {
        let (_, answer) = head_only(&daemon, method, PATH, &[("Authorization", TOKEN)]);
        answer.assert_problem(405);
        assert_eq!(answer.header("allow"), Some("POST"));
    }
}

#[test]
fn a_wrong_path_with_a_valid_token_is_logged_and_counted_under_its_source() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    // A slash at the end does not make another path.
    let event = site.producer.event(0);
    assert_eq!(daemon.post_to("/konnect/us/", None, event.as_bytes()).status, 200);
    let huge = "x".repeat(20 << 10);
    for (method, path, more, status) in
        [("POST", "/konnect/eu", "x", 404), ("GET", PATH, "x", 405), ("POST", PATH, &huge, 431)]
    {
        let headers = [("Authorization", TOKEN), ("Content-Length", "0"), ("X-More", more)];
        head_only(&daemon, method, path, &headers).1.assert_problem(status);
        daemon
            .wait_for_count(&format!("auditgate_http_requests_total{{code=\"{status}\",source=\"us\"}}"), 1);
    }
    daemon.wait_for_log("path=\"/konnect/eu\"");
    // Without a token it is counted without a source.
    head_only(&daemon, "POST", "/konnect/eu", &[("Content-Length", "0")]).1.assert_problem(404);
    daemon.wait_for_count("auditgate_http_requests_total{code=\"404\",source=\"\"}", 1);
    let refused = "code=\"request-lost\"";
    assert_eq!(daemon.log().iter().filter(|line| line.contains(refused)).count(), 1);
}

#[test]
fn a_byte_order_mark_in_front_of_a_body_is_dropped_and_counted() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let events = site.producer.events(0..3);
    let body = [b"\xef\xbb\xbf".to_vec(), body(&events)].concat();
    for (coding, body) in [(None, body.clone()), (Some("gzip"), gzip(&body))] {
        assert_eq!(daemon.post(coding, &body).status, 200);
    }
    daemon.settle();
    assert_eq!(site.verified(), events);
    daemon.wait_for_count("auditgate_byte_order_marks_total{source=\"us\"}", 2);
}

#[test]
fn a_413_for_each_limit() {
    let site = Site::new()
        .limits("body = \"10KiB\"\ndecoded = \"32KiB\"\nline = \"32KiB\"\nlines = 100\nin_flight = \"1MiB\"");
    let daemon = Daemon::start(&site);
    // A declared length: refused before the body is sent.
    let headers = [("Authorization", TOKEN), ("Content-Length", "10241"), ("Expect", "100-continue")];
    head_only(&daemon, "POST", PATH, &headers).1.assert_problem(413);
    let headers = [("Authorization", TOKEN), ("Content-Length", "99999999999999999999")];
    let mut client = daemon.connect();
    client.send(&request("POST", PATH, &headers, b""));
    assert!([400, 413].contains(&client.answer().status));
    // Chunked: refused when the limit is exceeded.
    let mut client = daemon.connect();
    client.send(&request("POST", PATH, &[("Authorization", TOKEN), ("Transfer-Encoding", "chunked")], b""));
    for _ in 0..3 {
        client.send(b"1000\r\n");
        client.send(&[b'x'; 0x1000]);
        client.send(b"\r\n");
    }
    client.answer().assert_problem(413);

    // An unsigned event of that many bytes.
    let event = |length: usize| format!("{{\"x\":\"{}\"}}", "x".repeat(length - 8)).into_bytes();
    assert_eq!(daemon.post(None, &event(10 * 1024)).status, 200);
    daemon.post(None, &event(10 * 1024 + 1)).assert_problem(413);
    assert_eq!(daemon.post(None, &gzip(&event(32 * 1024))).status, 200);
    daemon.post(None, &gzip(&event(32 * 1024 + 1))).assert_problem(413);
    let lines: Vec<_> = (0..101).map(|number| format!("{{\"x\":{number}}}")).collect();
    assert_eq!(daemon.deliver(&lines[..100]).quarantined, 100);
    daemon.post(None, &body(&lines)).assert_problem(413);
    // Blank lines do not count.
    assert_eq!(Receipt::of(&daemon.post(None, &[b'\n'; 1000])), NOTHING);
    // The log says what to do about it.
    assert!(daemon.log().iter().any(|line| line.contains("ERROR") && line.contains("code=\"batch-lost\"")));
    daemon.settle();
    assert_eq!(quarantine(&site.read("quarantine.jsonl")).len(), 102);
}

#[test]
fn a_415_for_another_type_or_an_unknown_coding() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    let event = site.producer.event(0);
    for kind in ["application/json", "text/plainer", "text", ""] {
        let headers = [("Authorization", TOKEN), ("Content-Type", kind), ("Content-Length", "10")];
        head_only(&daemon, "POST", PATH, &headers).1.assert_problem(415);
    }
    for coding in ["br", "zstd", "gzip, br", "deflate"] {
        daemon.post(Some(coding), event.as_bytes()).assert_problem(415);
    }
    for kind in ["text/plain; charset=utf-8", "TEXT/PLAIN"] {
        let length = event.len().to_string();
        let headers = [("Authorization", TOKEN), ("Content-Type", kind), ("Content-Length", &length)];
        let mut client = daemon.connect();
        client.send(&request("POST", PATH, &headers, event.as_bytes()));
        assert_eq!(client.answer().status, 200, "{kind}");
    }
    assert_eq!(daemon.post(Some("br"), &gzip(event.as_bytes())).status, 200);
    daemon.settle();
    assert_eq!(site.verified(), [event]);
    assert_eq!(site.read("quarantine.jsonl"), b"");
}

#[test]
fn a_431_for_headers_that_are_too_large() {
    let site = Site::new();
    let daemon = Daemon::start(&site);
    for size in [20, 100, 1000] {
        let huge = "x".repeat(size * 1024);
        let mut client = daemon.connect();
        client.send(&request("POST", PATH, &[("Authorization", TOKEN), ("X-Huge", &huge)], b""));
        assert_eq!(client.answer().status, 431, "{size} KiB");
    }
    assert_eq!(daemon.deliver(&[site.producer.event(0)]).accepted, 1);
}

#[test]
fn a_429_until_a_key_has_been_loaded() {
    // Nothing listens on port 1.
    let more = "jwks = { url = \"http://127.0.0.1:1/jwks.json\" }";
    let site = Site::new().sources(&source("us", PATH, more));
    let daemon = Daemon::start(&site);
    let headers = [("Authorization", TOKEN), ("Content-Length", "100")];
    head_only(&daemon, "POST", PATH, &headers).1.assert_retry_after_30_s();
    daemon.post(None, site.producer.event(0).as_bytes()).assert_retry_after_30_s();
    // Without a token the daemon's state is not revealed.
    head_only(&daemon, "POST", PATH, &[("Content-Length", "100")]).1.assert_problem(401);
    daemon.wait_until_unready("");
    assert_eq!(site.read("quarantine.jsonl"), b"");
}

#[test]
fn keys_are_fetched_as_soon_as_possible_and_cached() {
    let keys = KeyServer::start();
    keys.answer(ServerAnswer::status("500 Internal Server Error"));
    let more = format!("jwks = {{ url = \"{}\" }}", keys.url());
    let site = Site::new().sources(&source("us", PATH, &more));
    let daemon = Daemon::start(&site);
    let event = site.producer.event(0);
    daemon.post(None, event.as_bytes()).assert_retry_after_30_s();
    keys.serve(&site.producer.jwks());
    wait_until("the keys are loaded", || match daemon.post(None, event.as_bytes()).status {
        200 => Ok(()),
        status => Err(status.to_string()),
    });
    daemon.terminate();

    // After a restart the cached keys are used.
    keys.answer(ServerAnswer::status("500 Internal Server Error"));
    let daemon = Daemon::start(&site);
    assert_eq!(daemon.deliver(&[site.producer.event(1)]).accepted, 1);
    daemon.settle();
    assert_eq!(site.verified(), site.producer.events(0..2));
}

#[test]
fn a_403_for_an_address_that_is_not_allowed() {
    let here = source("us", PATH, "allow = [\"192.0.2.1\", \"127.0.0.0/8\"]");
    let there = source("eu", "/konnect/eu", "allow = [\"192.0.2.0/24\", \"::1\"]");
    let site = Site::new().sources(&(here + &there));
    let daemon = Daemon::start(&site);
    assert_eq!(daemon.deliver(&[site.producer.event(0)]).accepted, 1);
    // Even with a valid token, and before the body is requested.
    let headers = [("Authorization", TOKEN), ("Content-Length", "100")];
    let (mut client, answer) = head_only(&daemon, "POST", "/konnect/eu", &headers);
    assert_eq!((answer.status, answer.header("connection")), (403, Some("close")));
    assert_eq!(client.rest(), b"");
    let requests = daemon.metrics().into_iter().find(|(series, _)| {
        series.starts_with("auditgate_http_requests_total") && series.contains("403") && series.contains("eu")
    });
    assert_eq!(requests.unwrap().1, "1");
}

#[test]
fn a_429_while_a_stuck_sink_fills_the_backlog() {
    let site = Site::new().limits("backlog = \"4KiB\"");
    // A directory is in the place of the sink's file.
    std::fs::create_dir(site.path("verified.log")).unwrap();
    let daemon = Daemon::start(&site);
    let headers = [("Authorization", TOKEN), ("Content-Length", "100")];
    let mut taken = Vec::new();
    for number in 0.. {
        let event = site.producer.event(number);
        let answer = daemon.post(None, event.as_bytes());
        if answer.status == 429 {
            answer.assert_retry_after_30_s();
            break;
        }
        assert_eq!(Receipt::of(&answer).accepted, 1);
        taken.push(event);
    }
    assert!((4..40).contains(&taken.len()), "{}", taken.len());
    head_only(&daemon, "POST", PATH, &headers).1.assert_retry_after_30_s();
    daemon.wait_until_unready("");

    std::fs::remove_dir(site.path("verified.log")).unwrap();
    let event = site.producer.event(1000);
    wait_until("batches are accepted again", || match daemon.post(None, event.as_bytes()).status {
        200 => Ok(()),
        status => Err(status.to_string()),
    });
    taken.push(event);
    daemon.settle();
    assert_eq!(site.verified(), taken);
}

#[test]
fn a_429_when_there_is_no_memory_for_another_body() {
    let site =
        Site::new().limits("body = \"1MiB\"\ndecoded = \"1MiB\"\nlines = 2000\nin_flight = \"3100KiB\"");
    let daemon = Daemon::start(&site);
    // Two bodies that do not fit together once they are inflated; the end of the first one is held
    // back.
    let large = body(&site.producer.events(0..2000));
    assert!((800_000..1_000_000).contains(&large.len()), "{}", large.len());
    let mut slow = daemon.connect();
    slow.begin_post(large.len());
    slow.send(&large[..large.len() - 10]);
    let other = body(&site.producer.events(5000..7000));
    let refused = wait_until("there is no memory", || {
        let answer = daemon.post(None, &other);
        if answer.status == 429 { Ok(answer) } else { Err(answer.status.to_string()) }
    });
    refused.assert_problem(429);
    let wait: u32 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((5..=10).contains(&wait), "{wait}");
    slow.send(&large[large.len() - 10..]);
    assert_eq!(Receipt::of(&slow.answer()).accepted, 2000);
    let receipt = Receipt::of(&daemon.post(None, &other));
    assert_eq!(receipt.accepted + receipt.duplicates, 2000);
}

#[test]
fn rejected_lines_cannot_crowd_out_verified_events() {
    let site = Site::new().limits("backlog = \"64KiB\"");
    std::fs::create_dir(site.path("quarantine.jsonl")).unwrap();
    let daemon = Daemon::start(&site);
    let unsigned = |number: u32| format!("{{\"x\":\"{}\"}}", format!("{number}").repeat(5000)).into_bytes();
    let mut posted = 0;
    let refused = loop {
        posted += 1;
        let answer = daemon.post(None, &unsigned(posted));
        if answer.status != 200 {
            break answer;
        }
        assert!(posted < 40);
    };
    refused.assert_retry_after_30_s();
    assert_eq!(daemon.deliver(&site.producer.events(0..10)).accepted, 10);
    daemon.post(None, &unsigned(posted)).assert_retry_after_30_s();
    // Until then the last line may be incomplete.
    wait_until("the events are delivered", || {
        match site.read("verified.log").iter().filter(|byte| **byte == b'\n').count() {
            10 => Ok(()),
            found => Err(found.to_string()),
        }
    });
    assert_eq!(site.verified().len(), 10);
}

#[test]
fn a_truncated_or_slow_body_gets_no_answer() {
    let site = Site::new().limits("request_timeout = \"3s\"");
    let daemon = Daemon::start(&site);
    let event = site.producer.event(0);
    let half = &event.as_bytes()[..event.len() / 2];
    let length = event.len().to_string();
    let announced = [("Authorization", TOKEN), ("Content-Length", &length)];
    let chunked = [("Authorization", TOKEN), ("Transfer-Encoding", "chunked")];
    let piece = [format!("{:x}\r\n", half.len()).as_bytes(), half, b"\r\n"].concat();
    for (headers, bytes) in [(&announced[..], half), (&chunked[..], &piece[..])] {
        for is_cut in [true, false] {
            let mut client = daemon.connect();
            client.send(&request("POST", PATH, headers, bytes));
            if is_cut {
                client.cut();
            }
            assert_eq!(client.rest(), b"", "an answer to an incomplete body");
        }
    }
    daemon.settle();
    assert_eq!(site.read("quarantine.jsonl"), b"");
    assert_eq!(site.read("verified.log"), b"");
    assert_eq!(daemon.deliver(&[event]).accepted, 1);
}

#[test]
fn unverified_lines_stay_out_of_the_verified_file() {
    let site = Site::new()
        .sources(
            &[
                source("us", PATH, "signatures = \"accept-unsigned\""),
                source("off", "/off", "signatures = \"off\""),
            ]
            .concat(),
        )
        .sinks(&(raw_sinks() + &sink("unverified", "raw", "\"unverified\"")));
    let daemon = Daemon::start(&site);
    let signed = site.producer.event(0);
    let unsigned = cef(1, "rt=1684454619000");
    let damaged = site.producer.event(3).replace("granted=true", "granted=fals");
    let lines = [&signed, &unsigned, &damaged];
    assert_eq!(daemon.deliver(&lines), Receipt { accepted: 2, duplicates: 0, quarantined: 1 });
    assert_eq!(Receipt::of(&daemon.post_to("/off", None, &body(&lines))).accepted, 3);
    daemon.settle();
    assert_eq!(site.read("verified.log"), body(std::slice::from_ref(&signed)));
    let unverified = [unsigned.clone(), signed, unsigned, damaged.clone()];
    assert_eq!(site.read("unverified.log"), body(&unverified));
    let rejected = Quarantined { reason: "bad_signature".to_owned(), raw: damaged.into_bytes() };
    assert_eq!(quarantine(&site.read("quarantine.jsonl")), [rejected]);
}
