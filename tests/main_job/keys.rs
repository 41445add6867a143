//! Key rotation, failing key servers, and keys of other producers: no genuine event is rejected,
//! and no forged event is verified.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};

use crate::harness::client::{Answer, Client, request};
use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::key_server::{KeyServer, ServerAnswer};
use crate::harness::records::quarantine;
use crate::harness::sign::{Producer, jwks};
use crate::harness::site::{PATH, Site, TOKEN, source};
use crate::harness::{body, wait_until};

/// Returns a JWKS document with these producers' keys.
fn document(producers: &[&Producer]) -> String {
    let named: Vec<(String, [u8; 32])> = producers
        .iter()
        .enumerate()
        .map(|(number, producer)| (format!("k{number}"), producer.public()))
        .collect();
    let named: Vec<(&str, &[u8; 32])> = named.iter().map(|(kid, public)| (kid.as_str(), public)).collect();
    jwks(&named)
}

/// Returns the thumbprint of a producer's key (RFC 7638, with the members of RFC 8037).
fn thumbprint(producer: &Producer) -> String {
    let x = URL_SAFE_NO_PAD.encode(producer.public());
    let members = format!("{{\"crv\":\"Ed25519\",\"kty\":\"OKP\",\"x\":\"{x}\"}}");
    URL_SAFE_NO_PAD.encode(Sha256::digest(members))
}

fn site(keys: &KeyServer, more: &str) -> Site {
    let jwks = format!("jwks = {{ url = \"{}\", refresh = \"1h\"{more} }}", keys.url());
    Site::new().sources(&source("us", PATH, &jwks))
}

/// Generator of events with new numbers.
struct Events(u64);

impl Events {
    fn next(&mut self, producer: &Producer, count: u64) -> Vec<String> {
        self.0 += count;
        producer.events(self.0 - count..self.0)
    }
}

/// Posts batches at the same time: all are sent but for the last byte before the first one is
/// completed.
fn burst(daemon: &Daemon<'_>, batches: &[Vec<String>]) -> Vec<Answer> {
    let (mut clients, bodies): (Vec<_>, Vec<_>) =
        batches.iter().map(|batch| (daemon.connect(), body(batch))).unzip();
    for (client, body) in clients.iter_mut().zip(&bodies) {
        let length = body.len().to_string();
        let headers = [("Authorization", TOKEN), ("Content-Length", &length)];
        client.send(&request("POST", PATH, &headers, &body[..body.len() - 1]));
    }
    for client in &mut clients {
        client.send(b"\n");
    }
    clients.iter_mut().map(Client::answer).collect()
}

/// Returns how many keys are in use, and how many of them are retired.
fn in_use(daemon: &Daemon<'_>) -> (String, String) {
    let metrics = daemon.metrics();
    let number = |name: &str| metrics[&format!("auditgate_jwks_{name}{{source=\"us\"}}")].clone();
    (number("keys"), number("retired_keys"))
}

/// Makes the daemon fetch the keys, and waits for the request.
fn refresh_now(daemon: &Daemon<'_>, keys: &KeyServer) {
    let before = keys.requests();
    daemon.signal("HUP");
    wait_until("the daemon fetches the keys", || {
        if keys.requests() > before { Ok(()) } else { Err("not yet".to_owned()) }
    });
}

