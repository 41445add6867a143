//! Keys that rotate, servers that fail, and keys of others: no genuine event is held to be forged, and no forged one
//! to be genuine.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};

use crate::harness::client::{Answer, Client, request};
use crate::harness::daemon::{Daemon, Receipt};
use crate::harness::key_server::{KeyServer, ServerAnswer};
use crate::harness::records::quarantine;
use crate::harness::sign::{Producer, jwks};
use crate::harness::site::{PATH, Site, TOKEN, source};
use crate::harness::{PATIENCE, body, wait_until};

/// A document that lists these producers' keys.
fn document(producers: &[&Producer]) -> String {
    let named: Vec<(String, [u8; 32])> = producers
        .iter()
        .enumerate()
        .map(|(number, producer)| (format!("k{number}"), producer.public()))
        .collect();
    let named: Vec<(&str, &[u8; 32])> = named.iter().map(|(kid, public)| (kid.as_str(), public)).collect();
    jwks(&named)
}

/// RFC 7638, with the members of RFC 8037.
fn thumbprint(producer: &Producer) -> String {
    let x = URL_SAFE_NO_PAD.encode(producer.public());
    let members = format!("{{\"crv\":\"Ed25519\",\"kty\":\"OKP\",\"x\":\"{x}\"}}");
    URL_SAFE_NO_PAD.encode(Sha256::digest(members))
}

fn site(keys: &KeyServer, more: &str) -> Site {
    let jwks = format!("jwks = {{ url = \"{}\", refresh = \"1h\"{more} }}", keys.url());
    Site::new().sources(&source("us", PATH, &jwks))
}

/// Numbers that no event had before.
struct Events(u64);

impl Events {
    fn next(&mut self, producer: &Producer, count: u64) -> Vec<String> {
        self.0 += count;
        producer.events(self.0 - count..self.0)
    }
}

/// Posts all batches at the same time: each is there but for its last byte before the first is complete.
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

/// How many keys are in use, and how many of them are retired.
fn in_use(daemon: &Daemon<'_>) -> (String, String) {
    let metrics = daemon.metrics();
    let number = |name: &str| metrics[&format!("auditgate_jwks_{name}{{source=\"us\"}}")].clone();
    (number("keys"), number("retired_keys"))
}

/// Lets the daemon look for keys now, and waits until it has looked.
fn look_now(daemon: &Daemon<'_>, keys: &KeyServer) {
    let before = keys.requests();
    daemon.signal("HUP");
    wait_until(PATIENCE, "the daemon looks for keys", || {
        if keys.requests() > before { Ok(()) } else { Err("not yet".to_owned()) }
    });
}

