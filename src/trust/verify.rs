//! Verification of many lines at once. Pure.
//!
//! One accept rule on every path: ZIP 215 (<https://zips.z.cash/zip-0215>), whose batch and single
//! verdicts always agree, through ed25519-zebra. A single check is a batch of one.
//!
//! Batch verification is three to five times cheaper than single checks, but says only that some
//! line is bad. So a batch that fails is checked again in groups, and a group that fails is halved
//! until the bad lines are found. Where most are bad that costs more than it saves, and they are
//! checked one by one.

use ed25519_zebra::batch::{Item, Verifier};
use ed25519_zebra::{Signature, VerificationKeyBytes};
use rand::CryptoRng;

/// A signature and the messages that it may have been made over, each in two parts.
#[derive(Clone, Copy, Debug)]
pub struct Claim<'a> {
    /// R and s (RFC 8032, section 5.1.6).
    pub signature: [u8; 64],
    /// The message that is tried first.
    pub first: (&'a [u8], &'a [u8]),
    /// Another message, where it is not known which is signed.
    pub second: Option<(&'a [u8], &'a [u8])>,
}

/// The key and the message that a signature matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// The index of the key.
    pub key: usize,
    /// Whether it is the second message.
    pub second: bool,
}

/// Verification batch size. Larger batches gain little and make a bad line more expensive.
pub const BATCH_SIZE: usize = 1024;

/// Batch size where a bad signature is expected: it costs a third more for each signature than
/// [`BATCH_SIZE`], and a bad one costs less than one more check of 32.
pub const GROUP: usize = 32;

