//! The accept rule, shown on the signatures on which implementations of Ed25519 are known to
//! differ.
//!
//! A signature (R, s) of a message M by a key A is accepted when
//! 1. A was loaded: the canonical encoding of a point that is not of small order;
//! 2. s is canonical, that is less than L, the order of the base point B (RFC 8032, section 5.1.7);
//! 3. R decodes to a point; an encoding that is not canonical will do (ZIP 215);
//! 4. \[8\]\[s\]B = \[8\]R + \[8\]\[k\]A with k = SHA-512(R ‖ A ‖ M) over the bytes as they came,
//!    modulo L (the equation of RFC 8032, section 5.1.7, with its cofactor 8, which ZIP 215 makes
//!    binding).
//!
//! The cofactor is why batch and single checks agree. Without it what is left of an equation can be
//! a point of small order, and a batch multiplies that by a random number which may happen to be a
//! multiple of its order.
//!
//! Every verdict below follows from these four points and is written down with its reason; none was
//! taken from a run.

use curve25519_dalek::constants::EIGHT_TORSION;
use curve25519_dalek::edwards::CompressedEdwardsY;
use curve25519_dalek::{EdwardsPoint, Scalar};
use ed25519_dalek::VerifyingKey;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use sha2::{Digest as _, Sha512};

use crate::trust::jwks::{self, JwksError, Refusal};
use crate::trust::verify::{Claim, verify};
use crate::wire::signature;

/// A key, a message and what may be a signature of it.
#[derive(Clone, Debug)]
struct Vector {
    key: [u8; 32],
    message: Vec<u8>,
    signature: [u8; 64],
}

impl Vector {
    fn claim(&self) -> Claim<'_> {
        // In two parts, as in a line whose signature was in its middle.
        let parts = self.message.split_at(self.message.len() / 2);
        Claim { signature: self.signature, first: parts, second: None }
    }
}

/// Returns whether each vector is accepted, in one batch. Any keys are trusted, weak ones too.
fn together(vectors: &[Vector], keys: &[[u8; 32]], seed: u64) -> Vec<bool> {
    let claims: Vec<_> = vectors.iter().map(Vector::claim).collect();
    let fits = verify(&claims, keys, &mut StdRng::seed_from_u64(seed));
    fits.iter().map(Option::is_some).collect()
}

/// Returns whether a vector is accepted in a batch of one.
fn alone(vector: &Vector, seed: u64) -> bool {
    together(std::slice::from_ref(vector), &[vector.key], seed)[0]
}

/// Returns why a key set refuses the key.
fn refusal(key: [u8; 32]) -> Option<Refusal> {
    match jwks::parse(jwks::document(&[(None, key)]).as_bytes(), 1) {
        Ok(_) => None,
        Err(JwksError::NoUsableKey(mut refused)) => Some(refused.remove(0).reason),
        Err(other) => panic!("{other}"),
    }
}

/// Checks each vector alone, and many times in batches: at random positions between valid and
/// invalid signatures of an ordinary key.
fn assert_verdicts(named: &[(String, Vector, bool)]) {
    const AT_A_TIME: usize = 16;
    for (name, vector, accepted) in named {
        for seed in 0..4 {
            assert_eq!(alone(vector, seed), *accepted, "{name}, alone");
        }
    }
    let ours = Signer::new(1);
    let mut random = StdRng::seed_from_u64(215);
    let mut unused: Vec<&(String, Vector, bool)> = Vec::new();
    for round in 0..64 {
        let mut mixed: Vec<(&str, Vector, bool)> = (0..random.random_range(0..200))
            .map(|number| {
                let message = format!("line {number} of {round}").into_bytes();
                let mut vector = ours.sign(message, EdwardsPoint::default());
                let is_bad = round % 2 == 1 && random.random_ratio(1, 20);
                if is_bad {
                    vector.message.push(b'!');
                }
                ("an ordinary line", vector, !is_bad)
            })
            .collect();
        let mut keys = vec![ours.public];
        for _ in 0..AT_A_TIME.min(named.len()) {
            // Every vector is used once before any is used again.
            if unused.is_empty() {
                unused = named.iter().collect();
            }
            let (name, vector, accepted) = unused.swap_remove(random.random_range(0..unused.len()));
            mixed.insert(random.random_range(0..=mixed.len()), (name, vector.clone(), *accepted));
            if !keys.contains(&vector.key) {
                keys.push(vector.key);
            }
        }
        let vectors: Vec<_> = mixed.iter().map(|(_, vector, _)| vector.clone()).collect();
        for ((name, _, accepted), verdict) in mixed.iter().zip(together(&vectors, &keys, round)) {
            assert_eq!(verdict, *accepted, "{name}, in a batch of {}", mixed.len());
        }
    }
}