#[test]
fn no_genuine_event_is_quarantined_over_a_rotation() {
    const BURST: usize = 8;
    let [first, second, third, stranger] = [1, 2, 3, 4].map(Producer::new);
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

    // A new key beside the old one: a burst of its events makes the daemon ask once.
    keys.serve(&document(&[&first, &second]));
    let batches: Vec<_> = (0..BURST).map(|_| events.next(&second, 5)).collect();
    for answer in burst(&daemon, &batches) {
        assert_eq!(Receipt::of(&answer), Receipt { accepted: 5, ..Receipt::default() });
    }
    let mut committed = batches.concat();
    assert_eq!(keys.requests(), 2, "one fetch for a burst");

    // The old key is dropped, and its events still come.
    keys.serve(&document(&[&second]));
    look_now(&daemon, &keys);
    wait_until(PATIENCE, "the first key is retired", || {
        let found = in_use(&daemon);
        if found == ("2".to_owned(), "1".to_owned()) { Ok(()) } else { Err(format!("{found:?}")) }
    });
    is_accepted(&daemon, events.next(&first, 10));
    is_accepted(&daemon, events.next(&second, 10));
    assert_eq!(keys.requests(), 3);

    // It goes down, and comes back with rubbish: what was known stays known, and what was not is told to wait.
    let elsewhere = format!("Location: {}\r\n", keys.url());
    let bad_days = [
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
    for answer in bad_days {
        let said = format!("{answer:?}");
        keys.answer(answer);
        let before = keys.requests();
        for answer in burst(&daemon, &waiting) {
            assert_eq!(answer.status, 429, "{said}: {answer:?}");
            assert_eq!(answer.header("retry-after"), Some("30"));
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

    // What no key ever made is asked for once, and then quarantined.
    let before = keys.requests();
    let forged: Vec<_> = (0..BURST).map(|_| events.next(&stranger, 2)).collect();
    for answer in burst(&daemon, &forged) {
        assert_eq!(Receipt::of(&answer), Receipt { quarantined: 2, ..Receipt::default() });
    }
    assert_eq!(keys.requests(), before + 1, "one fetch for a burst");

    // After a restart without network all of it is still known.
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
    let mut strangers: Vec<Vec<u8>> = forged.concat().into_iter().map(String::into_bytes).collect();
    rejected.sort();
    strangers.sort();
    assert!(rejected == strangers, "nothing but what is forged is in quarantine");
}

#[test]
fn a_key_that_comes_right_after_foreign_signatures_is_found() {
    let [first, second, stranger] = [1, 2, 3].map(Producer::new);
    let mut events = Events(0);
    let keys = KeyServer::start();
    keys.serve(&document(&[&first]));
    let site = site(&keys, "");
    let daemon = Daemon::start(&site);
    let quarantined = Receipt { quarantined: 1, ..Receipt::default() };
    for asked in 2..=4 {
        assert_eq!(daemon.deliver(&events.next(&stranger, 1)), quarantined);
        assert_eq!(keys.requests(), asked, "nothing is judged by an older answer");
    }
    // The daemon has asked a moment ago, and again and again; it must not take that for the last word.
    keys.serve(&document(&[&first, &second]));
    let mut by_second = events.next(&second, 2);
    by_second.extend(events.next(&stranger, 1));
    assert_eq!(daemon.deliver(&by_second), Receipt { accepted: 2, duplicates: 0, quarantined: 1 });
    daemon.settle();
    assert_eq!(site.verified(), by_second[..2]);
    // A batch of which some lines fit a known key is judged by a moment-old answer; the rest can be sent in again.
    let third = Producer::new(4);
    assert_eq!(daemon.deliver(&events.next(&stranger, 1)), quarantined);
    keys.serve(&document(&[&first, &second, &third]));
    let mut mixed = events.next(&first, 2);
    mixed.extend(events.next(&third, 2));
    assert_eq!(daemon.deliver(&mixed), Receipt { accepted: 2, duplicates: 0, quarantined: 2 });
    look_now(&daemon, &keys);
    daemon.counted("auditgate_jwks_keys{source=\"us\"}", 3);
    assert_eq!(daemon.deliver(&mixed), Receipt { accepted: 2, duplicates: 2, quarantined: 0 });
}

#[test]
fn a_batch_of_which_some_is_known_is_not_held_up_by_a_dead_key_server() {
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
    // The key came late: what is in quarantine is sent in again, and found genuine.
    keys.serve(&document(&[&first, &second]));
    assert_eq!(daemon.deliver(&mixed), Receipt { accepted: 1, duplicates: 2, quarantined: 0 });
    daemon.settle();
    assert_eq!(site.verified(), mixed);
}

#[test]
fn one_bad_line_in_every_batch_does_not_slow_a_source() {
    let (known, foreign) = (Producer::new(1), Producer::new(9));
    let keys = KeyServer::start();
    keys.serve(&document(&[&known]));
    let site = site(&keys, "");
    let daemon = Daemon::start(&site);
    let mut events = Events(0);
    for _ in 0..20 {
        let mut batch = events.next(&known, 24);
        batch.extend(events.next(&foreign, 1));
        let receipt = daemon.deliver(&batch);
        assert_eq!(receipt, Receipt { accepted: 24, quarantined: 1, ..Receipt::default() });
    }
    // Each further one would have been waited for five seconds for.
    assert!(keys.requests() <= 4, "{}", keys.requests());
}

#[test]
fn without_keys_senders_wait_and_then_everything_flows() {
    let keys = KeyServer::start();
    let site = site(&keys, "");
    let daemon = Daemon::start(&site);
    let events = site.producer.events(0..20);
    let refused = daemon.post(None, &body(&events));
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("30")));
    keys.serve(&document(&[&site.producer]));
    wait_until(PATIENCE, "the keys are there", || match daemon.post(None, &body(&events)).status {
        200 => Ok(()),
        status => Err(status.to_string()),
    });
    daemon.settle();
    assert_eq!(site.verified(), events);
    assert_eq!(site.read("quarantine.jsonl"), b"");
}

#[test]
fn pinned_and_revoked_keys() {
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
    // A key whose name is the pinned thumbprint is another key all the same.
    let pin = thumbprint(&first);
    keys.serve(&jwks(&[(&pin, &second.public()), ("k", &first.public())]));
    let pinning = site(&keys, &format!(", pin = [\"{pin}\"]"));
    let daemon = Daemon::start(&pinning);
    let batch = [events.next(&first, 1), events.next(&second, 1)].concat();
    assert_eq!(daemon.deliver(&batch), only_first, "an impostor");
    daemon.terminate();
    // A key that was in use ends with the next start, also when it is retired.
    let site = site(&keys, "");
    let daemon = Daemon::start(&site);
    let batch = [events.next(&first, 1), events.next(&second, 1)].concat();
    assert_eq!(daemon.deliver(&batch).accepted, 2);
    keys.serve(&document(&[&first]));
    look_now(&daemon, &keys);
    wait_until(PATIENCE, "the second key is retired", || {
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
fn a_key_that_is_allowed_again_counts_although_the_document_is_the_same() {
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
        look_now(&daemon, &keys);
        assert_eq!(daemon.deliver(&one_of_each()), both, "after {narrow}: {wide}");
        daemon.terminate();
    }
}

#[test]
fn another_source_s_key_proves_nothing_here() {
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
    // And it did not suppress the event where that is genuine.
    let accepted = Receipt::of(&daemon.post_to("/konnect/eu", None, event.as_bytes()));
    assert_eq!(accepted, Receipt { accepted: 1, ..Receipt::default() });
    // The same bytes, signed by another source's own key, are another event.
    let copy = ours.event(7);
    assert_eq!(daemon.deliver(&[&copy]), Receipt { accepted: 1, ..Receipt::default() });
    daemon.settle();
    assert_eq!(site.verified(), [event, copy]);
}
