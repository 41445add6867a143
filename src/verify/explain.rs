//! Explanation of why one line fails. Pure.
//!
//! Nothing is claimed that checking again does not prove: a variant counts only when the signature
//! matches it, and where none does, it stays open whether another key or another change is the
//! cause, since an Ed25519 signature does not tell.

use std::borrow::Cow;

use ed25519_dalek::VerifyingKey;
use rand::CryptoRng;
use serde::Serialize;

use super::judge::{
    BATCH_SIZE, Counts, Entry, JudgedBlock, Keys, Metadata, Window, contradiction, has_too_many_fields,
    judge, was_not_verified,
};
use super::variants::{LONGEST_ALTERED, LONGEST_VARIED, Variant, altered, reserialised, rounded, wrapped};
use crate::ingest::{Judgeable, open};
use crate::trust::verify::{Claim, verify_in_batches};
use crate::wire::line::Line;
use crate::wire::record::Kind;
use crate::wire::signature::{self, Reading, Signed};

/// Explanation of a line. Foreign text in it is not escaped.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// `good`, or a name of [`super::judge::Verdict`].
    pub verdict: &'static str,
    /// Description of the error.
    pub reason: Option<String>,
    /// Its format; none when it is malformed.
    pub format: Option<&'static str>,
    /// Its length in bytes, without a line end.
    pub bytes: usize,
    /// Its time in milliseconds since the Unix epoch.
    pub time: Option<i64>,
    /// The bytes over which the signature may have been made; two readings of a CPS line.
    pub signed_bytes: Vec<String>,
    /// The text of its signature.
    pub sig: Option<String>,
    /// Every key that was tried.
    pub keys: Vec<Tried>,
    /// Results of the checks, in sentences.
    pub shown: Vec<String>,
}

/// A key, and whether it made the signature.
#[derive(Debug, Serialize)]
pub struct Tried {
    /// Its ID.
    pub kid: String,
    /// Its thumbprint (RFC 7638).
    pub thumbprint: String,
    /// The reading of the line that its signature matches; none when it did not make it.
    pub fits: Option<&'static str>,
}

/// Explains a line. `others` are the lines that were read together with it.
pub fn explain(
    entry: &Entry<'_>,
    others: &JudgedBlock,
    keys: &Keys,
    random: &mut impl CryptoRng,
) -> Explanation {
    let judged = judge(std::slice::from_ref(entry), keys, Window::default(), random);
    let finding = judged.findings.into_iter().next();
    let raw: &[u8] = &entry.raw;
    let is_taken_apart = !has_too_many_fields(raw);
    let line = if is_taken_apart { Line::parse(raw).ok() } else { None };
    let signed = line.as_ref().and_then(Line::signed);
    let mut explanation = Explanation {
        verdict: finding.as_ref().map_or("good", |finding| finding.verdict.as_str()),
        reason: finding.as_ref().map(|finding| finding.reason.clone().into_owned()),
        format: line.as_ref().map(|line| line.format().as_str()),
        bytes: raw.len(),
        time: line.as_ref().and_then(Line::time),
        signed_bytes: signed.map_or_else(Vec::new, messages),
        sig: signed.map(|signed| String::from_utf8_lossy(signed.value).into_owned()),
        keys: if is_taken_apart { tried(raw, keys, random) } else { Vec::new() },
        shown: Vec::new(),
    };
    if !is_taken_apart {
        return explanation;
    }
    if finding.is_some() {
        explanation.shown = shown(entry, line.as_ref(), others, keys, random);
    } else if was_not_verified(&entry.metadata) {
        explanation.shown = vec![NOT_VERIFIED.to_owned()];
    }
    explanation
}

/// Sentence about a good line that the daemon accepted without checking its signature.
const NOT_VERIFIED: &str = "auditgate tried no key on it when it came (`verified` is false), since its source checks no \
    signatures (`signatures = \"off\"`); its signature is good all the same.";

fn messages(signed: &Signed<'_>) -> Vec<String> {
    let text = |reading: Reading<'_>| String::from_utf8_lossy(&reading.message()).into_owned();
    [Some(signed.first), signed.second].into_iter().flatten().map(text).collect()
}

