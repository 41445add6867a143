//! Lines in the form in which a sink writes them, collected until it does. Many lines at once are
//! rendered on several cores, and stay in their order.

use std::sync::LazyLock;
use std::thread;

use super::sink::Item;

/// Number of received bytes that are worth a thread: rendering them takes several times as long as
/// starting it.
const PART: usize = 64 << 10;

/// Number of cores for this process. Kept, because asking the system reads files.
static CORES: LazyLock<usize> = LazyLock::new(|| thread::available_parallelism().map_or(1, usize::from));

/// Consecutive rendered lines.
#[derive(Debug, Default)]
pub(super) struct Rendered {
    bytes: Vec<u8>,
    /// The end of each line.
    ends: Vec<usize>,
    /// Memory for the parts of other threads, empty in between.
    parts: Vec<Rendered>,
}

impl Rendered {
    /// Adds what `write` appends as one line.
    pub(super) fn add(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        write(&mut self.bytes);
        self.ends.push(self.bytes.len());
    }

    /// Adds a line for each item.
    pub(super) fn add_all(&mut self, items: &[Item<'_>], write: impl Fn(&mut Vec<u8>, &Item<'_>) + Sync) {
        let received: usize = items.iter().map(|item| item.raw.len()).sum();
        self.add_in_parts(items, (received / PART).min(*CORES), &write);
    }

    /// Adds a line for each item, rendered in that many parts of about the same number of lines:
    /// the first by this thread, the others each by one of its own.
    fn add_in_parts(
        &mut self,
        items: &[Item<'_>],
        count: usize,
        write: &(impl Fn(&mut Vec<u8>, &Item<'_>) + Sync),
    ) {
        let length = items.len().div_ceil(count.max(1));
        let (own, others) = items.split_at(length);
        let mut parts = std::mem::take(&mut self.parts);
        let pieces = || others.chunks(length.max(1));
        parts.resize_with(pieces().len().max(parts.len()), Self::default);
        thread::scope(|scope| {
            for (piece, part) in pieces().zip(&mut parts) {
                let render = || part.add_each(piece, write);
                // Without a thread the part stays empty.
                let _ = thread::Builder::new().spawn_scoped(scope, render);
            }
            self.add_each(own, write);
        });
        for (piece, part) in pieces().zip(&mut parts) {
            if part.is_empty() {
                self.add_each(piece, write);
            }
            self.append(part);
        }
        self.parts = parts;
    }

    fn add_each(&mut self, items: &[Item<'_>], write: &impl Fn(&mut Vec<u8>, &Item<'_>)) {
        for item in items {
            self.add(|bytes| write(bytes, item));
        }
    }

    /// Moves the lines of a part to the end of these.
    fn append(&mut self, part: &mut Self) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&part.bytes);
        self.ends.extend(part.ends.iter().map(|end| start + end));
        part.clear();
    }

    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Returns the bytes of all lines.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns the lines.
    #[cfg(feature = "daemon")]
    pub(super) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| &self.bytes[start..*end])
    }

    /// Removes the lines that end within the first `length` bytes, which must be whole lines.
    /// Returns their number.
    pub(super) fn remove(&mut self, length: usize) -> usize {
        let lines = self.ends.partition_point(|end| *end <= length);
        self.ends.drain(..lines);
        self.ends.iter_mut().for_each(|end| *end -= length);
        self.bytes.drain(..length);
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Position;
    use crate::wire::event::Verdict;

    #[test]
    fn lines_stay_in_their_order_in_however_many_parts() {
        let lines: Vec<String> = (0..100).map(|number| format!("line {number}")).collect();
        let items: Vec<Item<'_>> = lines
            .iter()
            .map(|line| Item {
                behind: Position::default(),
                received_at: 0,
                source: "us",
                verdict: &Verdict::Unverified,
                key_id: None,
                raw: line.as_bytes(),
            })
            .collect();
        let mut rendered = Rendered::default();
        for count in [0, 1, 2, 3, 7, 99, 100, 101] {
            for items in [&items[..], &items[..10], &items[..1], &[]] {
                rendered.add(|bytes| bytes.extend_from_slice(b"before"));
                rendered.add_in_parts(items, count, &|bytes, item| bytes.extend_from_slice(item.raw));
                let found: Vec<&[u8]> = rendered.iter().collect();
                let expected: Vec<&[u8]> =
                    std::iter::once(&b"before"[..]).chain(items.iter().map(|item| item.raw)).collect();
                assert_eq!(found, expected, "{count}");
                rendered.clear();
            }
        }
    }

    #[test]
    fn whole_lines_are_removed_from_the_front() {
        let mut rendered = Rendered::default();
        for line in ["one\n", "two\n", "three\n"] {
            rendered.add(|bytes| bytes.extend_from_slice(line.as_bytes()));
        }
        assert_eq!((rendered.remove(0), rendered.remove(8)), (0, 2));
        assert_eq!(rendered.iter().collect::<Vec<_>>(), [b"three\n"]);
        assert_eq!(rendered.bytes(), b"three\n");
    }
}