/// A signer that can depart from RFC 8032, section 5.1.6, by adding points of small order.
struct Signer {
    secret: Scalar,
    public: [u8; 32],
}

impl Signer {
    fn new(number: u8) -> Self {
        Self::twisted(number, EdwardsPoint::default())
    }

    /// A signer whose public key has this point added, so that it is of mixed order unless the
    /// point is neutral.
    fn twisted(number: u8, torsion: EdwardsPoint) -> Self {
        let secret = wide(&[&[number; 32]]);
        Self { secret, public: (EdwardsPoint::mul_base(&secret) + torsion).compress().to_bytes() }
    }

    /// Signs with this point added to R.
    fn sign(&self, message: Vec<u8>, torsion: EdwardsPoint) -> Vector {
        let nonce = wide(&[&self.secret.to_bytes(), &message]);
        let commitment = (EdwardsPoint::mul_base(&nonce) + torsion).compress().to_bytes();
        self.sign_with(message, nonce, commitment)
    }

    /// Signs with this R, whatever the nonce is.
    fn sign_with(&self, message: Vec<u8>, nonce: Scalar, commitment: [u8; 32]) -> Vector {
        let challenge = wide(&[&commitment, &self.public, &message]);
        let mut signature = [0; 64];
        signature[..32].copy_from_slice(&commitment);
        signature[32..].copy_from_slice((nonce + challenge * self.secret).as_bytes());
        Vector { key: self.public, message, signature }
    }
}

/// SHA-512 modulo L.
fn wide(parts: &[&[u8]]) -> Scalar {
    let mut hash = Sha512::new();
    for part in parts {
        hash.update(part);
    }
    Scalar::from_bytes_mod_order_wide(&hash.finalize().into())
}

fn hex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2);
    digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

/// Every encoding of a point of small order (ZIP 215): eight canonical ones, and six with y not
/// reduced or with a sign on x = 0.
fn small_order_encodings() -> Vec<[u8; 32]> {
    let field = |low: u8, rest: u8, high: u8| {
        let mut bytes = [rest; 32];
        (bytes[0], bytes[31]) = (low, high);
        bytes
    };
    let mut encodings: Vec<_> = EIGHT_TORSION.iter().map(|point| point.compress().to_bytes()).collect();
    encodings.extend([
        // (0, 1) and (0, -1), whose x cannot be negative.
        field(0x01, 0x00, 0x80),
        field(0xec, 0xff, 0xff),
        // y = p, which is 0, with either sign.
        field(0xed, 0xff, 0x7f),
        field(0xed, 0xff, 0xff),
        // y = p + 1, which is 1, with either sign.
        field(0xee, 0xff, 0x7f),
        field(0xee, 0xff, 0xff),
    ]);
    encodings
}

