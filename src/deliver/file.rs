//! The file sink: whole lines, exactly once across kills, restarts and failed writes.
//!
//! The mark says up to which byte of which file everything is safe. Whatever stands behind that byte is the
//! beginning of what will be pushed next (rendering is deterministic), cut off anywhere: so it is compared
//! with what is pushed, and only the rest is written, a torn line finished. Recovery after a crash and the
//! retry after a failed write are the same code.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::sink::{Item, Sink, SinkError};
use crate::ledger::{Position, Resume};
use crate::wire::event::Verdict;
use crate::wire::record::{self, Accepted, Quarantined};

/// How lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rendering {
    /// Each line as it came.
    Raw,
    /// One record a line.
    Json,
}

/// A file that lines are appended to.
pub struct FileSink {
    path: PathBuf,
    rendering: Rendering,
    open: Option<Open>,
    collected: Vec<u8>,
}

struct Open {
    file: File,
    device: u64,
    inode: u64,
    /// Everything before this byte is safe.
    safe: u64,
    /// A sync failed: what can be read back proves nothing about the disk.
    distrusted: bool,
}

impl FileSink {
    /// A sink at a path, whose directory must exist. Opens nothing yet.
    pub fn new(path: PathBuf, rendering: Rendering) -> Self {
        Self { path, rendering, open: None, collected: Vec::new() }
    }

    fn error(&self, what: &str) -> impl Fn(io::Error) -> SinkError + use<> {
        let what = format!("cannot {what} {}", self.path.display());
        move |cause| SinkError { what: what.clone(), cause }
    }
}

impl Sink for FileSink {
    fn resume(&mut self, last: &Resume) -> Result<Resume, SinkError> {
        self.collected.clear();
        self.open = None;
        let (file, is_new) = open(&self.path).map_err(self.error("open"))?;
        if is_new {
            sync_directory(&self.path).map_err(self.error("make"))?;
        }
        let metadata = file.metadata().map_err(self.error("look at"))?;
        let (device, inode, length) = (metadata.dev(), metadata.ino(), metadata.len());
        let safe = match Mark::read(&last.mark) {
            Some(known) if (known.device, known.inode) == (device, inode) => {
                if length < known.safe {
                    warn_cut(&self.path, known.safe - length);
                }
                known.safe.min(length)
            }
            known => {
                if known.is_some() && !is_new {
                    tracing::warn!(
                        path = %self.path.display(),
                        "another file is at the path than before; going on at its end"
                    );
                }
                length
            }
        };
        cut_trailing_zeros(&file, safe, length).map_err(self.error("mend"))?;
        self.open = Some(Open { file, device, inode, safe, distrusted: false });
        Ok(Resume { position: last.position, mark: Mark { device, inode, safe }.write() })
    }

    fn push(&mut self, item: &Item<'_>) {
        let out = &mut self.collected;
        match (self.rendering, item.verdict) {
            (Rendering::Raw, _) => {
                out.extend_from_slice(item.raw);
                out.push(b'\n');
            }
            (Rendering::Json, Verdict::Rejected { reason, detail }) => {
                let record = Quarantined {
                    received_at: item.received_at,
                    source: item.source,
                    reason: *reason,
                    detail,
                    raw: item.raw,
                };
                record::write_quarantined(out, &record);
            }
            (Rendering::Json, Verdict::Verified { .. } | Verdict::Unverified) => {
                let record = Accepted {
                    received_at: item.received_at,
                    source: item.source,
                    key_id: item.key_id,
                    raw: item.raw,
                };
                record::write_accepted(out, &record);
            }
        }
    }

    fn collected(&self) -> usize {
        self.collected.len()
    }

    fn flush(&mut self, _behind: Position) -> Result<Vec<u8>, SinkError> {
        let (writing, syncing) = (self.error("write"), self.error("sync"));
        let Some(open) = &mut self.open else {
            return Err(writing(io::Error::other("the file is not open")));
        };
        if self.collected.is_empty() {
            return Ok(Mark { device: open.device, inode: open.inode, safe: open.safe }.write());
        }
        let end = open.put(&self.path, &self.collected).map_err(writing)?;
        if let Err(cause) = open.file.sync_data() {
            // The kernel may have dropped the pages, and will not say so twice.
            open.distrusted = true;
            return Err(syncing(cause));
        }
        open.safe = end;
        open.distrusted = false;
        self.collected.clear();
        Ok(Mark { device: open.device, inode: open.inode, safe: end }.write())
    }
}

