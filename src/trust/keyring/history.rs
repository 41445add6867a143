//! Every key that a source's origin has ever listed, and which of them are trusted now. Pure: the
//! time is an argument, in seconds since the Unix epoch.
//!
//! A key that is no longer listed is *retired*: trusted for a while, since events that were signed
//! before may still come (a replay sends what is up to a week old), and afterwards kept for checks
//! of old lines.

use std::time::Duration;

use super::super::jwks::{Key, KeySet, MAX_KEPT_KEYS, MAX_KEYS};

/// A key and when it was listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) key: Key,
    /// Time at which the origin was first seen to list it.
    pub(super) first_seen: u64,
    /// Time at which the origin was last seen to list it.
    pub(super) last_seen: u64,
    /// Time at which the origin was found to list it no longer.
    pub(super) retired_at: Option<u64>,
}

/// All that is known about one origin's keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct History {
    /// The listed ones first, in the order of the document; then the retired ones, the last retired
    /// first.
    keys: Vec<Known>,
}

/// Changes by a document; in thumbprints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) added: Vec<String>,
    pub(super) retired: Vec<String>,
}

impl Change {
    pub(super) fn is_none(&self) -> bool {
        self.added.is_empty() && self.retired.is_empty()
    }
}

impl History {
    /// Creates the history from what was kept, without the keys that `is_revoked` by their
    /// thumbprint.
    pub(super) fn new(mut keys: Vec<Known>, is_revoked: impl Fn(&str) -> bool) -> Self {
        keys.retain(|known| !is_revoked(&known.key.thumbprint()));
        let mut history = Self { keys };
        history.arrange();
        history
    }

    pub(super) fn keys(&self) -> &[Known] {
        &self.keys
    }

    /// Records that the origin lists these keys now.
    pub(super) fn observe(&mut self, listed: &[Key], now: u64) -> Change {
        let mut change = Change::default();
        let mut earlier = std::mem::take(&mut self.keys);
        for key in listed {
            let before = earlier.iter().position(|known| known.key.bytes() == key.bytes());
            let before = before.map(|at| earlier.remove(at));
            if before.as_ref().is_none_or(|known| known.retired_at.is_some()) {
                change.added.push(key.thumbprint());
            }
            self.keys.push(Known {
                key: key.clone(),
                first_seen: before.map_or(now, |known| known.first_seen),
                last_seen: now,
                retired_at: None,
            });
        }
        for mut known in earlier {
            if known.retired_at.is_none() {
                known.retired_at = Some(now);
                change.retired.push(known.key.thumbprint());
            }
            self.keys.push(known);
        }
        self.arrange();
        change
    }

    /// Records that nothing has changed at the origin.
    pub(super) fn confirm(&mut self, now: u64) {
        for known in self.keys.iter_mut().filter(|known| known.retired_at.is_none()) {
            known.last_seen = now;
        }
    }

    /// Returns the keys to verify with, the listed ones first; none when there is none.
    pub(super) fn trusted(&self, now: u64, retired_for: Duration) -> Option<KeySet> {
        let trusted = self.keys.iter().filter(|known| known.is_trusted(now, retired_for));
        KeySet::of(trusted.take(2 * MAX_KEYS).map(|known| known.key.clone()))
    }

    /// Returns the number of keys that are trusted although they are no longer listed.
    pub(super) fn retired(&self, now: u64, retired_for: Duration) -> usize {
        let retired = self.keys.iter().filter(|known| known.retired_at.is_some());
        retired.filter(|known| known.is_trusted(now, retired_for)).count()
    }

    /// Returns the time until the next retired key expires.
    pub(super) fn until_next_end(&self, now: u64, retired_for: Duration) -> Option<Duration> {
        let ends = self.keys.iter().filter(|known| known.is_trusted(now, retired_for)).filter_map(|known| {
            Some(known.retired_at?.saturating_add(retired_for.as_secs()).saturating_sub(now))
        });
        ends.min().map(Duration::from_secs)
    }

    fn arrange(&mut self) {
        self.keys.sort_by_key(|known| known.retired_at.map(|at| u64::MAX - at));
        self.keys.truncate(MAX_KEPT_KEYS);
    }
}

