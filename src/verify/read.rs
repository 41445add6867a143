//! Splits a file into blocks: of whole lines, inflated where its first bytes say so, or of rows of
//! a database.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::judge::{BATCH_SIZE, Block, Finding, Verdict};
use crate::compression::{Compression, unpacked};
use crate::deliver::sqlite::stored::{Database, MAGIC, OpenError, is_damage};

/// Maximum length of a line, in bytes. A longer one is not an event, and is not kept; the daemon's
/// own limit is far smaller.
pub const LONGEST_LINE: usize = 64 << 20;

/// Size of a block of whole lines, in bytes; a longer line is a block of its own.
const BLOCK_BYTES: usize = 2 << 20;

/// Number of bytes that are read at a time.
const STEP: usize = 256 << 10;

/// Reason why a file cannot be read (any further).
#[derive(Debug)]
pub enum Fault {
    /// Its content is wrong. Nothing behind a damaged place is known.
    Finding(Finding),
    /// The machine's or the operator's fault, or a file of an unsupported kind.
    Unreadable(String),
}

impl Fault {
    /// Returns whether the file can be read any further.
    pub fn goes_on(&self) -> bool {
        matches!(self, Self::Finding(finding) if finding.verdict == Verdict::Malformed)
    }
}

/// Kind of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Lines as they are.
    Plain,
    /// Lines in gzip (RFC 1952).
    Gzip,
    /// Lines in zstd (RFC 8878).
    Zstd,
    /// A database of a SQLite sink.
    Sqlite,
}

impl Kind {
    /// Returns its name in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Sqlite => "sqlite",
        }
    }
}

impl From<Compression> for Kind {
    fn from(compression: Compression) -> Self {
        match compression {
            Compression::None => Self::Plain,
            Compression::Gzip => Self::Gzip,
            Compression::Zstd => Self::Zstd,
        }
    }
}

/// A file that is being read.
pub struct Blocks {
    kind: Kind,
    source: Source,
    /// Number of quarantined lines in a database.
    quarantined: u64,
}

enum Source {
    Lines(Lines),
    Rows(Box<Database>),
}

impl Blocks {
    /// Opens a file; `-` is standard input. What is read from it, before inflation, is added to
    /// `read`.
    ///
    /// # Errors
    /// A [`Fault`].
    pub fn open(path: &Path, read: &Arc<AtomicU64>) -> Result<Self, Fault> {
        let failed = |error: io::Error| Fault::Unreadable(error.to_string());
        let (source, regular): (Box<dyn Read + Send>, bool) = if path == Path::new("-") {
            (Box::new(io::stdin()), false)
        } else {
            let file = File::open(path).map_err(failed)?;
            let metadata = file.metadata().map_err(failed)?;
            if metadata.is_dir() {
                return Err(Fault::Unreadable("it is a directory".to_owned()));
            }
            (Box::new(file), metadata.is_file())
        };
        let broken = Arc::new(AtomicBool::new(false));
        let counted = Counted { source, read: Arc::clone(read), broken: Arc::clone(&broken) };
        let mut packed = BufReader::with_capacity(STEP, counted);
        let start = packed.fill_buf().map_err(failed)?;
        if start.starts_with(MAGIC) {
            if !regular {
                let why = "a database cannot be read from a pipe; name its file".to_owned();
                return Err(Fault::Unreadable(why));
            }
            drop(packed);
            return Self::database(path);
        }
        if Compression::of(start) == Compression::None
            && let Some(kind) = compressed_by_name(path)
            && (start.is_empty() || start.iter().take(16).any(|byte| *byte == 0 || *byte >= 0x80))
        {
            let reason = format!("its name says {}, but it does not begin like that", kind.as_str());
            return Err(Fault::Finding(Finding {
                line: 1,
                verdict: Verdict::Damaged,
                reason: reason.into(),
            }));
        }
        let (compression, inflated) = unpacked(packed).map_err(failed)?;
        let kind = compression.into();
        Ok(Self { kind, source: Source::Lines(Lines::new(inflated, broken)), quarantined: 0 })
    }

    fn database(path: &Path) -> Result<Self, Fault> {
        let database = Database::open(path).map_err(|error| match error {
            OpenError::Sqlite(error) => fault(&error, 1),
            other => Fault::Unreadable(other.to_string()),
        })?;
        let quarantined = database.quarantined;
        Ok(Self { kind: Kind::Sqlite, source: Source::Rows(Box::new(database)), quarantined })
    }