#[test]
fn no_genuine_event_is_quarantined_over_a_rotation() {
    const BURST: usize = 8;
    let [first, second, third, unknown] = [1, 2, 3, 4].map(Producer::new);
    let mut events = Events(0);
    let keys = KeyServer::start();
    keys.serve(&document(&[&first]));
    let site = site(&keys, "");
    let daemon = Daemon::start(&site);
    let mut all = Vec::new();
    let mut is_accepted = |daemon: &Daemon<'_>, batch: Vec<String>| {
        let accepted = batch.len() as u64;
        assert_eq!(daemon.deliver(&batch), Receipt { accepted, ..Receipt::default() });
        all.extend(batch);
    };
    is_accepted(&daemon, events.next(&first, 10));
    assert_eq!(keys.requests(), 1);

    // A new key beside the old one: a burst of its events makes the daemon fetch once.
    keys.serve(&document(&[&first, &second]));
    let batches: Vec<_> = (0..BURST).map(|_| events.next(&second, 5)).collect();
    for answer in burst(&daemon, &batches) {
        assert_eq!(Receipt::of(&answer), Receipt { accepted: 5, ..Receipt::default() });
    }
    let mut committed = batches.concat();
    assert_eq!(keys.requests(), 2, "one fetch for a burst");

    // The old key leaves the set, and its events are still accepted.
    keys.serve(&document(&[&second]));
    refresh_now(&daemon, &keys);
    wait_until("the first key is retired", || {
        let found = in_use(&daemon);
        if found == ("2".to_owned(), "1".to_owned()) { Ok(()) } else { Err(format!("{found:?}")) }
    });
    is_accepted(&daemon, events.next(&first, 10));
    is_accepted(&daemon, events.next(&second, 10));
    assert_eq!(keys.requests(), 3);

    // The server fails, and returns bad documents: known keys stay valid, and batches by an unknown
    // key get a 429.
    let elsewhere = format!("Location: {}\r\n", keys.url());
    let bad_answers = [
        ServerAnswer::hang_up(),
        ServerAnswer::status("503 Service Unavailable"),
        ServerAnswer::with("302 Found", &elsewhere, ""),
        ServerAnswer::with("200 OK", "", ""),
        ServerAnswer::with("200 OK", "Content-Type: text/html\r\n", "<html>down</html>"),
        ServerAnswer::with("200 OK", "", "{\"keys\":[]}"),
        ServerAnswer::with("200 OK", "", &document(&[&third])[..40]),
        ServerAnswer::Endless,
        ServerAnswer::Silence,
    ];
    let waiting: Vec<_> = (0..BURST).map(|_| events.next(&third, 5)).collect();
    for answer in bad_answers {
        let said = format!("{answer:?}");
        keys.answer(answer);
        let before = keys.requests();
        for answer in burst(&daemon, &waiting) {
            answer.assert_retry_after_30_s();
        }
        assert_eq!(keys.requests(), before + 1, "{said}: one fetch for a burst");
        is_accepted(&daemon, events.next(&first, 3));
        is_accepted(&daemon, events.next(&second, 3));
        assert_eq!(keys.requests(), before + 1, "{said}: known keys need no fetch");
    }
    keys.serve(&document(&[&second, &third]));
    for answer in burst(&daemon, &waiting) {
        assert_eq!(Receipt::of(&answer), Receipt { accepted: 5, ..Receipt::default() });
    }
    committed.extend(waiting.concat());

    // Signatures by a key that is never listed cause one fetch, and then are quarantined.
    let before = keys.requests();
    let forged: Vec<_> = (0..BURST).map(|_| events.next(&unknown, 2)).collect();
    for answer in burst(&daemon, &forged) {
        assert_eq!(Receipt::of(&answer), Receipt { quarantined: 2, ..Receipt::default() });
    }
    assert_eq!(keys.requests(), before + 1, "one fetch for a burst");

    // After a restart without a key server all keys are still known.
    daemon.settle();
    daemon.kill9();
    keys.answer(ServerAnswer::hang_up());
    let daemon = Daemon::start(&site);
    for producer in [&first, &second, &third] {
        is_accepted(&daemon, events.next(producer, 3));
    }
    assert_eq!(in_use(&daemon), ("3".to_owned(), "1".to_owned()));
    daemon.settle();
    daemon.terminate();

    committed.extend(all);
    let mut verified = site.verified();
    verified.sort();
    committed.sort();
    assert!(verified == committed, "every genuine event once");
    let mut rejected: Vec<Vec<u8>> =
        quarantine(&site.read("quarantine.jsonl")).into_iter().map(|line| line.raw).collect();
    let mut forged: Vec<Vec<u8>> = forged.concat().into_iter().map(String::into_bytes).collect();
    rejected.sort();
    forged.sort();
    assert!(rejected == forged, "only forged events are in quarantine");
}

