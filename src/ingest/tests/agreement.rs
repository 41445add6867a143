//! Batch checks, single checks and an independent implementation give the same verdict on every
//! line.
//!
//! 20 000 generated lines, or as many as `AUDITGATE_TESTS_LINES` says, one in a hundred damaged,
//! are judged three times:
//! - as the daemon judges a batch of 1000, through [`Judge::judge_all`];
//! - one by one, each as a batch of one, through the same;
//! - by a [`ReferenceVerifier`] that shares nothing with them: it splits, reads and cuts lines in
//!   its own way, by the format's description, and has signatures checked by aws-lc-rs, whose curve
//!   arithmetic and accept rule (RFC 8032 without the cofactor) are different. The lines are signed
//!   by aws-lc-rs, or by ed25519-dalek through
//!   [`signature::insert`](crate::wire::signature::insert).
//!
//! The whole class is compared: verified *and by which key*, bad, unsigned, malformed. Random
//! damage makes no signature that only the cofactor makes good; where the rules differ is shown in
//! `accept_rule`.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use ed25519_dalek::SigningKey;
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::super::judge::Judge;
use super::super::{DedupKey, Policy, Source};
use super::Class;
use super::generated_lines::{Damage, GeneratedLines, KEYS, Style, secret};
use super::reference_verifier::ReferenceVerifier;
use crate::ledger::Identifier;
use crate::trust::jwks::{self, KeySet};
use crate::wire::batch;

/// Lines in one body.
const BATCH: u64 = 1000;

fn trusted_keys() -> KeySet {
    let named: Vec<_> = (0..KEYS - 1)
        .map(|number| {
            let public = SigningKey::from_bytes(&secret(number)).verifying_key().to_bytes();
            (Some(format!("k{number}")), public)
        })
        .collect();
    jwks::parse(jwks::document(&named).as_bytes(), KEYS).unwrap().keys
}

#[test]
#[expect(clippy::print_stderr, reason = "the numbers are the test's report")]
fn batch_single_and_an_independent_implementation_agree() {
    let lines = std::env::var("AUDITGATE_TESTS_LINES").map_or(20_000, |lines| lines.parse().unwrap());
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut tally = Tally::default();
    std::thread::scope(|scope| {
        let work = || {
            let mut tally = Tally::default();
            loop {
                let first = next.fetch_add(BATCH, Ordering::Relaxed);
                if first >= lines {
                    return tally;
                }
                tally.compare(first, BATCH.min(lines - first));
            }
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            tally.add(worker.join().unwrap());
        }
    });
    eprintln!("{tally}");
    assert_eq!(tally.generated, lines);
    assert!(tally.expecting > 0, "no body after which a bad line is expected");
    for style in Style::ALL.map(|style| format!("{style:?}")) {
        assert!(tally.styles.contains_key(&style), "no line of the style {style}");
    }
    for damage in Damage::ALL {
        assert!(
            tally.damaged.keys().any(|(kind, _)| kind == &format!("{damage:?}")),
            "no line with {damage:?}"
        );
    }
    for class in [Class::Bad, Class::Unsigned, Class::Malformed] {
        assert!(tally.classes.contains_key(&class), "no line is {class:?}");
    }
    assert!((0..KEYS - 1).all(|key| tally.classes.contains_key(&Class::Verified { key })));
}

/// Number of lines by class, style and damage.
#[derive(Default)]
struct Tally {
    generated: u64,
    judged: u64,
    /// Number of bodies after which another bad line was expected.
    expecting: u64,
    classes: BTreeMap<Class, u64>,
    styles: BTreeMap<String, u64>,
    damaged: BTreeMap<(String, Class), u64>,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} lines generated, {} judged: {:?}", self.generated, self.judged, self.classes)?;
        writeln!(f, "styles: {:?}", self.styles)?;
        self.damaged
            .iter()
            .try_for_each(|((damage, class), count)| writeln!(f, "{damage}: {class:?}: {count}"))
    }
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.generated += other.generated;
        self.judged += other.judged;
        self.expecting += other.expecting;
        other.classes.into_iter().for_each(|(class, count)| *self.classes.entry(class).or_default() += count);
        other.styles.into_iter().for_each(|(style, count)| *self.styles.entry(style).or_default() += count);
        other.damaged.into_iter().for_each(|(kind, count)| *self.damaged.entry(kind).or_default() += count);
    }

    /// Generates a body, judges it three times and compares. The number of its first line is its
    /// seed.
    fn compare(&mut self, first: u64, count: u64) {
        let mut random = StdRng::seed_from_u64(first);
        let generated = GeneratedLines::new(count, &mut random);
        let body = generated.lines.join(&b'\n');
        let reference = ReferenceVerifier::new((0..KEYS - 1).map(secret));

        let source = Source::new("us".into(), Policy::Require, DedupKey::Event, None);
        let keys = trusted_keys();
        let identifier = Identifier::new([7; 32]);
        let judge = Judge::new(&source, Some(&keys), &identifier, usize::MAX);
        let classes = |lines: &mut dyn Iterator<Item = &[u8]>| -> Vec<Class> {
            let entries = judge.judge_all(lines, 0, &mut |_| ()).entries;
            entries.into_iter().flatten().map(|entry| Class::from(&entry.verdict)).collect()
        };
        let together = classes(&mut batch::lines(&body));
        // Where a signature was checked and failed, another one is expected, and batches are smaller; a
        // signature that is not well-formed is not checked.
        let expects_bad = source.expects_bad.load(Ordering::Relaxed);
        assert!(!expects_bad || together.contains(&Class::Bad));
        self.expecting += u64::from(expects_bad);
        assert_eq!(classes(&mut batch::lines(&body)), together);
        let alone: Vec<Class> =
            batch::lines(&body).flat_map(|line| classes(&mut std::iter::once(line))).collect();
        let lines = ReferenceVerifier::lines(&body);
        let independent: Vec<Class> = lines.iter().map(|line| reference.judge(line)).collect();
        assert_eq!((together.len(), alone.len()), (lines.len(), lines.len()));
        for (at, line) in lines.iter().enumerate() {
            assert!(
                together[at] == alone[at] && alone[at] == independent[at],
                "line {at} of batch {first}: {:?} in a batch, {:?} alone, {:?} independently: {}",
                together[at],
                alone[at],
                independent[at],
                String::from_utf8_lossy(line)
            );
            *self.classes.entry(together[at]).or_default() += 1;
        }
        self.generated += count;
        self.judged += lines.len() as u64;
        for (line, origin) in generated.lines.iter().zip(&generated.origins) {
            *self.styles.entry(format!("{:?}", origin.style)).or_default() += 1;
            // A damaged line may have become two, or none: the first one counts.
            let class = ReferenceVerifier::lines(line).first().map(|line| reference.judge(line));
            match (origin.damage, class) {
                (None, class) => assert_eq!(class, Some(Class::Verified { key: origin.key })),
                (Some(damage), Some(class)) => {
                    *self.damaged.entry((format!("{damage:?}"), class)).or_default() += 1;
                }
                (Some(_), None) => {}
            }
        }
    }
}