    /// Returns the kind of the file.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns the number of quarantined lines in a database.
    pub fn quarantined(&self) -> u64 {
        self.quarantined
    }

    /// Returns the next block, or none at the end.
    ///
    /// # Errors
    /// A [`Fault`], which may be followed by more: see [`Fault::goes_on`]. Every whole line before
    /// it was in a block.
    pub fn block(&mut self) -> Result<Option<Block>, Fault> {
        match &mut self.source {
            Source::Lines(lines) => lines.next(),
            Source::Rows(database) => {
                let rows = rows(database);
                let line = database.reached().unsigned_abs() + 1;
                match rows {
                    Ok(Some(block)) => Ok(Some(block)),
                    end => match end.and_then(|_| database.damage()) {
                        Ok(None) => Ok(None),
                        Ok(Some(damage)) => {
                            let reason = format!("the database is damaged: {damage}").into();
                            Err(Fault::Finding(Finding { line, verdict: Verdict::Damaged, reason }))
                        }
                        Err(error) => Err(fault(&error, line)),
                    },
                }
            }
        }
    }
}

impl Blocks {
    /// Returns the next block of what can be quarantined, or none at the end: lines, or the rows of
    /// a database's table `quarantine` alone. Does not look for damage of the rest of a database.
    ///
    /// # Errors
    /// As [`Self::block`].
    pub fn quarantined_block(&mut self) -> Result<Option<Block>, Fault> {
        match &mut self.source {
            Source::Lines(lines) => lines.next(),
            Source::Rows(database) => {
                let rows =
                    database.next_refused(BATCH_SIZE, BLOCK_BYTES).map_err(|error| fault(&error, 1))?;
                Ok((!rows.is_empty()).then_some(Block::Refused(rows)))
            }
        }
    }
}

/// Reads the events, and then the quarantined lines.
fn rows(database: &mut Database) -> rusqlite::Result<Option<Block>> {
    let rows = database.next(BATCH_SIZE, BLOCK_BYTES)?;
    if !rows.is_empty() {
        return Ok(Some(Block::Rows(rows)));
    }
    let refused = database.next_refused(BATCH_SIZE, BLOCK_BYTES)?;
    Ok((!refused.is_empty()).then_some(Block::Refused(refused)))
}

/// Returns whether a zstd file needs a larger window than is kept: the decoder reports that only in
/// its text.
fn needs_a_larger_window(error: &io::Error) -> bool {
    error.to_string().contains("requires too much memory")
}

fn compressed_by_name(path: &Path) -> Option<Kind> {
    match path.extension()?.to_str()? {
        "gz" => Some(Kind::Gzip),
        "zst" => Some(Kind::Zstd),
        _ => None,
    }
}

fn fault(error: &rusqlite::Error, line: u64) -> Fault {
    if is_damage(error) {
        let reason = format!("the database is damaged here: {error}");
        Fault::Finding(Finding { line, verdict: Verdict::Damaged, reason: reason.into() })
    } else {
        Fault::Unreadable(error.to_string())
    }
}

/// Splits a stream into blocks.
struct Lines {
    source: Box<dyn Read + Send>,
    /// Reading the file itself failed, whatever error the decoder returns for that.
    broken: Arc<AtomicBool>,
    /// Bytes that were read behind the last block.
    rest: Vec<u8>,
    /// Number of the first line in `rest`.
    number: u64,
    ended: bool,
    pending: Option<Fault>,
    /// The line in `rest` is too long and is skipped.
    passing: bool,
}

impl Lines {
    fn new(source: Box<dyn Read + Send>, broken: Arc<AtomicBool>) -> Self {
        Self { source, broken, rest: Vec::new(), number: 1, ended: false, pending: None, passing: false }
    }