fn tried(raw: &[u8], keys: &Keys, random: &mut impl CryptoRng) -> Vec<Tried> {
    let claims: Vec<Claim<'_>> = match open(raw) {
        Judgeable::Signed(_, claim) => vec![claim],
        _ => Vec::new(),
    };
    let has_two = claims.first().is_some_and(|claim| claim.second.is_some());
    let mut one = |bytes: &[u8; 32]| {
        let fit =
            verify_in_batches(&claims, std::slice::from_ref(bytes), BATCH_SIZE, random).pop().flatten()?;
        Some(match (has_two, fit.second) {
            (_, true) => "the inner object",
            (true, false) => "the whole line",
            (false, false) => "the line",
        })
    };
    let pairs = keys.keys().iter().zip(keys.bytes());
    pairs
        .map(|(key, bytes)| Tried {
            kid: key.ids.join(", "),
            thumbprint: key.thumbprint.clone(),
            fits: one(bytes),
        })
        .collect()
}

fn shown(
    entry: &Entry<'_>,
    line: Option<&Line<'_>>,
    others: &JudgedBlock,
    keys: &Keys,
    random: &mut impl CryptoRng,
) -> Vec<String> {
    let raw: &[u8] = &entry.raw;
    let mut all = Vec::new();
    if entry.unterminated {
        all.push("It is the last line and has no line end.".to_owned());
    }
    if let Metadata::Record(Kind::Misshapen) = entry.metadata {
        all.push(
            "A record says of a line that came through `format`, `verified` and `event`, or of one that did not \
             `reason`: never some of both, nothing twice, and nothing else (docs/verify.md)."
                .to_owned(),
        );
        return all;
    }
    let claim = match open(raw) {
        Judgeable::Signed(line, claim) => {
            let fit = verify_in_batches(&[claim], keys.bytes(), BATCH_SIZE, random).pop().flatten();
            if let Some(reason) = fit.and_then(|fit| contradiction(&entry.metadata, &line, fit.key, keys)) {
                let whole = if matches!(entry.metadata, Metadata::Row(_)) { "row" } else { "record" };
                all.push(format!(
                    "The raw line proves itself, so its metadata in the {whole} was changed: {reason}."
                ));
                return all;
            }
            Some(claim)
        }
        _ => None,
    };
    all.extend(claim.as_ref().and_then(impossible));
    all.extend(cut_off(raw, line));
    let mut search = Search { keys, random, tried: 0, bytes: 0, ran_out: false };
    match search.run(raw) {
        Some((what, key)) => {
            let key = keys.keys().get(key).map_or(Cow::Borrowed("?"), |key| key.ids.join(", ").into());
            all.push(format!("The signature fits, by the key {key}, once this is undone: {what}."));
        }
        None => {
            let what = match claim {
                Some(_) if raw.len() > LONGEST_ALTERED || search.ran_out => {
                    "No given key made this signature over these bytes"
                }
                Some(_) => {
                    "No given key made this signature over these bytes, nor over what they were before one bit, \
                            one digit or one truth value changed or one byte was added"
                }
                None => "It has no signature that a key can be tried on",
            };
            let not_all = match search.ran_out {
                true => ", but not all there are: that would take too long",
                false => "",
            };
            all.push(match raw.len() > LONGEST_VARIED {
                true => format!("{what}. It is longer than 1 MiB, so that no variant was tried."),
                false => format!("{what}; {} variants were tried{not_all}, and none fits.", search.tried),
            });
            if claim.is_some() {
                all.push(
                    "So either a key made it that was not given, or the line was changed in another way (members in \
                     another order, several bytes): the signature does not tell which."
                        .to_owned(),
                );
            }
        }
    }
    let Counts { good, good_in_quarantine, good_unverified, .. } = others.counts;
    let good = good + good_in_quarantine + good_unverified;
    let count = good + others.counts.findings();
    if count > 0 {
        all.push(format!(
            "Of the {count} other lines that were read together with it, {good} prove themselves."
        ));
    }
    all
}