impl Known {
    /// Returns whether the key is trusted. A clock that was set back does not end the trust.
    fn is_trusted(&self, now: u64, retired_for: Duration) -> bool {
        self.retired_at.is_none_or(|at| now < at.saturating_add(retired_for.as_secs()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trust::jwks;
    use crate::trust::jwks::tests::{document_of, public_key};

    const WEEK: Duration = Duration::from_secs(7 * 86_400);

    fn keys(seeds: &[u8]) -> Vec<Key> {
        jwks::parse(document_of(seeds).as_bytes(), MAX_KEYS).unwrap().keys.keys().to_vec()
    }

    fn trusted(history: &History, now: u64) -> Vec<String> {
        let set = history.trusted(now, WEEK);
        set.iter().flat_map(KeySet::keys).map(|key| key.id().to_owned()).collect()
    }

    #[test]
    fn a_retired_key_is_trusted_for_a_while_and_remembered_for_ever() {
        let mut history = History::default();
        assert_eq!(trusted(&history, 0), [""; 0]);
        assert_eq!(history.observe(&keys(&[1]), 100).added.len(), 1);
        assert_eq!(history.observe(&keys(&[2, 1]), 200).added.len(), 1);
        assert!(history.observe(&keys(&[2, 1]), 300).is_none());
        let change = history.observe(&keys(&[2]), 400);
        assert_eq!((change.added.len(), change.retired), (0, vec![keys(&[1])[0].thumbprint()]));
        assert_eq!(trusted(&history, 400), ["k2", "k1"]);
        assert_eq!(history.retired(400, WEEK), 1);
        let end = 400 + WEEK.as_secs();
        assert_eq!(history.until_next_end(400, WEEK), Some(WEEK));
        assert_eq!(trusted(&history, end - 1), ["k2", "k1"]);
        assert_eq!(trusted(&history, end), ["k2"]);
        assert_eq!(history.until_next_end(end, WEEK), None);
        let gone = &history.keys()[1];
        assert_eq!((gone.first_seen, gone.last_seen, gone.retired_at), (100, 300, Some(400)));
        // It is listed again.
        assert_eq!(history.observe(&keys(&[1, 2]), end).added.len(), 1);
        assert_eq!(trusted(&history, end), ["k1", "k2"]);
        assert_eq!(history.keys()[0].first_seen, 100);
        history.confirm(end + 5);
        assert!(history.keys().iter().all(|known| known.last_seen == end + 5));
    }

    #[test]
    fn the_retirement_counts_from_when_the_removal_was_seen() {
        let mut history = History::default();
        history.observe(&keys(&[1]), 100);
        // The daemon was down for a month.
        let back = 100 + 30 * 86_400;
        history.observe(&keys(&[2]), back);
        assert_eq!(trusted(&history, back + 1), ["k2", "k1"]);
    }

    #[test]
    fn a_revoked_key_is_not_even_remembered() {
        let mut history = History::default();
        history.observe(&keys(&[1, 2]), 100);
        history.observe(&keys(&[2]), 200);
        let revoked = keys(&[1])[0].thumbprint();
        let history = History::new(history.keys().to_vec(), |thumbprint| thumbprint == revoked);
        assert_eq!(trusted(&history, 200), ["k2"]);
    }

    #[test]
    fn one_kid_for_two_keys_gives_two_ids() {
        let mut history = History::default();
        history.observe(&keys(&[1]), 100);
        let document = jwks::document(&[(Some("k1".to_owned()), public_key(9))]);
        history.observe(jwks::parse(document.as_bytes(), MAX_KEYS).unwrap().keys.keys(), 200);
        let ids = trusted(&history, 200);
        assert_eq!(ids[0], "k1");
        assert!(ids[1].starts_with("k1#"), "{ids:?}");
    }

    #[test]
    fn frequent_rotation_does_not_fill_the_memory() {
        let mut history = History::default();
        for round in 0..400_u64 {
            let seed = [[round.to_le_bytes(); 4].concat().try_into().unwrap()];
            let public =
                seed.map(|seed| ed25519_dalek::SigningKey::from_bytes(&seed).verifying_key().to_bytes())[0];
            let document = jwks::document(&[(None, public)]);
            history.observe(jwks::parse(document.as_bytes(), 1).unwrap().keys.keys(), round);
        }
        assert_eq!(history.keys().len(), MAX_KEPT_KEYS);
        let set = history.trusted(400, WEEK).unwrap();
        assert_eq!(set.keys().len(), 2 * MAX_KEYS);
        assert_eq!(set.keys()[0], history.keys()[0].key);
        assert_eq!(history.keys()[1].retired_at, Some(399), "the last retired one stays");
    }
}