#[test]
fn a_key_that_is_listed_right_after_unknown_signatures_is_found() {
    let [first, second, unknown] = [1, 2, 3].map(Producer::new);
    let mut events = Events(0);
    let keys = KeyServer::start();
    keys.serve(&document(&[&first]));
    let site = site(&keys, "");
    let daemon = Daemon::start(&site);
    let quarantined = Receipt { quarantined: 1, ..Receipt::default() };
    for asked in 2..=4 {
        assert_eq!(daemon.deliver(&events.next(&unknown, 1)), quarantined);
        assert_eq!(keys.requests(), asked, "no event is judged by an older document");
    }
    // The daemon has fetched several times just before; it must fetch again.
    keys.serve(&document(&[&first, &second]));
    let mut by_second = events.next(&second, 2);
    by_second.extend(events.next(&unknown, 1));
    assert_eq!(daemon.deliver(&by_second), Receipt { accepted: 2, duplicates: 0, quarantined: 1 });
    daemon.settle();
    assert_eq!(site.verified(), by_second[..2]);
    // A batch with lines by a known key is judged by a recent document; the other lines can be
    // posted again.
    let third = Producer::new(4);
    assert_eq!(daemon.deliver(&events.next(&unknown, 1)), quarantined);
    keys.serve(&document(&[&first, &second, &third]));
    let mut mixed = events.next(&first, 2);
    mixed.extend(events.next(&third, 2));
    assert_eq!(daemon.deliver(&mixed), Receipt { accepted: 2, duplicates: 0, quarantined: 2 });
    refresh_now(&daemon, &keys);
    daemon.wait_for_count("auditgate_jwks_keys{source=\"us\"}", 3);
    assert_eq!(daemon.deliver(&mixed), Receipt { accepted: 2, duplicates: 2, quarantined: 0 });
}

#[test]
fn a_batch_with_lines_by_a_known_key_does_not_wait_for_a_dead_key_server() {
    let [first, second] = [1, 2].map(Producer::new);
    let mut events = Events(0);
    let keys = KeyServer::start();
    keys.serve(&document(&[&first]));
    let site = site(&keys, "");
    let daemon = Daemon::start(&site);
    keys.answer(ServerAnswer::hang_up());
    let mut mixed = events.next(&first, 2);
    mixed.extend(events.next(&second, 1));
    assert_eq!(daemon.deliver(&mixed), Receipt { accepted: 2, duplicates: 0, quarantined: 1 });
    // The key is listed later: quarantined lines are posted again, and verify.
    keys.serve(&document(&[&first, &second]));
    assert_eq!(daemon.deliver(&mixed), Receipt { accepted: 1, duplicates: 2, quarantined: 0 });
    daemon.settle();
    assert_eq!(site.verified(), mixed);
}

#[test]
fn one_bad_line_in_every_batch_does_not_slow_a_source() {
    let (known, unknown) = (Producer::new(1), Producer::new(9));
    let keys = KeyServer::start();
    keys.serve(&document(&[&known]));
    let site = site(&keys, "");
    let daemon = Daemon::start(&site);
    let mut events = Events(0);
    for _ in 0..20 {
        let mut batch = events.next(&known, 24);
        batch.extend(events.next(&unknown, 1));
        let receipt = daemon.deliver(&batch);
        assert_eq!(receipt, Receipt { accepted: 24, quarantined: 1, ..Receipt::default() });
    }
    // Each further fetch would have taken five seconds.
    assert!(keys.requests() <= 4, "{}", keys.requests());
}

#[test]
fn without_keys_batches_are_refused_until_the_keys_are_loaded() {
    let keys = KeyServer::start();
    let site = site(&keys, "");
    let daemon = Daemon::start(&site);
    let events = site.producer.events(0..20);
    let refused = daemon.post(None, &body(&events));
    refused.assert_retry_after_30_s();
    keys.serve(&document(&[&site.producer]));
    wait_until("the keys are loaded", || match daemon.post(None, &body(&events)).status {
        200 => Ok(()),
        status => Err(status.to_string()),
    });
    daemon.settle();
    assert_eq!(site.verified(), events);
    assert_eq!(site.read("quarantine.jsonl"), b"");
}