impl Open {
    /// Brings the bytes into the file behind what is safe; returns where they end.
    ///
    /// What stands there already is the beginning of these bytes, when a write was interrupted; then only
    /// the rest is written, or all of it where the disk is not to be believed.
    fn put(&mut self, path: &Path, bytes: &[u8]) -> io::Result<u64> {
        let length = self.file.metadata()?.len();
        if length < self.safe {
            warn_cut(path, self.safe - length);
            self.safe = length;
        }
        let mut found = vec![0; bytes.len().min(usize::try_from(length - self.safe).unwrap_or(usize::MAX))];
        self.file.read_exact_at(&mut found, self.safe)?;
        let same = found.iter().zip(bytes).take_while(|(found, byte)| found == byte).count();
        // After a power loss, pages that never reached the disk read as zeros.
        if !found.iter().zip(bytes).skip(same).all(|(found, byte)| found == byte || *found == 0) {
            return self.step_over(path, bytes, same, length);
        }
        let from = if self.distrusted { 0 } else { same };
        self.file.write_all_at(&bytes[from..], self.safe + from as u64)?;
        Ok(self.safe + bytes.len() as u64)
    }

    /// Somebody else wrote into the file. That is kept; we go on behind it, on a line of our own. Our lines
    /// that are there in full count, the one that was interrupted is written again.
    fn step_over(&self, path: &Path, bytes: &[u8], same: usize, length: u64) -> io::Result<u64> {
        tracing::warn!(
            path = %path.display(),
            at_byte = self.safe + same as u64,
            "somebody else wrote into the file; going on behind it"
        );
        let kept = bytes[..same].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        if self.distrusted {
            self.file.write_all_at(&bytes[..kept], self.safe)?;
        }
        let mut end = length;
        let mut last = [0];
        self.file.read_exact_at(&mut last, length - 1)?;
        if last != *b"\n" {
            self.file.write_all_at(b"\n", end)?;
            end += 1;
        }
        self.file.write_all_at(&bytes[kept..], end)?;
        Ok(end + (bytes.len() - kept) as u64)
    }
}

fn warn_cut(path: &Path, missing_bytes: u64) {
    tracing::warn!(
        path = %path.display(),
        missing_bytes,
        "somebody else cut the file; what was cut is gone from it"
    );
}

/// Opens the file, or makes it; tells whether it was made.
fn open(path: &Path) -> io::Result<(File, bool)> {
    let mut options = File::options();
    options.read(true).write(true).mode(0o640);
    match options.clone().create_new(true).open(path) {
        Ok(file) => Ok((file, true)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok((options.open(path)?, false)),
        Err(error) => Err(error),
    }
}

/// Makes the name of a new file durable.
fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

/// What we write ends with a line end, so zeros at the end are pages that a power loss left empty.
fn cut_trailing_zeros(file: &File, safe: u64, length: u64) -> io::Result<()> {
    const STEP: u64 = 64 * 1024;
    let mut end = length;
    while end > safe {
        let start = end.saturating_sub(STEP).max(safe);
        let mut piece = vec![0; usize::try_from(end - start).map_err(io::Error::other)?];
        file.read_exact_at(&mut piece, start)?;
        match piece.iter().rposition(|byte| *byte != 0) {
            Some(last) => {
                end = start + last as u64 + 1;
                break;
            }
            None => end = start,
        }
    }
    if end < length { file.set_len(end) } else { Ok(()) }
}

/// Which file, and up to which byte of it everything is safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    device: u64,
    inode: u64,
    safe: u64,
}

impl Mark {
    fn read(mark: &[u8]) -> Option<Self> {
        let (numbers, []) = mark.as_chunks::<8>() else { return None };
        let [device, inode, safe] = *numbers else { return None };
        let number = u64::from_le_bytes;
        Some(Self { device: number(device), inode: number(inode), safe: number(safe) })
    }

    fn write(self) -> Vec<u8> {
        [self.device, self.inode, self.safe].map(u64::to_le_bytes).concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench {
        _dir: tempfile::TempDir,
        path: PathBuf,
        mark: Vec<u8>,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("out.log");
            Self { _dir: dir, path, mark: Vec::new() }
        }

        fn sink(&mut self) -> FileSink {
            let mut sink = FileSink::new(self.path.clone(), Rendering::Raw);
            let last = Resume { position: Position::default(), mark: self.mark.clone() };
            self.mark = sink.resume(&last).unwrap().mark;
            sink
        }

        fn text(&self) -> String {
            std::fs::read_to_string(&self.path).unwrap()
        }
    }