/// Konstantinos Chalkias, François Garillot and Valeria Nikolaenko, "Taming the many EdDSAs"
/// (<https://eprint.iacr.org/2020/1244>), table 6: message, key, R, s, whether our equation holds,
/// whether the key is loaded, and why.
#[rustfmt::skip]
const TAMING: [(&str, &str, &str, &str, bool, bool, &str); 12] = [
    ("8c93255d71dcab10e8f379c26200f3c7bd5f09d9bc3068d3ef4edeb4853022b6", SMALL_KEY,
     "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
     "0000000000000000000000000000000000000000000000000000000000000000",
     true, false, "0: A and R are of small order and s is 0, so that both sides vanish; the key is refused"),
    ("9bd9f44f4dcc75bd531b56b2cd280b0bb38fc1cd6d1230e14861d861de092e79", SMALL_KEY,
     "f7badec5b8abeaf699583992219b7b223f1df3fbbea919844e3f7c554a43dd43",
     "a5bb704786be79fc476f91d3f3f89b03984d8068dcf1bb7dfc6637b45450ac04",
     true, false, "1: A is of small order, so that [8][k]A vanishes whatever was signed; the key is refused"),
    ("aebf3f2601a0c8c5d39cc7d8911642f740b78168218da8471772b35f9d35b9ab", MIXED_KEY,
     "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
     "8c4bd45aecaca5b24fb97bc10ac27ac8751a7dfe1baff8b953ec9f5833ca260e",
     true, true, "2: R may be of small order: only the owner of a key of mixed order can make this"),
    ("9bd9f44f4dcc75bd531b56b2cd280b0bb38fc1cd6d1230e14861d861de092e79", OTHER_MIXED_KEY,
     "9046a64750444938de19f227bb80485e92b83fdb4b6506c160484c016cc1852f",
     "87909e14428a7a1d62e9f22f3d3ad7802db02eb2e688b6c52fcd6648a98bd009",
     true, true, "3: A and R are of mixed order, and the equation holds with and without the cofactor"),
    ("e47d62c63f830dc7a6851a0b1f33ae4bb2f507fb6cffec4011eaccd55b53f56c", OTHER_MIXED_KEY,
     "160a1cb0dc9c0258cd0a7d23e94d8fa878bcb1925f2c64246b2dee1796bed512",
     "5ec6bc982a269b723e0668e540911a9a6a58921d6925e434ab10aa7940551a09",
     true, true, "4: the equation holds with the cofactor only"),
    ("e47d62c63f830dc7a6851a0b1f33ae4bb2f507fb6cffec4011eaccd55b53f56c", OTHER_MIXED_KEY,
     "21122a84e0b5fca4052f5b1235c80a537878b38f3142356b2c2384ebad4668b7",
     "e40bc836dac0f71076f9abe3a53f9c03c1ceeeddb658d0030494ace586687405",
     true, true, "5: with the cofactor only, and only if 8k is not reduced modulo L before it meets A"),
    ("85e241a07d148b41e47d62c63f830dc7a6851a0b1f33ae4bb2f507fb6cffec40", COMMON_KEY,
     "e96f66be976d82e60150baecff9906684aebb1ef181f67a7189ac78ea23b6c0e",
     "547f7690a0e2ddcd04d87dbc3490dc19b3b3052f7ff0538cb68afb369ba3a514",
     false, true, "6: s is more than L"),
    ("85e241a07d148b41e47d62c63f830dc7a6851a0b1f33ae4bb2f507fb6cffec40", COMMON_KEY,
     "8ce5b96c8f26d0ab6c47958c9e68b937104cd36e13c33566acd2fe8d38aa1942",
     "7e71f98a473474f2f13f06f97c20d58cc3f54b8bd0d272f42b695dd7e89a8c22",
     false, true, "7: s is much more than L"),
    ("9bedc267423725d473888631ebf45988bad3db83851ee85c85e241a07d148b41", MIXED_KEY, NEGATIVE_ZERO,
     "03be9678ac102edcd92b0210bb34d7428d12ffc5df5f37e359941266a4e35f0f",
     false, true, "8: R is not canonical, and s is made for k over the canonical R instead of the bytes that came"),
    ("9bedc267423725d473888631ebf45988bad3db83851ee85c85e241a07d148b41", MIXED_KEY, NEGATIVE_ZERO,
     "ca8c5b64cd208982aa38d4936621a4775aa233aa0505711d8fdcfdaa943d4908",
     true, true, "9: R is not canonical, and s is made for k over the bytes that came"),
    ("e96b7021eb39c1a163b6da4e3093dcd3f21387da4cc4572be588fafae23c155b", NEGATIVE_ZERO,
     "a9d55260f765261eb9b84e106f665e00b867287a761990d7135963ee0a7d59dc",
     "a5bb704786be79fc476f91d3f3f89b03984d8068dcf1bb7dfc6637b45450ac04",
     true, false, "10: A is of order 2, so that [8][k]A vanishes, and not canonical; the key is refused"),
    ("39a591f5321bbe07fd5a23dc2f39d025d74526615746727ceefd6e82ae65c06f", NEGATIVE_ZERO,
     "a9d55260f765261eb9b84e106f665e00b867287a761990d7135963ee0a7d59dc",
     "a5bb704786be79fc476f91d3f3f89b03984d8068dcf1bb7dfc6637b45450ac04",
     true, false, "11: as 10, with a k over the bytes that came"),
];
const SMALL_KEY: &str = "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa";
const MIXED_KEY: &str = "f7badec5b8abeaf699583992219b7b223f1df3fbbea919844e3f7c554a43dd43";
const OTHER_MIXED_KEY: &str = "cdb267ce40c5cd45306fa5d2f29731459387dbf9eb933b7bd5aed9a765b88d4d";
const COMMON_KEY: &str = "442aad9f089ad9e14647b1ef9099a1ff4798d78589e66f28eca69c11f582a623";
/// (0, -1) with a sign on its x.
const NEGATIVE_ZERO: &str = "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff";

