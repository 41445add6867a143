//! The leaves of the dedup index: sorted fingerprints, a few hundred to a row of the database.
//!
//! A fingerprint has a *place*, 63 bits: its partition, and its place within that. A leaf is named
//! by a place, and holds the fingerprints from there up to the next leaf of its *range*. A range is
//! a partition, or a part of one whose leaf never splits, and begins with a leaf of its own. So each
//! fingerprint has one leaf where it can be, which is found by one search. Fingerprints of the same
//! place are in the same leaf, however many there are.
//!
//! In its row, a fingerprint is the difference of its place to the one before or to the leaf's name,
//! the difference of its time to the one before or to 0, and the hash: about 20 bytes. A row fits a
//! page of the database, so that writing a leaf writes one page.

use std::sync::atomic::{AtomicU64, Ordering};

use rusqlite::{CachedStatement, Connection, OptionalExtension as _, params};

/// Number of bits of a place within its partition.
pub(super) const PLACE_BITS: u32 = 39;

/// Maximum size of a leaf with fingerprints of several places, in bytes: what SQLite stores in a
/// page of 4,096 bytes beside the head of a row.
const LEAF_BYTES: usize = 4050;

/// Maximum size of a fingerprint in a leaf, in bytes.
const FINGERPRINT_BYTES: usize = 10 + 10 + 16;

/// A fingerprint in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fingerprint {
    pub(super) place: u64,
    pub(super) hash: [u8; 16],
    /// When its line was accepted, in seconds since the Unix epoch.
    pub(super) accepted_at: i64,
}

/// A fingerprint to look up, and its line.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    pub(super) fingerprint: Fingerprint,
    /// Index of the line's batch in the transaction.
    pub(super) batch: u32,
    /// Index of the line in its batch.
    pub(super) line: u32,
}

impl Fingerprint {
    /// Returns what the index is ordered by.
    pub(super) fn order(&self) -> (u64, u128) {
        (self.place, u128::from_be_bytes(self.hash))
    }
}

/// What holds for the fingerprints of a partition.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// Number of bits of a place within its range.
    pub(super) range_bits: u32,
    /// Maximum number of fingerprints of a range, of which the newest are kept.
    pub(super) most: usize,
    /// Second before which acceptances no longer count.
    pub(super) expired: i64,
}

/// Returns the first place of a partition.
pub(super) fn first(partition: u32) -> u64 {
    u64::from(partition) << PLACE_BITS
}