    fn next(&mut self) -> Result<Option<Block>, Fault> {
        let mut buffer = std::mem::take(&mut self.rest);
        // No line ends before it.
        let mut searched = 0;
        loop {
            if self.passing {
                match memchr::memchr(b'\n', &buffer) {
                    Some(at) => {
                        buffer.drain(..=at);
                        self.number += 1;
                        self.passing = false;
                    }
                    None => buffer.clear(),
                }
                searched = 0;
            }
            if self.ended {
                if !buffer.is_empty() {
                    return Ok(Some(self.block(buffer)));
                }
                return self.pending.take().map_or(Ok(None), Err);
            }
            match memchr::memrchr(b'\n', &buffer[searched..]) {
                Some(at) if buffer.len() >= BLOCK_BYTES => {
                    self.rest = buffer.split_off(searched + at + 1);
                    return Ok(Some(self.block(buffer)));
                }
                Some(_) => {}
                None if buffer.len() > LONGEST_LINE => {
                    self.passing = true;
                    let reason = format!("longer than {} MiB", LONGEST_LINE >> 20).into();
                    let finding = Finding { line: self.number, verdict: Verdict::Malformed, reason };
                    return Err(Fault::Finding(finding));
                }
                None => searched = buffer.len(),
            }
            self.read(&mut buffer);
        }
    }

    fn block(&mut self, bytes: Vec<u8>) -> Block {
        let first = self.number;
        self.number += memchr::memchr_iter(b'\n', &bytes).count() as u64;
        if let Some(Fault::Finding(finding)) = &mut self.pending {
            finding.line = self.number;
        }
        Block::Lines { first, bytes }
    }

    /// Reads on; records the end or a fault.
    fn read(&mut self, buffer: &mut Vec<u8>) {
        let start = buffer.len();
        if buffer.capacity() < start + STEP {
            buffer.reserve_exact((BLOCK_BYTES + STEP).max(start + start / 2) - start);
        }
        buffer.resize(start + STEP, 0);
        let result = self.source.read(&mut buffer[start..]);
        buffer.truncate(start + result.as_ref().map_or(0, |read| *read));
        let fault = match result {
            Ok(0) => {
                self.ended = true;
                return;
            }
            Ok(_) => return,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return,
            Err(error) if self.broken.load(Ordering::Relaxed) => Fault::Unreadable(error.to_string()),
            Err(error) if needs_a_larger_window(&error) => Fault::Unreadable(
                "it was compressed with a window of more than 128 MiB, which takes as much memory to read; inflate it \
                 first: `zstd -dc --long=31 FILE | auditgate verify --jwks KEYS -`"
                    .to_owned(),
            ),
            Err(error) => {
                let reason = match error.kind() {
                    io::ErrorKind::UnexpectedEof => "the compressed data ends too early".to_owned(),
                    _ => format!("the compressed data is damaged: {error}"),
                };
                let finding = Finding { line: self.number, verdict: Verdict::Damaged, reason: reason.into() };
                Fault::Finding(finding)
            }
        };
        // The whole lines before it count; the block that holds them moves it to its line.
        buffer.truncate(memchr::memrchr(b'\n', buffer).map_or(0, |at| at + 1));
        (self.ended, self.pending) = (true, Some(fault));
    }
}

/// Counts what is read, and records whether reading itself failed.
struct Counted {
    source: Box<dyn Read + Send>,
    read: Arc<AtomicU64>,
    broken: Arc<AtomicBool>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let result = self.source.read(buffer);
        match &result {
            Ok(read) => _ = self.read.fetch_add(*read as u64, Ordering::Relaxed),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => self.broken.store(true, Ordering::Relaxed),
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reader that returns at most that many bytes at a time, and fails or ends after the last.
    struct SlowReader<'a>(&'a [u8], usize, Option<io::ErrorKind>);