#[test]
fn the_vectors_of_taming_the_many_eddsas() {
    let vectors = TAMING.map(|(message, key, commitment, s, accepted, _, why)| {
        let vector = Vector {
            key: hex(key).try_into().unwrap(),
            message: hex(message),
            signature: hex(&format!("{commitment}{s}")).try_into().unwrap(),
        };
        (why.to_owned(), vector, accepted)
    });
    assert_verdicts(&vectors);

    // From the key set on, as the daemon does it: what an unusable key signed is bad.
    let entries: Vec<_> = vectors.iter().map(|(_, vector, _)| (None, vector.key)).collect();
    let parsed = jwks::parse(jwks::document(&entries).as_bytes(), entries.len()).unwrap();
    let refused: Vec<_> = parsed.refused.iter().map(|key| (key.position - 1, key.reason.clone())).collect();
    let unloaded: Vec<_> =
        (0..12).filter(|number| !TAMING[*number].5).map(|at| (at, Refusal::Weak)).collect();
    assert_eq!(refused, unloaded);
    let keys: Vec<_> = parsed.keys.keys().iter().map(|key| *key.bytes()).collect();
    let vectors = vectors.map(|(_, vector, _)| vector);
    for seed in 0..64 {
        let verdicts = together(&vectors, &keys, seed);
        for ((.., accepted, loaded, why), verdict) in TAMING.iter().zip(verdicts) {
            assert_eq!(verdict, *accepted && *loaded, "{why}");
        }
    }
}

#[test]
fn a_key_of_small_order_is_refused_in_every_encoding() {
    let encodings = small_order_encodings();
    assert_eq!(encodings.len(), 14);
    for (at, key) in encodings.iter().enumerate() {
        let point = CompressedEdwardsY(*key).decompress().unwrap();
        assert!(point.is_small_order(), "{key:x?}");
        assert_eq!(point.compress().to_bytes() == *key, at < 8, "{key:x?}");
        assert_eq!(refusal(*key), Some(Refusal::Weak), "{key:x?}");
    }
}

#[test]
fn what_only_the_cofactor_makes_valid_is_valid_alone_and_in_every_batch() {
    let mut random = StdRng::seed_from_u64(8);
    let mut refused_without_the_cofactor = 0;
    for (number, of_key) in (1..).zip(EIGHT_TORSION) {
        let signer = Signer::twisted(number, of_key);
        // Of mixed order, or ordinary: of large order, and canonical.
        assert_eq!(refusal(signer.public), None);
        let cofactorless = VerifyingKey::from_bytes(&signer.public).unwrap();
        for round in 0..32 {
            let mut vectors = Vec::new();
            let mut wanted = Vec::new();
            for line in 0..random.random_range(1..40) {
                // Half of them are ordinary; R of the others has a component of small order.
                let of_commitment = EIGHT_TORSION[random.random_range(0..16_usize).saturating_sub(8)];
                let mut vector = signer.sign(format!("{round} {line}").into_bytes(), of_commitment);
                let signature = ed25519_dalek::Signature::from_bytes(&vector.signature);
                if cofactorless.verify_strict(&vector.message, &signature).is_err() {
                    refused_without_the_cofactor += 1;
                }
                let is_bad = round % 2 == 1 && random.random_ratio(1, 10);
                if is_bad {
                    vector.signature[32 + random.random_range(0..31)] ^= 1 << random.random_range(0..8);
                }
                assert_eq!(alone(&vector, round), !is_bad, "alone");
                vectors.push(vector);
                wanted.push(!is_bad);
            }
            for seed in 0..8 {
                assert_eq!(together(&vectors, &[signer.public], seed), wanted, "{number}, round {round}");
            }
        }
    }
    assert!(refused_without_the_cofactor > 1000, "{refused_without_the_cofactor}");
}