/// Returns why no key can have made a signature, if that is so.
fn impossible(claim: &Claim<'_>) -> Option<String> {
    // The order of the group (RFC 8032, section 5.1), the most significant byte first.
    const ORDER: [u8; 32] = [
        0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x14, 0xde, 0xf9, 0xde, 0xa2, 0xf7, 0x9c, 0xd6,
        0x58, 0x12, 0x63, 0x1a, 0x5c, 0xf5, 0xd3, 0xed,
    ];
    let (point, scalar) = claim.signature.split_at(32);
    let is_point = <&[u8; 32]>::try_from(point).is_ok_and(|point| VerifyingKey::from_bytes(point).is_ok());
    if !scalar.iter().rev().lt(&ORDER) {
        Some(
            "No key can have made this signature: its number s is not below the order of the group."
                .to_owned(),
        )
    } else if !is_point {
        Some("No key can have made this signature: its part R is not a point of the curve.".to_owned())
    } else {
        None
    }
}

/// Returns what shows that the end of a line is missing.
fn cut_off(raw: &[u8], line: Option<&Line<'_>>) -> Option<String> {
    if let Some(signed) = line.and_then(Line::signed) {
        let is_end = signed.first.after.is_empty();
        let length = signed.value.len();
        return (is_end && length < 86 && signature::decode(signed.value).is_err()).then(|| {
            format!("The line ends within its signature, which has {length} characters instead of 86.")
        });
    }
    let is_json = raw.trim_ascii_start().starts_with(b"{");
    let cut =
        is_json && serde_json::from_slice::<serde::de::IgnoredAny>(raw).is_err_and(|error| error.is_eof());
    cut.then(|| "The line ends before its JSON object does: the rest of it is missing.".to_owned())
}

/// Search through variants, the likeliest first.
struct Search<'a, R> {
    keys: &'a Keys,
    random: &'a mut R,
    /// Number of variants that were tried.
    tried: usize,
    /// Their length together, in bytes.
    bytes: usize,
    /// Some were not tried because the budget was spent.
    ran_out: bool,
}

/// Maximum cost of the search: signatures that are checked, and bytes that are read.
#[derive(Clone, Copy)]
struct Budget {
    signatures: usize,
    bytes: usize,
}

/// Maximum number of signatures that are checked: a second or two.
const MOST: usize = 40_000;

/// Maximum length of all variants together, in bytes: also a second or two.
const MOST_BYTES: usize = 128 << 20;

/// Maximum number of variants that are checked together, and their maximum length in bytes: what is
/// held in memory.
const CHUNK: usize = 256;
const CHUNK_BYTES: usize = 4 << 20;