#[test]
fn pinned_keys_are_the_only_ones_and_revoked_keys_end() {
    let [first, second] = [1, 2].map(Producer::new);
    let mut events = Events(0);
    let keys = KeyServer::start();
    keys.serve(&document(&[&first, &second]));
    let only_first = Receipt { accepted: 1, duplicates: 0, quarantined: 1 };
    let configurations = [
        format!(", pin = [\"{}\"]", thumbprint(&first)),
        format!(", revoked = [\"{}\"]", thumbprint(&second)),
    ];
    for more in configurations {
        let site = site(&keys, &more);
        let daemon = Daemon::start(&site);
        let batch = [events.next(&first, 1), events.next(&second, 1)].concat();
        assert_eq!(daemon.deliver(&batch), only_first, "{more}");
        daemon.terminate();
    }
    // A key whose `kid` is the pinned thumbprint is still another key.
    let pin = thumbprint(&first);
    keys.serve(&jwks(&[(&pin, &second.public()), ("k", &first.public())]));
    let pinning = site(&keys, &format!(", pin = [\"{pin}\"]"));
    let daemon = Daemon::start(&pinning);
    let batch = [events.next(&first, 1), events.next(&second, 1)].concat();
    assert_eq!(daemon.deliver(&batch), only_first, "an impostor");
    daemon.terminate();
    // A revoked key ends with the next start, even if it was retired.
    let site = site(&keys, "");
    let daemon = Daemon::start(&site);
    let batch = [events.next(&first, 1), events.next(&second, 1)].concat();
    assert_eq!(daemon.deliver(&batch).accepted, 2);
    keys.serve(&document(&[&first]));
    refresh_now(&daemon, &keys);
    wait_until("the second key is retired", || {
        let found = in_use(&daemon);
        if found == ("2".to_owned(), "1".to_owned()) { Ok(()) } else { Err(format!("{found:?}")) }
    });
    daemon.terminate();
    let revoked = format!("refresh = \"1h\", revoked = [\"{}\"]", thumbprint(&second));
    let site = site.edit("refresh = \"1h\"", &revoked);
    let daemon = Daemon::start(&site);
    let batch = [events.next(&first, 1), events.next(&second, 1)].concat();
    assert_eq!(daemon.deliver(&batch), only_first);
    daemon.terminate();
}

#[test]
fn a_key_that_is_allowed_again_is_used_although_the_document_has_not_changed() {
    let [first, second] = [1, 2].map(Producer::new);
    let mut events = Events(0);
    let keys = KeyServer::start();
    keys.answer(ServerAnswer::Tagged(document(&[&first, &second])));
    let only_first = Receipt { accepted: 1, duplicates: 0, quarantined: 1 };
    let both = Receipt { accepted: 2, ..Receipt::default() };
    let pin = |producers: &[&Producer]| {
        let pins: Vec<_> = producers.iter().map(|producer| format!("{:?}", thumbprint(producer))).collect();
        format!(", pin = [{}]", pins.join(", "))
    };
    let revoked = format!(", revoked = [\"{}\"]", thumbprint(&second));
    for (narrow, wide) in
        [(pin(&[&first]), pin(&[&first, &second])), (pin(&[&first]), String::new()), (revoked, String::new())]
    {
        let site = site(&keys, &narrow);
        let daemon = Daemon::start(&site);
        let mut one_of_each = || [events.next(&first, 1), events.next(&second, 1)].concat();
        assert_eq!(daemon.deliver(&one_of_each()), only_first, "{narrow}");
        site.reconfigure(&format!("refresh = \"1h\"{narrow} }}"), &format!("refresh = \"1h\"{wide} }}"));
        refresh_now(&daemon, &keys);
        assert_eq!(daemon.deliver(&one_of_each()), both, "after {narrow}: {wide}");
        daemon.terminate();
    }
}

#[test]
fn a_signature_by_another_sources_key_does_not_verify() {
    let [ours, theirs] = [1, 2].map(Producer::new);
    let key = |producer: &Producer| {
        let document: serde_json::Value = serde_json::from_str(&producer.jwks()).unwrap();
        format!("jwks = {{ keys = [{}] }}", document["keys"][0]["x"])
    };
    let site =
        Site::new().sources(&(source("us", PATH, &key(&ours)) + &source("eu", "/konnect/eu", &key(&theirs))));
    let daemon = Daemon::start(&site);
    let event = theirs.event(7);
    assert_eq!(daemon.deliver(&[&event]), Receipt { quarantined: 1, ..Receipt::default() });
    // It did not suppress the event in the source where it is genuine.
    let accepted = Receipt::of(&daemon.post_to("/konnect/eu", None, event.as_bytes()));
    assert_eq!(accepted, Receipt { accepted: 1, ..Receipt::default() });
    // The same bytes, signed by another source's own key, are another event.
    let copy = ours.event(7);
    assert_eq!(daemon.deliver(&[&copy]), Receipt { accepted: 1, ..Receipt::default() });
    daemon.settle();
    assert_eq!(site.verified(), [event, copy]);
}