#[test]
fn every_encoding_of_r_is_hashed_as_it_was_received() {
    let signer = Signer::new(3);
    let named: Vec<_> = small_order_encodings()
        .into_iter()
        .flat_map(|commitment| {
            // The cofactor cancels R, so s = k a is enough: only the owner of a can make it.
            let good = signer.sign_with(b"message".to_vec(), Scalar::ZERO, commitment);
            // Another R that the cofactor cancels as well gives another k.
            let point = CompressedEdwardsY(commitment).decompress().unwrap();
            let mut other_commitment = good.clone();
            other_commitment.signature[..32]
                .copy_from_slice(&(point + EIGHT_TORSION[1]).compress().to_bytes());
            let mut beyond = good.clone();
            let beyond_order = beyond_the_order(beyond.signature[32..].try_into().unwrap());
            beyond.signature[32..].copy_from_slice(&beyond_order);
            [
                (format!("R {commitment:x?}"), good, true),
                (format!("another R than {commitment:x?}"), other_commitment, false),
                (format!("R {commitment:x?} and s + L"), beyond, false),
            ]
        })
        .collect();
    assert_verdicts(&named);
}

/// s + L.
fn beyond_the_order(s: [u8; 32]) -> [u8; 32] {
    // L - 1, the largest scalar (RFC 8032, section 5.1).
    let order = (Scalar::ZERO - Scalar::ONE).to_bytes();
    let mut carry = 1_u16;
    std::array::from_fn(|at| {
        let sum = u16::from(s[at]) + u16::from(order[at]) + carry;
        carry = sum >> 8;
        sum.to_le_bytes()[0]
    })
}

/// Returns the verdict on a vector of Project Wycheproof by its flag, and the reason.
fn of_wycheproof(number: u32, flag: &str) -> (bool, &'static str) {
    match flag {
        "Valid" | "Ktv" | "TinkOverflow" => {
            (true, "made as RFC 8032 says, so that the equation holds without the cofactor, hence with it")
        }
        "SignatureMalleability" | "InvalidKtv" => (false, "s is not less than L"),
        "InvalidSignature" => (
            false,
            "R is of small order or no point, and s is a constant or not less than L: s B would have to be k A",
        ),
        "TruncatedSignature" | "SignatureWithGarbage" | "CompressedSignature" => {
            (false, "it has no 64 bytes")
        }
        // R is (0, 1) with a sign on x = 0: not canonical, which ZIP 215 has us accept, and s is k
        // a. The owner of the key alone can make it. Wycheproof follows RFC 8032, section 5.1.3,
        // which has R refused.
        "InvalidEncoding" if number == 151 => (true, "an encoding of R that is not canonical will do"),
        "InvalidEncoding" => {
            (false, "R is no point, or differs by more than a point of small order from the signer's")
        }
        other => panic!("{number}: unknown flag {other}"),
    }
}

#[test]
fn the_vectors_of_project_wycheproof() {
    let mut named = Vec::new();
    let mut of_another_length = 0;
    for line in include_str!("wycheproof.txt").lines().filter(|line| !line.starts_with('#')) {
        let [number, flag, key, message, made]: [&str; 5] =
            line.split(' ').collect::<Vec<_>>().try_into().unwrap();
        let (accepted, why) = of_wycheproof(number.parse().unwrap(), flag);
        let key: [u8; 32] = hex(key).try_into().unwrap();
        assert_eq!(refusal(key), None, "{number}: an ordinary key");
        let bytes = |text: &str| if text == "-" { Vec::new() } else { hex(text) };
        match <[u8; 64]>::try_from(bytes(made)) {
            Ok(signature) => {
                // In a line it has exactly one encoding.
                assert_eq!(signature::decode(&signature::encode(&signature)), Ok(signature));
                let vector = Vector { key, message: bytes(message), signature };
                named.push((format!("{number} {flag}: {why}"), vector, accepted));
            }
            Err(other) => {
                use base64::Engine as _;
                let text = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(&other);
                let error = signature::SignatureError::Length(other.len());
                assert_eq!((signature::decode(&text), accepted), (Err(error), false), "{number} {flag}");
                of_another_length += 1;
            }
        }
    }
    assert_eq!((named.len(), of_another_length), (139, 12));
    assert_eq!(named.iter().filter(|(.., accepted)| *accepted).count(), 18 + 38 + 32 + 1);
    assert_verdicts(&named);
}