    fn push(sink: &mut FileSink, lines: &[&str]) {
        for line in lines {
            sink.push(&Item {
                behind: Position::default(),
                received_at: 0,
                source: "us",
                verdict: &Verdict::Unverified,
                key_id: None,
                raw: line.as_bytes(),
            });
        }
    }

    const LINES: [&str; 4] = ["one", "two two", "three", "four"];
    const TEXT: &str = "one\ntwo two\nthree\nfour\n";

    #[test]
    fn an_interrupted_write_is_finished_wherever_it_was_cut() {
        for cut in 0..=TEXT.len() {
            let mut bench = Bench::new();
            let mut sink = bench.sink();
            push(&mut sink, &["before"]);
            bench.mark = sink.flush(Position::default()).unwrap();
            drop(sink);
            let torn = format!("before\n{}", &TEXT[..cut]);
            std::fs::write(&bench.path, &torn).unwrap();
            let mut sink = bench.sink();
            // In smaller pieces than before the crash.
            for pair in LINES.chunks(3) {
                push(&mut sink, pair);
                bench.mark = sink.flush(Position::default()).unwrap();
            }
            push(&mut sink, &["after"]);
            sink.flush(Position::default()).unwrap();
            assert_eq!(bench.text(), format!("before\n{TEXT}after\n"), "cut at {cut}");
        }
    }

    #[test]
    fn pages_that_a_power_loss_left_empty_are_filled() {
        for (start, end, longer) in [(0, 5, 0), (3, 8, 0), (0, TEXT.len(), 9), (TEXT.len(), TEXT.len(), 4096)]
        {
            let mut bench = Bench::new();
            bench.sink();
            let mut bytes = TEXT.as_bytes().to_vec();
            bytes[start..end].fill(0);
            bytes.resize(bytes.len() + longer, 0);
            std::fs::write(&bench.path, &bytes).unwrap();
            let mut sink = bench.sink();
            push(&mut sink, &LINES);
            sink.flush(Position::default()).unwrap();
            assert_eq!(bench.text(), TEXT, "{start}..{end}");
        }
    }

    #[test]
    fn somebody_else_s_lines_are_kept_and_ours_are_whole() {
        let mut bench = Bench::new();
        let mut sink = bench.sink();
        push(&mut sink, &LINES[..2]);
        bench.mark = sink.flush(Position::default()).unwrap();
        std::fs::write(&bench.path, format!("{}tea", bench.text())).unwrap();
        push(&mut sink, &LINES[2..]);
        bench.mark = sink.flush(Position::default()).unwrap();
        assert_eq!(bench.text(), "one\ntwo two\ntea\nthree\nfour\n");
        push(&mut sink, &["five"]);
        sink.flush(Position::default()).unwrap();
        assert_eq!(bench.text(), "one\ntwo two\ntea\nthree\nfour\nfive\n");
    }

    #[test]
    fn a_file_that_was_cut_goes_on_from_its_end() {
        let mut bench = Bench::new();
        let mut sink = bench.sink();
        push(&mut sink, &LINES);
        sink.flush(Position::default()).unwrap();
        std::fs::write(&bench.path, "").unwrap();
        push(&mut sink, &["five"]);
        bench.mark = sink.flush(Position::default()).unwrap();
        assert_eq!(bench.text(), "five\n");
        std::fs::write(&bench.path, "fi\n").unwrap();
        let mut sink = bench.sink();
        push(&mut sink, &["six"]);
        sink.flush(Position::default()).unwrap();
        assert_eq!(bench.text(), "fi\nsix\n");
    }

    #[test]
    fn a_new_sink_keeps_what_is_at_its_path() {
        let mut bench = Bench::new();
        std::fs::write(&bench.path, "older\n").unwrap();
        let mut sink = bench.sink();
        push(&mut sink, &["newer"]);
        sink.flush(Position::default()).unwrap();
        assert_eq!(bench.text(), "older\nnewer\n");
    }

    #[test]
    fn after_a_failed_sync_everything_is_written_again() {
        let mut bench = Bench::new();
        let mut sink = bench.sink();
        push(&mut sink, &LINES);
        let open = sink.open.as_mut().unwrap();
        open.put(&bench.path, TEXT.as_bytes()).unwrap();
        open.distrusted = true;
        sink.flush(Position::default()).unwrap();
        assert_eq!(bench.text(), TEXT);
        assert!(!sink.open.as_ref().unwrap().distrusted);
    }
}