/// Looks up keys, which must be sorted, in any partition, and calls `found` with those that are
/// there. Increments `progress` for each leaf.
pub(super) fn find(
    connection: &Connection,
    partition: u32,
    keys: &[Key],
    rules: Rules,
    progress: &AtomicU64,
    found: &mut dyn FnMut(&Key),
) -> rusqlite::Result<()> {
    let mut keys = keys.to_vec();
    for key in &mut keys {
        let place = &mut key.fingerprint.place;
        *place = first(partition) + (*place & (first(1) - 1));
    }
    let keys = keys.as_slice();
    let mut walk = Walk::new(connection, rules.range_bits)?;
    let mut rest = keys;
    while let Some(keys) = walk.next(&mut rest)? {
        let mut keys = keys.iter().peekable();
        for old in walk.entries.iter().filter(|old| old.accepted_at >= rules.expired) {
            while keys.next_if(|key| key.fingerprint.order() < old.order()).is_some() {}
            if let Some(key) = keys.next_if(|key| key.fingerprint.order() == old.order()) {
                found(key);
            }
        }
        progress.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Inserts keys, which must be sorted and distinct, and calls `found` with those that are there
/// already. What has expired is removed from the leaves that change. Increments `progress` for each
/// leaf.
pub(super) fn insert(
    connection: &Connection,
    keys: &[Key],
    rules: Rules,
    progress: &AtomicU64,
    found: &mut dyn FnMut(&Key),
) -> rusqlite::Result<()> {
    let mut walk = Walk::new(connection, rules.range_bits)?;
    let mut write = connection.prepare_cached("INSERT OR REPLACE INTO seen_leaf VALUES (?1, ?2)")?;
    let (mut merged, mut rest) = (Vec::new(), keys);
    while let Some(keys) = walk.next(&mut rest)? {
        if merge(&walk.entries, keys, rules.expired, &mut merged, found) {
            if merged.len() > rules.most {
                merged.sort_by_key(|fingerprint| std::cmp::Reverse(fingerprint.accepted_at));
                merged.truncate(rules.most);
                merged.sort_by_key(Fingerprint::order);
            }
            // Times mostly ascend: what comes next belongs behind these.
            let is_appended =
                walk.entries.last().map(Fingerprint::order) < keys.first().map(|key| key.fingerprint.order());
            write_leaves(&mut write, &walk, &merged, is_appended)?;
        }
        progress.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Deletes at most that many leaves of a partition, from its end, so that the first one is there as
/// long as any is. Returns their number.
pub(super) fn delete(connection: &Connection, partition: u32, most: usize) -> rusqlite::Result<usize> {
    let mut delete = connection.prepare_cached(
        "DELETE FROM seen_leaf WHERE id IN \
         (SELECT id FROM seen_leaf WHERE id >= ?1 AND id < ?2 ORDER BY id DESC LIMIT ?3)",
    )?;
    delete.execute(params![first(partition).cast_signed(), first(partition + 1).cast_signed(), most])
}

/// A walk from leaf to leaf.
struct Walk<'a> {
    find: CachedStatement<'a>,
    range_bits: u32,
    /// Name of the present leaf, whether it is stored or not.
    name: u64,
    row: Vec<u8>,
    entries: Vec<Fingerprint>,
}

impl<'a> Walk<'a> {
    fn new(connection: &'a Connection, range_bits: u32) -> rusqlite::Result<Self> {
        let find = connection.prepare_cached(
            "SELECT id, entries, (SELECT min(id) FROM seen_leaf WHERE id > ?1) \
             FROM seen_leaf WHERE id <= ?1 ORDER BY id DESC LIMIT 1",
        )?;
        Ok(Self { find, range_bits, name: 0, row: Vec::new(), entries: Vec::new() })
    }

    /// Reads the leaf of the first key, and takes the keys that belong there.
    fn next<'k>(&mut self, rest: &mut &'k [Key]) -> rusqlite::Result<Option<&'k [Key]>> {
        let Some(first) = rest.first() else { return Ok(None) };
        let place = first.fingerprint.place;
        let start = place >> self.range_bits << self.range_bits;
        // A range without its first leaf is empty.
        let (mut name, mut end) = (start, start + (1 << self.range_bits));
        self.row.clear();
        let row = &mut self.row;
        let found = self.find.query_row([place.cast_signed()], |found| {
            let found_name = found.get::<_, i64>(0)?.cast_unsigned();
            if found_name >= start {
                name = found_name;
                row.extend_from_slice(found.get_ref(1)?.as_blob()?);
                if let Some(next) = found.get::<_, Option<i64>>(2)? {
                    end = end.min(next.cast_unsigned());
                }
            }
            Ok(())
        });
        found.optional()?;
        self.name = name;
        decode(name, &self.row, &mut self.entries);
        let (keys, others) = rest.split_at(rest.partition_point(|key| key.fingerprint.place < end));
        *rest = others;
        Ok(Some(keys))
    }
}

/// Merges keys into a leaf's fingerprints, and leaves out what has expired. Returns whether there
/// is a new one.
fn merge(
    entries: &[Fingerprint],
    keys: &[Key],
    expired: i64,
    merged: &mut Vec<Fingerprint>,
    found: &mut dyn FnMut(&Key),
) -> bool {
    merged.clear();
    let mut has_new = false;
    let mut entries = entries.iter().filter(|old| old.accepted_at >= expired).peekable();
    for key in keys {
        let order = key.fingerprint.order();
        while let Some(old) = entries.next_if(|old| old.order() < order) {
            merged.push(*old);
        }
        if entries.peek().is_some_and(|old| old.order() == order) {
            found(key);
        } else {
            merged.push(key.fingerprint);
            has_new = true;
        }
    }
    merged.extend(entries);
    has_new
}

/// Writes the fingerprints of a leaf, to as many leaves as they need.
///
/// Where they are `appended` behind the others, each leaf is filled, as nothing will be inserted
/// there. Otherwise they are distributed evenly, which leaves space for others.
fn write_leaves(
    write: &mut CachedStatement<'_>,
    walk: &Walk<'_>,
    fingerprints: &[Fingerprint],
    is_appended: bool,
) -> rusqlite::Result<()> {
    let mut save = |name: u64, row: &[u8]| {
        // The first one of several is often as it was.
        if name != walk.name || row != walk.row {
            write.execute(params![name.cast_signed(), row])?;
        }
        Ok::<_, rusqlite::Error>(())
    };
    let (mut row, mut most) = (Vec::with_capacity(LEAF_BYTES + FINGERPRINT_BYTES), LEAF_BYTES);
    if !is_appended {
        encode(walk.name, fingerprints, &mut row);
        if row.len() <= LEAF_BYTES {
            return save(walk.name, &row);
        }
        most = LEAF_BYTES.min(row.len() / row.len().div_ceil(LEAF_BYTES) + FINGERPRINT_BYTES);
        row.clear();
    }
    let (mut name, mut last) = (walk.name, Last::new(walk.name));
    // Where the present place begins, in the fingerprints and in the row.
    let mut begin = (0, 0);
    for (index, fingerprint) in fingerprints.iter().enumerate() {
        if fingerprint.place > last.place {
            begin = (index, row.len());
        }
        last.encode(fingerprint, &mut row);
        if row.len() > most && begin.1 > 0 {
            row.truncate(begin.1);
            save(name, &row)?;
            name = fingerprint.place;
            row.clear();
            last = encode(name, &fingerprints[begin.0..=index], &mut row);
            begin.1 = 0;
        }
    }
    save(name, &row)
}

/// The fingerprint before the next one in a leaf.
#[derive(Clone, Copy)]
struct Last {
    place: u64,
    accepted_at: i64,
}

impl Last {
    /// Starts a leaf.
    fn new(name: u64) -> Self {
        Self { place: name, accepted_at: 0 }
    }

    fn encode(&mut self, next: &Fingerprint, out: &mut Vec<u8>) {
        put_number(next.place - self.place, out);
        let later = next.accepted_at.wrapping_sub(self.accepted_at);
        put_number(((later << 1) ^ (later >> 63)).cast_unsigned(), out);
        out.extend_from_slice(&next.hash);
        *self = Self { place: next.place, accepted_at: next.accepted_at };
    }

    /// Reads the next one; none at the end. SQLite's pages are trusted: a damaged database fails as
    /// a whole.
    fn decode(&mut self, bytes: &mut &[u8]) -> Option<Fingerprint> {
        self.place = self.place.wrapping_add(take_number(bytes)?);
        let later = take_number(bytes)?;
        let later = (later >> 1).cast_signed() ^ -(later & 1).cast_signed();
        self.accepted_at = self.accepted_at.wrapping_add(later);
        let (hash, rest) = bytes.split_first_chunk::<16>()?;
        *bytes = rest;
        Some(Fingerprint { place: self.place, hash: *hash, accepted_at: self.accepted_at })
    }
}

fn encode(name: u64, fingerprints: &[Fingerprint], out: &mut Vec<u8>) -> Last {
    let mut last = Last::new(name);
    fingerprints.iter().for_each(|fingerprint| last.encode(fingerprint, out));
    last
}

fn decode(name: u64, mut row: &[u8], out: &mut Vec<Fingerprint>) {
    out.clear();
    let mut last = Last::new(name);
    while let Some(fingerprint) = last.decode(&mut row) {
        out.push(fingerprint);
    }
}

/// Appends a number: seven bits a byte, the lowest first, all but the last byte with the highest bit
/// set (LEB128).
fn put_number(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    out.push((number & 0x7f) as u8);
}

fn take_number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..u64::BITS).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Returns all fingerprints of the index, after checking its leaves.
    pub(in crate::ledger) fn all(connection: &Connection) -> Vec<Fingerprint> {
        let mut find = connection.prepare("SELECT id, entries FROM seen_leaf ORDER BY id").unwrap();
        let leaves = find.query_map([], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, Vec<u8>>(1)?)));
        let (mut all, mut partition) = (Vec::new(), None);
        for (name, row) in leaves.unwrap().map(Result::unwrap) {
            let name = name.cast_unsigned();
            if partition != Some(name >> PLACE_BITS) {
                assert_eq!(name % first(1) % (1 << 26), 0, "the first leaf of a range is at its start");
                partition = Some(name >> PLACE_BITS);
            }
            assert!(all.last().is_none_or(|last: &Fingerprint| last.place < name), "leaves do not overlap");
            let mut entries = Vec::new();
            decode(name, &row, &mut entries);
            let last = entries.last().unwrap();
            assert!(row.len() <= LEAF_BYTES || entries.iter().all(|entry| entry.place == last.place));
            assert_eq!(last.place >> PLACE_BITS, name >> PLACE_BITS);
            all.extend(entries);
        }
        assert!(all.is_sorted_by(|a, b| a.order() < b.order()), "sorted, and none twice");
        all
    }

    /// Returns sorted keys with these hashes, one at each place of a partition.
    fn keys(partition: u32, hashes: std::ops::Range<u64>) -> Vec<Key> {
        let key = |number: u64| {
            let hash = u128::from(number).to_be_bytes();
            Key {
                fingerprint: Fingerprint { place: first(partition) + number, hash, accepted_at: 0 },
                batch: 0,
                line: 0,
            }
        };
        hashes.map(key).collect()
    }

    #[test]
    fn a_partition_that_is_deleted_in_part_takes_more() {
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(crate::ledger::schema::VERSION_4).unwrap();
        let rules = Rules { range_bits: PLACE_BITS, most: usize::MAX, expired: 0 };
        let insert = |keys: &[Key]| {
            let mut found = 0;
            let progress = AtomicU64::new(0);
            super::insert(&connection, keys, rules, &progress, &mut |_| found += 1).unwrap();
            found
        };
        for partition in 1..4 {
            assert_eq!(insert(&keys(partition, 0..3000)), 0);
        }
        let leaves = delete(&connection, 4, 1).unwrap();
        assert_eq!(leaves, 0, "there is no such partition");
        assert_eq!(delete(&connection, 2, 2).unwrap(), 2);
        let left = all(&connection).len() - 6000;
        assert!((1..3000).contains(&left), "{left}");
        assert_eq!(insert(&keys(2, 0..3000)), left);
        assert_eq!(all(&connection).len(), 9000);
        while delete(&connection, 2, 2).unwrap() > 0 {}
        assert_eq!(all(&connection).len(), 6000);
        assert_eq!(insert(&keys(1, 0..3000)) + insert(&keys(3, 0..3000)), 6000);
    }

    proptest! {
        #[test]
        fn a_leaf_is_read_back(
            name in 0_u64..1 << 62,
            entries in proptest::collection::vec((0_u64..1 << 40, any::<[u8; 16]>(), any::<i64>()), 0..50),
        ) {
            let mut place = name;
            let entries: Vec<Fingerprint> = entries
                .into_iter()
                .map(|(further, hash, accepted_at)| {
                    place += further;
                    Fingerprint { place, hash, accepted_at }
                })
                .collect();
            let (mut row, mut found) = (Vec::new(), Vec::new());
            encode(name, &entries, &mut row);
            prop_assert!(row.len() <= entries.len() * FINGERPRINT_BYTES);
            decode(name, &row, &mut found);
            prop_assert_eq!(found, entries);
        }
    }
}