impl<R: CryptoRng> Search<'_, R> {
    /// Returns what happened to the line, and the key that made its signature.
    fn run(&mut self, raw: &[u8]) -> Option<(String, usize)> {
        if raw.len() > LONGEST_VARIED {
            return None;
        }
        let text = std::str::from_utf8(raw).ok();
        let lines = || text.into_iter().flat_map(reserialised);
        // The variants of a line of many numbers must leave something of the budget for those that
        // are tried last.
        let part = Budget { signatures: MOST / 2, bytes: MOST_BYTES / 2 };
        let whole = Budget { signatures: MOST, bytes: MOST_BYTES };
        self.first_that_fits(wrapped(raw), whole)
            .or_else(|| self.first_that_fits(lines(), part))
            .or_else(|| {
                // Once the budget is spent, the lines need not be generated either.
                lines().map_while(|line| self.fits_rounded(&line, part)).find_map(|found| found)
            })
            .or_else(|| self.first_that_fits(altered(raw), whole))
    }

    /// Tries the rounded numbers of a line. Returns none when the budget is spent.
    fn fits_rounded(&mut self, line: &Variant, budget: Budget) -> Option<Option<(String, usize)>> {
        let found = self.first_that_fits(rounded(line), budget);
        let goes_on = found.is_some() || !self.has_spent(budget);
        self.ran_out |= !goes_on;
        goes_on.then_some(found)
    }

    fn has_spent(&self, budget: Budget) -> bool {
        self.tried * self.keys.keys().len().max(1) >= budget.signatures || self.bytes >= budget.bytes
    }

    /// Tries variants until one matches or the search as a whole has spent the budget.
    fn first_that_fits(
        &mut self,
        mut all: impl Iterator<Item = Variant>,
        budget: Budget,
    ) -> Option<(String, usize)> {
        loop {
            let has_spent = self.has_spent(budget);
            let mut some: Vec<Variant> = Vec::new();
            let mut bytes = 0;
            while !has_spent
                && some.len() < CHUNK
                && bytes < CHUNK_BYTES
                && let Some(next) = all.next()
            {
                bytes += next.line.len();
                some.push(next);
            }
            if some.is_empty() {
                self.ran_out |= has_spent && all.next().is_some();
                return None;
            }
            self.tried += some.len();
            self.bytes += bytes;
            let claims: Vec<(usize, Claim<'_>)> = some
                .iter()
                .enumerate()
                .filter_map(|(index, variant)| match open(&variant.line) {
                    Judgeable::Signed(_, claim) => Some((index, claim)),
                    _ => None,
                })
                .collect();
            let bare: Vec<Claim<'_>> = claims.iter().map(|(_, claim)| *claim).collect();
            let fits = verify_in_batches(&bare, self.keys.bytes(), BATCH_SIZE, self.random);
            let found = claims.iter().zip(fits).find_map(|((index, _), fit)| Some((*index, fit?.key)));
            if let Some((index, key)) = found {
                return Some((some[index].what.clone(), key));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::super::judge::Block;
    use super::super::judge::tests::{cef, keys, recorded, signed};
    use super::*;

    fn explained(bytes: &[u8]) -> Explanation {
        let block = Block::Lines { first: 1, bytes: bytes.to_vec() };
        let entries = block.entries();
        explain(&entries[0], &JudgedBlock::default(), &keys(&[1, 2]), &mut StdRng::seed_from_u64(7))
    }

    /// Checks that one sentence of the explanation contains the wanted words.
    fn assert_says(line: impl AsRef<[u8]>, wanted: &str) {
        let explanation = explained(line.as_ref());
        assert_ne!(explanation.verdict, "good");
        let found = explanation.shown.iter().any(|sentence| sentence.contains(wanted));
        assert!(found, "{wanted:?} is not in {:#?} ({:?})", explanation.shown, explanation.reason);
    }

    #[test]
    fn a_good_line_shows_the_signed_bytes_and_the_key() {
        let line = cef("1000", 1);
        let explanation = explained(format!("{}\n", signed(2, &line)).as_bytes());
        assert_eq!((explanation.verdict, &explanation.shown[..]), ("good", &[][..]));
        assert_eq!(explanation.signed_bytes, [line]);
        assert_eq!(explanation.time, Some(1000));
        let fits: Vec<_> = explanation.keys.iter().map(|key| (key.kid.as_str(), key.fits)).collect();
        assert_eq!(fits, [("k1", None), ("k2", Some("the line"))]);
        let inner = signed(1, r#"{"a":1}"#);
        let explanation = explained(format!("{{\"event\":{inner}}}").as_bytes());
        assert_eq!(explanation.keys[0].fits, Some("the inner object"));
        assert_eq!(explanation.signed_bytes, [r#"{"event":{"a":1}}"#, r#"{"a":1}"#]);
    }

    #[test]
    fn a_change_by_a_tool_is_explained_if_undoing_it_verifies() {
        let trace = r#"{"a":"x/y ü","n":1e3,"rt":1000,"trace_id":1146381705542353508}"#;
        let json = signed(1, trace);
        for (from, to, wanted) in [
            ("1146381705542353508", "1146381705542353500", "with 1146381705542353508 the signature fits"),
            ("1146381705542353508", "1.1463817055423535e18", "with 1146381705542353508 the signature fits"),
            ("/", "\\/", "`/` was written as `\\/`"),
            ("1e3", "1000.0", "`1e3` was written as `1000.0`"),
            ("ü", "\\u00fc", "characters were written as `\\u` escapes"),
            (",\"", ", \"", "white space was added"),
        ] {
            assert_says(json.replace(from, to), wanted);
        }
        let all = json
            .replace("1146381705542353508", "1146381705542353500")
            .replace('/', "\\/")
            .replace(",\"", ", \"");
        assert_says(&all, "with 1146381705542353508 the signature fits");
        assert_says(&all, "white space was added");
        let escaped = signed(1, r#"{"a":"x\/y"}"#);
        assert_says(escaped.replace("\\/", "/"), "`\\/` was written as `/`");
        let line = signed(2, &cef("1000", 1_146_381_705_542_353_508));
        assert_says(line.replace("1146381705542353508", "1146381705542353500"), "by the key k2");
    }

    #[test]
    fn bytes_added_around_a_line_are_explained() {
        let line = signed(1, &cef("1000", 1));
        assert_says(format!("{line}\r\r\n"), "a carriage return of its line end was kept");
        assert_says(format!("{line}  "), "white space stands behind it");
        assert_says(format!("\u{feff}{line}"), "a byte order mark");
        assert_says(
            format!("<134>Jan  2 03:04:05 host kong: {line}"),
            "32 bytes were put before it: `<134>Jan  2 03:04:05 host kong: `",
        );
        assert_says(format!("{line}{line}"), "bytes stand behind its signature");
        assert_says(format!("{line}="), "neither left out nor `==`");
        assert_says(line.replace(" sig=", "\tsig="), "a tab replaced");
        let json = signed(1, r#"{"a":1}"#);
        assert_says(format!("Jan 2 host {json}"), "bytes were put before it");
        assert_says(json.replace(",\"sig\":", ",\t\"sig\":"), "white space was added");
    }

    #[test]
    fn another_encoding_of_the_signature_is_explained() {
        // Finds a signature with both digits that differ between the alphabets.
        let line = (0..).map(|n| signed(1, &cef("1000", n))).find(|line| {
            let sig = &line[line.len() - 86..];
            sig.contains('-') && sig.contains('_')
        });
        let line = line.unwrap();
        let (start, sig) = line.split_at(line.len() - 86);
        assert_says(
            format!("{start}{}", sig.replace('-', "+").replace('_', "/")),
            "the other base64 alphabet",
        );
        let last = sig.as_bytes()[85];
        let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let value = digits.iter().position(|digit| *digit == last).unwrap();
        let other = char::from(digits[value ^ 1]);
        assert_says(
            format!("{start}{}{other}", &sig[..85]),
            "last character is another than the only canonical one",
        );
    }

    #[test]
    fn small_changes_are_found_and_larger_ones_are_not() {
        let line = signed(1, &format!("{} granted=true", cef("1000", 1)));
        assert_says(line.replace("granted=true", "granted=false"), "`true` was changed into `false`");
        assert_says(line.replace("rt=1000", "rt=1900"), "the digit 0 at byte");
        assert_says(line.replace("Konnect", "konnect"), "one bit of byte");
        assert_says(line.replace("Konnect", "Kon nect"), "(0x20) was added");
        assert_says(line.replace("Konnect", "Discord"), "the signature does not tell which");
        assert_says(signed(3, &cef("1000", 1)), "the signature does not tell which");
        assert_says(cef("1000", 1), "It has no signature that a key can be tried on");
        let (start, _) = line.split_at(line.len() - 86);
        let impossible = format!("{start}{}", signature::encode(&[0xff; 64]));
        assert_says(impossible, "its number s is not below the order");
        let mut bytes = [0; 64];
        bytes[0] = 2;
        assert_says(format!("{start}{}", signature::encode(&bytes)), "its part R is not a point");
    }

    #[test]
    fn a_truncated_line_is_recognised_by_its_end() {
        let line = signed(1, &cef("1000", 1));
        assert_says(&line[..line.len() - 10], "ends within its signature, which has 76 characters");
        let json = signed(1, r#"{"a":1,"b":"x"}"#);
        assert_says(&json[..json.len() - 10], "The line ends before its JSON object does");
        assert_eq!(explained(&json.as_bytes()[..20]).verdict, "torn");
    }

    #[test]
    fn the_search_in_a_line_of_many_numbers_is_bounded() {
        let ids: Vec<String> = (0..2_000_u64).map(|n| ((1 << 60) + n * 100_003).to_string()).collect();
        let raw = format!(r#"{{"rt":1,"ids":[{}]}}"#, ids.join(","));
        assert_says(signed(3, &raw), "variants were tried, but not all there are: that would take too long");
        let long = format!(r#"{{"rt":1,"a":"{}"}}"#, "x".repeat(LONGEST_VARIED));
        assert_says(signed(3, &long), "It is longer than 1 MiB, so that no variant was tried.");
    }

    #[test]
    fn a_record_without_a_key_is_explained() {
        let raw = signed(1, &cef("1000", 1));
        let explanation = explained(recorded(&raw, None).as_bytes());
        assert_eq!((explanation.verdict, &explanation.shown[..]), ("good", &[NOT_VERIFIED.to_owned()][..]));
        let both = recorded(&raw, Some("k1")).replacen('{', "{\"reason\":\"\",", 1);
        assert_says(&both, "never some of both");
    }
}