/// Returns for each claim which of the keys made it; none when no key did.
///
/// `random` weighs the signatures of a batch against each other: an attacker that could guess it
/// could make bad signatures that cancel out.
pub fn verify(claims: &[Claim<'_>], keys: &[[u8; 32]], random: &mut impl CryptoRng) -> Vec<Option<Fit>> {
    verify_in_batches(claims, keys, BATCH_SIZE, random)
}

/// Verifies as [`verify`], with at most `together` (at least 1) signatures in a batch. Larger
/// batches are a little cheaper for each signature, and a bad one in them costs more.
pub fn verify_in_batches(
    claims: &[Claim<'_>],
    keys: &[[u8; 32]],
    together: usize,
    random: &mut impl CryptoRng,
) -> Vec<Option<Fit>> {
    verify_in_steps(claims, keys, together, random, &mut |_, _| true)
}

/// Verifies as [`verify_in_batches`]. `before` is called before each batch, with the number of its
/// signatures, and whether these were tried before, with another key or another message. When it
/// returns false, signatures that match nothing yet are tried no more.
pub fn verify_in_steps(
    claims: &[Claim<'_>],
    keys: &[[u8; 32]],
    together: usize,
    random: &mut impl CryptoRng,
    before: &mut dyn FnMut(usize, bool) -> bool,
) -> Vec<Option<Fit>> {
    let mut fits = vec![None; claims.len()];
    let mut buffer = Vec::new();
    let mut open: Vec<usize> = (0..claims.len()).collect();
    for (number, attempt) in attempts(claims, keys, random).into_iter().enumerate() {
        let (tried, mut rest): (Vec<usize>, Vec<usize>) =
            open.into_iter().partition(|index| message(&claims[*index], attempt.second).is_some());
        let key = VerificationKeyBytes::from(keys[attempt.key]);
        // Batches of equal size: a small last one would be expensive.
        let batches = tried.len().div_ceil(together.max(1)).max(1);
        for chunk in tried.chunks(tried.len().div_ceil(batches).max(1)) {
            if !before(chunk.len(), number > 0) {
                return fits;
            }
            let items: Vec<Item> = chunk
                .iter()
                .filter_map(|index| item(&claims[*index], attempt.second, key, &mut buffer))
                .collect();
            let mut good = vec![false; chunk.len()];
            judge(&items, &mut good, random);
            for (index, good) in chunk.iter().zip(good) {
                if good {
                    fits[*index] = Some(attempt);
                } else {
                    rest.push(*index);
                }
            }
        }
        rest.sort_unstable();
        open = rest;
        if open.is_empty() {
            break;
        }
    }
    fits
}

/// Returns every key with every reading, the likeliest first: the lines of one batch mostly come
/// from one key and one producer, so the one that matches a line in the middle is tried first on
/// all.
fn attempts(claims: &[Claim<'_>], keys: &[[u8; 32]], random: &mut impl CryptoRng) -> Vec<Fit> {
    let has_second = claims.iter().any(|claim| claim.second.is_some());
    let mut attempts: Vec<Fit> = [false, true]
        .into_iter()
        .filter(|second| !second || has_second)
        .flat_map(|second| (0..keys.len()).map(move |key| Fit { key, second }))
        .collect();
    if attempts.len() > 1
        && let Some(probe) = claims.get(claims.len() / 2)
    {
        let likeliest = attempts.iter().position(|attempt| {
            let key = VerificationKeyBytes::from(keys[attempt.key]);
            item(probe, attempt.second, key, &mut Vec::new())
                .is_some_and(|item| holds(std::slice::from_ref(&item), random))
        });
        if let Some(likeliest) = likeliest {
            attempts[..=likeliest].rotate_right(1);
        }
    }
    attempts
}

/// Marks the good items: all together if that holds, else group by group.
fn judge(items: &[Item], good: &mut [bool], random: &mut impl CryptoRng) {
    /// Number of items that are not worth a search.
    const FEW: usize = 8;
    if holds(items, random) {
        good.fill(true);
    } else if items.len() > GROUP {
        for (items, good) in items.chunks(GROUP).zip(good.chunks_mut(GROUP)) {
            judge(items, good, random);
        }
    } else if items.len() == 1 {
        // This one is bad.
    } else if items.len() <= FEW || mostly_bad(items, random) {
        for (item, good) in items.iter().zip(good) {
            *good = holds(std::slice::from_ref(item), random);
        }
    } else {
        search(items, good, true, random);
    }
}

/// Marks the good items of a group by halving it. `is_bad`: it is known that not all are good.
fn search(items: &[Item], good: &mut [bool], is_bad: bool, random: &mut impl CryptoRng) {
    if !is_bad && holds(items, random) {
        good.fill(true);
        return;
    }
    if items.len() <= 1 {
        return;
    }
    let middle = items.len() / 2;
    let (left, right) = good.split_at_mut(middle);
    let is_left_good = holds(&items[..middle], random);
    if is_left_good {
        left.fill(true);
    } else {
        search(&items[..middle], left, true, random);
    }
    // What is bad must be in the other half then.
    search(&items[middle..], right, is_left_good, random);
}

/// Returns whether most of a failed batch is bad, by a few samples.
fn mostly_bad(items: &[Item], random: &mut impl CryptoRng) -> bool {
    const PROBES: usize = 4;
    let bad = (0..PROBES)
        .map(|probe| &items[(items.len() - 1) * probe / (PROBES - 1)])
        .filter(|item| !holds(std::slice::from_ref(item), random))
        .count();
    bad >= PROBES / 2
}

fn holds(items: &[Item], random: &mut impl CryptoRng) -> bool {
    let mut verifier = Verifier::new();
    for item in items {
        verifier.queue(item.clone());
    }
    verifier.verify(random).is_ok()
}

/// Returns what is to be checked. `buffer` is for a message in two parts.
fn item(claim: &Claim<'_>, second: bool, key: VerificationKeyBytes, buffer: &mut Vec<u8>) -> Option<Item> {
    let (before, after) = message(claim, second)?;
    let signature = Signature::from_bytes(&claim.signature);
    if after.is_empty() {
        return Some(Item::from((key, signature, before)));
    }
    buffer.clear();
    buffer.extend_from_slice(before);
    buffer.extend_from_slice(after);
    Some(Item::from((key, signature, buffer.as_slice())))
}

fn message<'a>(claim: &Claim<'a>, second: bool) -> Option<(&'a [u8], &'a [u8])> {
    if second { claim.second } else { Some(claim.first) }
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::{Signer as _, SigningKey};
    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;

    fn keys(count: u8) -> (Vec<SigningKey>, Vec<[u8; 32]>) {
        let signing: Vec<_> = (0..count).map(|seed| SigningKey::from_bytes(&[seed + 1; 32])).collect();
        let public = signing.iter().map(|key| key.verifying_key().to_bytes()).collect();
        (signing, public)
    }

    #[test]
    fn each_bad_signature_is_found_at_every_density() {
        let (signing, public) = keys(3);
        let mut random = StdRng::seed_from_u64(7);
        for (count, bad_of_100) in
            [(1, 0), (1, 100), (9, 50), (700, 0), (700, 1), (700, 30), (300, 100), (1500, 1)]
        {
            let mut wanted = Vec::new();
            let lines: Vec<(Vec<u8>, [u8; 64])> = (0..count)
                .map(|number| {
                    let key = number * 7 / 5 % 2;
                    let line = format!("line {number}").into_bytes();
                    let mut signature = signing[key].sign(&line).to_bytes();
                    let bad = random.random_range(0..100) < bad_of_100;
                    if bad {
                        signature[random.random_range(0..64)] ^= 1 << random.random_range(0..8);
                    }
                    wanted.push((!bad).then_some(Fit { key, second: false }));
                    (line, signature)
                })
                .collect();
            let claims: Vec<_> = lines
                .iter()
                .map(|(line, signature)| {
                    let (before, after) = line.split_at(line.len() / 2);
                    Claim { signature: *signature, first: (before, after), second: None }
                })
                .collect();
            assert_eq!(verify(&claims, &public, &mut random), wanted, "{count} lines, {bad_of_100} % bad");
        }
    }

    #[test]
    fn either_reading_is_accepted_and_no_third() {
        let (signing, public) = keys(2);
        let mut random = StdRng::seed_from_u64(7);
        let signature = |message: &[u8]| signing[1].sign(message).to_bytes();
        let claim = |signature| Claim { signature, first: (b"outer", b""), second: Some((b"in", b"ner")) };
        let claims = [claim(signature(b"inner")), claim(signature(b"outer")), claim(signature(b"other"))];
        let fit = |second| Some(Fit { key: 1, second });
        assert_eq!(verify(&claims, &public, &mut random), [fit(true), fit(false), None]);
        assert_eq!(verify(&claims, &public[..1], &mut random), [None; 3]);
        assert_eq!(verify(&[], &public, &mut random), []);
        assert_eq!(verify(&claims, &[], &mut random), [None; 3]);
    }

    #[test]
    fn every_bit_of_a_signature_counts() {
        let (signing, public) = keys(1);
        let mut random = StdRng::seed_from_u64(7);
        let signature = signing[0].sign(b"message").to_bytes();
        let flipped: Vec<_> = (0..512)
            .map(|bit| {
                let mut signature = signature;
                signature[bit / 8] ^= 1 << (bit % 8);
                Claim { signature, first: (b"message", b""), second: None }
            })
            .collect();
        assert!(verify(&flipped, &public, &mut random).iter().all(Option::is_none));
    }
}