    impl Read for SlowReader<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let size = self.1.min(self.0.len()).min(buffer.len());
            if let (0, Some(kind)) = (size, self.2) {
                return Err(kind.into());
            }
            buffer[..size].copy_from_slice(&self.0[..size]);
            self.0 = &self.0[size..];
            Ok(size)
        }
    }

    fn lines(source: SlowReader<'static>) -> (Vec<(u64, Vec<u8>)>, Option<Fault>) {
        let mut lines = Lines::new(Box::new(source), Arc::default());
        let mut found = Vec::new();
        let mut fault = None;
        loop {
            match lines.next() {
                Ok(Some(block)) => found
                    .extend(block.entries().into_iter().map(|entry| (entry.number, entry.raw.into_owned()))),
                Ok(None) => return (found, fault),
                Err(other) => fault = Some(other),
            }
        }
    }

    fn leaked(bytes: Vec<u8>) -> &'static [u8] {
        Box::leak(bytes.into_boxed_slice())
    }

    #[test]
    fn every_line_is_in_one_block_under_its_number() {
        let text: Vec<u8> =
            (1..=40_000).flat_map(|n| format!("line {n} {}\n", "x".repeat(n % 300)).into_bytes()).collect();
        for cut in [0, 1] {
            let text = leaked(text[..text.len() - cut].to_vec());
            let (found, fault) = lines(SlowReader(text, 100_003, None));
            assert!(fault.is_none());
            assert_eq!(found.len(), 40_000);
            assert!(found.iter().zip(1..).all(|((number, line), wanted)| {
                *number == wanted && line.starts_with(format!("line {wanted} ").as_bytes())
            }));
        }
        assert_eq!(lines(SlowReader(b"", 1, None)).0, []);
        assert_eq!(lines(SlowReader(b"\n\n", 1, None)).0, []);
        assert_eq!(lines(SlowReader(b"\n\na", 1, None)).0, [(3, b"a".to_vec())]);
    }

    #[test]
    fn lines_before_a_fault_count() {
        let (found, fault) = lines(SlowReader(b"a\nb\nc", 2, Some(io::ErrorKind::UnexpectedEof)));
        assert_eq!(found, [(1, b"a".to_vec()), (2, b"b".to_vec())]);
        assert!(matches!(fault, Some(Fault::Finding(Finding { line: 3, .. }))), "{fault:?}");
        let (found, fault) = lines(SlowReader(b"", 1, Some(io::ErrorKind::InvalidData)));
        assert_eq!(found, []);
        assert!(matches!(fault, Some(Fault::Finding(Finding { line: 1, .. }))), "{fault:?}");
    }

    #[test]
    fn a_line_that_is_too_long_is_skipped() {
        let text = [b"a\n", &vec![b'x'; LONGEST_LINE + 3 * STEP][..], b"\nb\nc"].concat();
        let (found, fault) = lines(SlowReader(leaked(text), usize::MAX, None));
        assert_eq!(found, [(1, b"a".to_vec()), (3, b"b".to_vec()), (4, b"c".to_vec())]);
        let Some(Fault::Finding(finding)) = fault else { panic!("{fault:?}") };
        assert_eq!((finding.line, finding.verdict), (2, Verdict::Malformed));
    }

    /// Returns a zstd frame with one raw block (RFC 8878, section 3.1.1) and a window of two to
    /// that power of bytes.
    fn frame(window: u8, text: &[u8]) -> Vec<u8> {
        let block = u32::try_from(text.len()).unwrap() << 3 | 1;
        [&[0x28, 0xb5, 0x2f, 0xfd][..], &[0, (window - 10) << 3][..], &block.to_le_bytes()[..3], text]
            .concat()
    }

    fn read(bytes: &[u8]) -> (Kind, Vec<Vec<u8>>, Option<Fault>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log.zst");
        std::fs::write(&path, bytes).unwrap();
        let mut blocks = Blocks::open(&path, &Arc::default()).unwrap();
        let mut found = Vec::new();
        loop {
            match blocks.block() {
                Ok(Some(block)) => {
                    found.extend(block.entries().into_iter().map(|entry| entry.raw.into_owned()));
                }
                Ok(None) => return (blocks.kind(), found, None),
                Err(fault) => return (blocks.kind(), found, Some(fault)),
            }
        }
    }

    #[test]
    fn skippable_frames_are_skipped() {
        for nibble in 0..16 {
            let skipped = [&[0x50 | nibble, 0x2a, 0x4d, 0x18, 4, 0, 0, 0][..], b"\n\xff\0a"].concat();
            let file = [&skipped[..], &frame(10, b"a\n"), &skipped, &frame(10, b"b\n"), &skipped].concat();
            let (kind, found, fault) = read(&file);
            assert!(fault.is_none(), "{fault:?}");
            assert_eq!((kind, found), (Kind::Zstd, vec![b"a".to_vec(), b"b".to_vec()]));
        }
    }

    #[test]
    fn a_window_beyond_the_limit_is_no_damage() {
        assert_eq!(read(&frame(27, b"a\n")).1, [b"a"]);
        for window in [28, 31] {
            let (_, found, fault) = read(&[frame(10, b"a\n"), frame(window, b"b\n")].concat());
            assert_eq!(found, [b"a"]);
            let Some(Fault::Unreadable(why)) = fault else { panic!("{fault:?}") };
            assert!(why.contains("--long=31"), "{why}");
        }
    }
}
