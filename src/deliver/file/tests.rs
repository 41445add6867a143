//! Tests of the file sink through its public interface.

use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, Ordering};

use rustix::fs::{IFlags, ioctl_setflags};

use super::*;
use crate::wire::event::Verdict;

struct Fixture {
    _dir: tempfile::TempDir,
    path: PathBuf,
    mark: Vec<u8>,
    /// Number of lines that the mark records as safe.
    lines: u32,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.log");
        Self { _dir: dir, path, mark: Vec::new(), lines: 0 }
    }

    fn options(&self) -> FileOptions {
        FileOptions {
            path: self.path.clone(),
            format: Rendering::Raw,
            rotate: None,
            fsync: Syncing::Batch,
            fsync_interval: None,
            mode: 0o640,
            owner: None,
        }
    }

    fn sink(&mut self) -> FileSink {
        self.sink_with(self.options())
    }

    fn sink_with(&mut self, options: FileOptions) -> FileSink {
        self.sink_at(options, Arc::new(|| 1_000_000))
    }

    fn sink_at(&mut self, options: FileOptions, now: WallClock) -> FileSink {
        let mut sink = FileSink::new(options, (None, None), now);
        let last = Resume { position: Position::default(), mark: self.mark.clone() };
        self.mark = sink.resume(&last).unwrap().mark;
        sink
    }

    fn text(&self) -> String {
        std::fs::read_to_string(&self.path).unwrap()
    }
}

fn push(sink: &mut FileSink, lines: &[&str]) {
    for (number, line) in lines.iter().enumerate() {
        sink.push(&Item {
            behind: Position { batch: 0, line: u32::try_from(number).unwrap() + 1 },
            received_at: 0,
            source: "us",
            verdict: &Verdict::Unverified,
            key_id: None,
            raw: line.as_bytes(),
        });
    }
}

/// Flushes as the worker does, and returns the mark.
fn flush(sink: &mut FileSink) -> Vec<u8> {
    sink.prepare().unwrap();
    sink.flush(Position::default(), false).unwrap().unwrap().mark
}

const LINES: [&str; 4] = ["one", "two two", "three", "four"];
const TEXT: &str = "one\ntwo two\nthree\nfour\n";

#[test]
fn an_interrupted_write_is_completed_wherever_it_ended() {
    for cut in 0..=TEXT.len() {
        let mut fixture = Fixture::new();
        let mut sink = fixture.sink();
        push(&mut sink, &["before"]);
        fixture.mark = flush(&mut sink);
        drop(sink);
        let torn = format!("before\n{}", &TEXT[..cut]);
        std::fs::write(&fixture.path, &torn).unwrap();
        let mut sink = fixture.sink();
        // In smaller chunks than before the crash.
        for pair in LINES.chunks(3) {
            push(&mut sink, pair);
            fixture.mark = flush(&mut sink);
        }
        push(&mut sink, &["after"]);
        flush(&mut sink);
        assert_eq!(fixture.text(), format!("before\n{TEXT}after\n"), "cut at {cut}");
    }
}

#[test]
fn pages_that_a_power_loss_left_empty_are_filled() {
    for (start, end, longer) in [(0, 5, 0), (3, 8, 0), (0, TEXT.len(), 9), (TEXT.len(), TEXT.len(), 4096)] {
        let mut fixture = Fixture::new();
        fixture.sink();
        let mut bytes = TEXT.as_bytes().to_vec();
        bytes[start..end].fill(0);
        bytes.resize(bytes.len() + longer, 0);
        std::fs::write(&fixture.path, &bytes).unwrap();
        let mut sink = fixture.sink();
        push(&mut sink, &LINES);
        flush(&mut sink);
        assert_eq!(fixture.text(), TEXT, "{start}..{end}");
    }
}

#[test]
fn lines_of_another_process_are_kept_and_ours_are_whole() {
    let mut fixture = Fixture::new();
    let mut sink = fixture.sink();
    push(&mut sink, &LINES[..2]);
    fixture.mark = flush(&mut sink);
    std::fs::write(&fixture.path, format!("{}tea", fixture.text())).unwrap();
    push(&mut sink, &LINES[2..]);
    fixture.mark = flush(&mut sink);
    assert_eq!(fixture.text(), "one\ntwo two\ntea\nthree\nfour\n");
    push(&mut sink, &["five"]);
    flush(&mut sink);
    assert_eq!(fixture.text(), "one\ntwo two\ntea\nthree\nfour\nfive\n");
}

#[test]
fn a_truncated_file_is_continued_at_its_end() {
    let mut fixture = Fixture::new();
    let mut sink = fixture.sink();
    push(&mut sink, &LINES);
    flush(&mut sink);
    std::fs::write(&fixture.path, "").unwrap();
    push(&mut sink, &["five"]);
    fixture.mark = flush(&mut sink);
    drop(sink);
    assert_eq!(fixture.text(), "five\n");
    std::fs::write(&fixture.path, "fi\n").unwrap();
    let mut sink = fixture.sink();
    push(&mut sink, &["six"]);
    flush(&mut sink);
    assert_eq!(fixture.text(), "fi\nsix\n");
}

#[test]
fn a_new_sink_keeps_what_is_at_its_path() {
    let mut fixture = Fixture::new();
    std::fs::write(&fixture.path, "older\n").unwrap();
    let mut sink = fixture.sink();
    push(&mut sink, &["newer"]);
    flush(&mut sink);
    assert_eq!(fixture.text(), "older\nnewer\n");
}

/// Returns the number of rotated files, and the text of all of them and of the file, in order.
fn everything(fixture: &Fixture) -> (usize, String) {
    let rotated = rotation::rotated(&fixture.path).unwrap();
    let mut text = String::new();
    for file in rotated.iter().chain([&fixture.path]) {
        text += &std::fs::read_to_string(file).unwrap();
    }
    (rotated.len(), text)
}

#[test]
fn a_file_is_rotated_before_it_is_too_large() {
    let mut fixture = Fixture::new();
    let rotation = Rotation { size: Some(11), ..Rotation::default() };
    let mut sink = fixture.sink_with(FileOptions { rotate: Some(rotation), ..fixture.options() });
    for line in LINES {
        push(&mut sink, &[line]);
        fixture.mark = sink.prepare().unwrap().map_or(fixture.mark, |at| at.mark);
        fixture.mark = sink.flush(Position::default(), false).unwrap().unwrap().mark;
    }
    assert_eq!(everything(&fixture), (2, TEXT.to_owned()));
}

#[test]
fn a_file_is_rotated_when_its_day_is_over() {
    let mut fixture = Fixture::new();
    let rotation = Rotation { every: Some(Period::Daily), ..Rotation::default() };
    let (mut sink, now) = sink_with_clock(&mut fixture, rotation);
    now.store(86_399_000, Ordering::SeqCst);
    push(&mut sink, &LINES[..2]);
    flush(&mut sink);
    assert_eq!(sink.prepare().unwrap(), None);
    now.store(86_400_000, Ordering::SeqCst);
    assert!(sink.prepare().unwrap().is_some(), "even without a new line");
    assert_eq!(sink.prepare().unwrap(), None, "an empty file has no day");
    push(&mut sink, &LINES[2..]);
    flush(&mut sink);
    assert_eq!(everything(&fixture), (1, TEXT.to_owned()));
}

#[test]
fn a_kill_during_a_rotation_loses_and_repeats_nothing() {
    // The process is killed after the rename, after the new file was created, or after its mark was
    // recorded.
    for step in 0..3 {
        let mut fixture = Fixture::new();
        let mut sink = fixture.sink();
        push(&mut sink, &LINES[..2]);
        fixture.mark = flush(&mut sink);
        std::fs::rename(&fixture.path, fixture.path.with_extension("log.19700101T000000Z-0001")).unwrap();
        if step > 0 {
            std::fs::write(&fixture.path, "").unwrap();
        }
        if step > 1 {
            fixture.mark = sink.prepare().unwrap().unwrap().mark;
        }
        drop(sink);
        let mut sink = fixture.sink();
        push(&mut sink, &LINES[2..]);
        flush(&mut sink);
        assert_eq!(everything(&fixture), (1, TEXT.to_owned()), "step {step}");
    }
}

#[test]
fn a_renamed_file_is_truncated_and_its_lines_are_written_at_the_path() {
    for cut in 0..=TEXT.len() {
        let mut fixture = Fixture::new();
        fixture.sink();
        std::fs::write(&fixture.path, &TEXT[..cut]).unwrap();
        let renamed = fixture.path.with_extension("log.1");
        std::fs::rename(&fixture.path, &renamed).unwrap();
        let mut sink = fixture.sink();
        for line in LINES {
            push(&mut sink, &[line]);
            flush(&mut sink);
        }
        assert_eq!(std::fs::read_to_string(&renamed).unwrap(), "", "cut at {cut}");
        assert_eq!(fixture.text(), TEXT, "cut at {cut}");
    }
}

#[test]
fn a_renamed_or_removed_file_is_created_again() {
    let mut fixture = Fixture::new();
    let mut sink = fixture.sink();
    push(&mut sink, &LINES[..1]);
    flush(&mut sink);
    let renamed = fixture.path.with_extension("log.1");
    std::fs::rename(&fixture.path, &renamed).unwrap();
    push(&mut sink, &LINES[1..2]);
    flush(&mut sink);
    assert_eq!(std::fs::read_to_string(&renamed).unwrap(), "one\n");
    assert_eq!(fixture.text(), "two two\n");
    std::fs::remove_file(&fixture.path).unwrap();
    assert!(sink.prepare().unwrap().is_some(), "even without a new line");
    push(&mut sink, &LINES[2..]);
    flush(&mut sink);
    assert_eq!(fixture.text(), "three\nfour\n");
}

fn syncing_hourly(fixture: &Fixture) -> FileOptions {
    let fsync_interval = Some(std::time::Duration::from_secs(3600));
    FileOptions { fsync: Syncing::Interval, fsync_interval, ..fixture.options() }
}

#[test]
fn a_position_moves_only_after_the_sync() {
    let mut fixture = Fixture::new();
    let mut sink = fixture.sink_with(syncing_hourly(&fixture));
    push(&mut sink, &LINES[..2]);
    assert_eq!(sink.flush(Position::default(), false).unwrap(), None);
    assert_eq!(fixture.text(), "one\ntwo two\n");
    // After a kill everything is pushed again, and is written once.
    drop(sink);
    let mut sink = fixture.sink();
    push(&mut sink, &LINES);
    flush(&mut sink);
    assert_eq!(fixture.text(), TEXT);
    drop(sink);
    let mut sink = fixture.sink_with(syncing_hourly(&fixture));
    push(&mut sink, &LINES);
    assert_eq!(sink.flush(Position::default(), false).unwrap(), None);
    assert!(sink.flush(Position::default(), true).unwrap().is_some());
}

#[test]
fn a_new_file_has_the_configured_mode() {
    let mut fixture = Fixture::new();
    fixture.sink_with(FileOptions { mode: 0o604, ..fixture.options() });
    assert_eq!(std::fs::metadata(&fixture.path).unwrap().permissions().mode() & 0o777, 0o604);
}

/// Returns a sink, and the time that its clock shows.
fn sink_with_clock(fixture: &mut Fixture, rotation: Rotation) -> (FileSink, Arc<AtomicI64>) {
    let time = Arc::new(AtomicI64::new(1_000_000));
    let clock = Arc::clone(&time);
    let now = Arc::new(move || clock.load(Ordering::SeqCst));
    (fixture.sink_at(FileOptions { rotate: Some(rotation), ..fixture.options() }, now), time)
}

#[test]
fn a_file_belongs_to_the_day_of_its_first_line() {
    const DAY: i64 = 86_400_000;
    let mut fixture = Fixture::new();
    let rotation = Rotation { every: Some(Period::Daily), ..Rotation::default() };
    let (mut sink, time) = sink_with_clock(&mut fixture, rotation);
    // Created on the first day, first written on the third.
    time.store(2 * DAY, Ordering::SeqCst);
    push(&mut sink, &["one"]);
    flush(&mut sink);
    assert_eq!(sink.prepare().unwrap(), None);
    // Truncated by another process and written two days later: like a new file.
    time.store(3 * DAY - 1, Ordering::SeqCst);
    File::options().write(true).truncate(true).open(&fixture.path).unwrap();
    time.store(5 * DAY, Ordering::SeqCst);
    sink.prepare().unwrap();
    assert_eq!(everything(&fixture), (0, String::new()), "an empty file has no day");
    push(&mut sink, &["two"]);
    flush(&mut sink);
    assert_eq!(sink.prepare().unwrap(), None);
    assert_eq!(everything(&fixture), (0, "two\n".to_owned()));
    time.store(6 * DAY, Ordering::SeqCst);
    assert!(sink.prepare().unwrap().is_some());
    assert_eq!(everything(&fixture), (1, "two\n".to_owned()));
}

#[test]
fn a_symbolic_link_stays_and_its_target_is_rotated() {
    let mut fixture = Fixture::new();
    let other = tempfile::tempdir().unwrap();
    std::fs::create_dir(other.path().join("logs")).unwrap();
    // A link to a link to a file that does not exist yet.
    std::os::unix::fs::symlink(other.path().join("link"), &fixture.path).unwrap();
    std::os::unix::fs::symlink("logs/real.log", other.path().join("link")).unwrap();
    let real = other.path().join("logs/real.log");
    let rotation = Rotation { size: Some(5), ..Rotation::default() };
    let (mut sink, _) = sink_with_clock(&mut fixture, rotation);
    for line in LINES {
        push(&mut sink, &[line]);
        fixture.mark = flush(&mut sink);
    }
    assert!(fixture.path.is_symlink());
    assert!(rotation::rotated(&fixture.path).unwrap().is_empty());
    let rotated = rotation::rotated(&real).unwrap();
    let text = |file: &PathBuf| std::fs::read_to_string(file).unwrap();
    assert_eq!(rotated.iter().chain([&real]).map(text).collect::<String>(), TEXT);
    assert_eq!(rotated.len(), 3);

    // A write that was interrupted before the target was renamed is truncated.
    let torn = std::fs::read_to_string(&real).unwrap() + "fi";
    std::fs::write(&real, torn).unwrap();
    let renamed = real.with_extension("log.1");
    std::fs::rename(&real, &renamed).unwrap();
    drop(sink);
    let mut sink = fixture.sink();
    push(&mut sink, &["five"]);
    flush(&mut sink);
    assert_eq!(text(&renamed), "four\n");
    assert_eq!(text(&real), "five\n");

    // The link is changed to another target.
    let elsewhere = other.path().join("elsewhere.log");
    std::fs::remove_file(&fixture.path).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &fixture.path).unwrap();
    push(&mut sink, &["six"]);
    flush(&mut sink);
    assert_eq!(text(&elsewhere), "six\n");
}

#[test]
fn a_path_that_is_not_a_regular_file_is_refused() {
    let fixture = Fixture::new();
    let refusal = || {
        let last = Resume { position: Position::default(), mark: Vec::new() };
        FileSink::new(fixture.options(), (None, None), Arc::new(|| 0)).resume(&last).unwrap_err().to_string()
    };
    std::os::unix::fs::symlink("/dev/null", &fixture.path).unwrap();
    assert!(refusal().ends_with("not a regular file"), "{}", refusal());
    std::fs::remove_file(&fixture.path).unwrap();
    std::os::unix::fs::symlink(&fixture.path, &fixture.path).unwrap();
    assert!(refusal().contains("symbolic links"), "{}", refusal());
    std::fs::remove_file(&fixture.path).unwrap();
    std::fs::create_dir(&fixture.path).unwrap();
    assert!(refusal().contains("Is a directory"), "{}", refusal());
}

#[test]
fn a_file_that_was_created_incompletely_is_created_again() {
    let mut fixture = Fixture::new();
    File::options().create_new(true).write(true).mode(0o000).open(&fixture.path).unwrap();
    fixture.sink();
    assert_eq!(std::fs::metadata(&fixture.path).unwrap().permissions().mode() & 0o777, 0o640);
    // An empty file that another process created stays as it is.
    std::fs::remove_file(&fixture.path).unwrap();
    File::options().create_new(true).write(true).mode(0o600).open(&fixture.path).unwrap();
    let inode = std::fs::metadata(&fixture.path).unwrap().ino();
    fixture.sink();
    let found = std::fs::metadata(&fixture.path).unwrap();
    assert_eq!((found.ino(), found.permissions().mode() & 0o777), (inode, 0o600));
}

#[test]
fn an_owner_that_cannot_be_set_is_an_error() {
    let fixture = Fixture::new();
    let owner = (Some(1), Some(2));
    let last = Resume { position: Position::default(), mark: Vec::new() };
    for _ in 0..2 {
        match FileSink::new(fixture.options(), owner, Arc::new(|| 0)).resume(&last) {
            // Root may set it.
            Ok(_) => {
                let found = std::fs::metadata(&fixture.path).unwrap();
                assert_eq!((found.uid(), found.gid()), (1, 2));
            }
            Err(error) => {
                assert!(error.to_string().contains("its owner cannot be set"), "{error}");
                let found = std::fs::metadata(&fixture.path).unwrap();
                assert_eq!(found.permissions().mode() & 0o777, 0, "readable by no other user");
            }
        }
    }
}

/// Prepares the sink, and records the mark and the position, as the worker does.
fn prepare(sink: &mut FileSink, fixture: &mut Fixture) {
    if let Some(at) = sink.prepare().unwrap() {
        (fixture.mark, fixture.lines) = (at.mark, at.position.line);
    }
}

#[test]
fn an_inode_number_alone_does_not_identify_our_file() {
    // Another process's file has our inode number by now, under our name or another.
    for name in ["out.log.gz", "out.log-20260102", "out.old.log", "ledger.db-wal", "out.log"] {
        for kept in [0, 3, 40, 5000] {
            let mut fixture = Fixture::new();
            let mut sink = fixture.sink();
            push(&mut sink, &LINES);
            fixture.mark = flush(&mut sink);
            drop(sink);
            let mut precious = vec![b'x'; kept];
            precious.resize(kept + 300, 0);
            let other = fixture.path.with_file_name(name);
            std::fs::rename(&fixture.path, &other).unwrap();
            std::fs::write(&other, &precious).unwrap();
            let mut sink = fixture.sink();
            for line in ["five", "six"] {
                push(&mut sink, &[line]);
                fixture.mark = flush(&mut sink);
            }
            let found = std::fs::read(&other).unwrap();
            if name == "out.log" {
                precious.extend_from_slice(b"\nfive\nsix\n");
            } else {
                assert_eq!(fixture.text(), "five\nsix\n", "{name}");
            }
            assert!(found == precious, "{name} with {kept} was written to");
        }
    }
}

#[test]
fn an_inode_number_without_a_digest_does_not_identify_a_renamed_file() {
    // Nothing was safe yet, or the mark is of version 1: the content is compared.
    for content in [&b"\0\0\0\0\0\0\0\0"[..], b"one or two", b"\x1f\x8b\x08"] {
        for old in [false, true] {
            let mut fixture = Fixture::new();
            fixture.sink();
            if old {
                let mark = Mark::read(&fixture.mark).unwrap();
                fixture.mark = [7, mark.inode, mark.safe].map(u64::to_le_bytes).concat();
            }
            let other = fixture.path.with_extension("log.1");
            std::fs::rename(&fixture.path, &other).unwrap();
            std::fs::write(&other, content).unwrap();
            let mut sink = fixture.sink();
            push(&mut sink, &LINES);
            flush(&mut sink);
            assert_eq!(std::fs::read(&other).unwrap(), content);
            assert_eq!(fixture.text(), TEXT);
        }
    }
}

#[test]
fn a_mark_of_version_1_can_be_read() {
    for device in [0, 7] {
        for cut in 0..=TEXT.len() {
            let mut fixture = Fixture::new();
            let mut sink = fixture.sink();
            push(&mut sink, &["before"]);
            let mark = Mark::read(&flush(&mut sink)).unwrap();
            fixture.mark = [device, mark.inode, mark.safe].map(u64::to_le_bytes).concat();
            drop(sink);
            std::fs::write(&fixture.path, format!("before\n{}", &TEXT[..cut])).unwrap();
            let mut sink = fixture.sink();
            push(&mut sink, &LINES);
            flush(&mut sink);
            assert_eq!(fixture.text(), format!("before\n{TEXT}"), "cut at {cut}");
        }
    }
}

#[test]
fn a_copy_at_the_path_is_taken_for_the_file() {
    let mut fixture = Fixture::new();
    let mut sink = fixture.sink();
    push(&mut sink, &["before"]);
    fixture.mark = flush(&mut sink);
    drop(sink);
    let copy = fixture.path.with_extension("copy");
    std::fs::write(&copy, "before\none\ntw").unwrap();
    std::fs::rename(&copy, &fixture.path).unwrap();
    let mut sink = fixture.sink();
    push(&mut sink, &LINES);
    flush(&mut sink);
    assert_eq!(fixture.text(), format!("before\n{TEXT}"));
}

#[test]
fn a_new_line_never_continues_an_incomplete_one() {
    // The process was killed at any point after the end was recorded: this much was written behind
    // it.
    let written = format!("\n{TEXT}");
    for cut in 0..=written.len() {
        let mut fixture = Fixture::new();
        std::fs::write(&fixture.path, "half").unwrap();
        fixture.sink();
        std::fs::write(&fixture.path, format!("half{}", &written[..cut])).unwrap();
        let mut sink = fixture.sink();
        for line in LINES {
            push(&mut sink, &[line]);
            prepare(&mut sink, &mut fixture);
            fixture.mark = sink.flush(Position::default(), false).unwrap().unwrap().mark;
        }
        assert_eq!(fixture.text(), format!("half{written}"), "cut at {cut}");
    }
}

#[test]
fn a_file_that_is_truncated_or_replaced_within_a_line_gets_a_line_end_first() {
    let mut fixture = Fixture::new();
    let mut sink = fixture.sink();
    push(&mut sink, &LINES[..2]);
    flush(&mut sink);
    File::options().write(true).open(&fixture.path).unwrap().set_len(6).unwrap();
    push(&mut sink, &["three"]);
    fixture.mark = flush(&mut sink);
    assert_eq!(fixture.text(), "one\ntw\nthree\n");
    let copy = fixture.path.with_extension("copy");
    std::fs::write(&copy, "one\ntw").unwrap();
    std::fs::rename(&copy, &fixture.path).unwrap();
    push(&mut sink, &["four"]);
    fixture.mark = flush(&mut sink);
    drop(sink);
    assert_eq!(fixture.text(), "one\ntw\nfour\n");
    File::options().write(true).open(&fixture.path).unwrap().set_len(9).unwrap();
    let mut sink = fixture.sink();
    push(&mut sink, &["five"]);
    flush(&mut sink);
    assert_eq!(fixture.text(), "one\ntw\nfo\nfive\n");
}

#[test]
fn a_kill_after_another_process_wrote_repeats_nothing() {
    // Our lines, a line of the other process, and our lines again behind it, truncated anywhere.
    for ours in [0, 2, 4, 9, 17] {
        let theirs = format!("{}#tea", &TEXT[..ours]);
        let whole = TEXT[..ours].rfind('\n').map_or(0, |at| at + 1);
        let lines = TEXT[..whole].lines().count();
        let again = format!("\n{}", &TEXT[whole..]);
        for cut in 0..=again.len() {
            let mut fixture = Fixture::new();
            fixture.sink();
            std::fs::write(&fixture.path, &theirs).unwrap();
            let mut sink = fixture.sink();
            push(&mut sink, &LINES);
            prepare(&mut sink, &mut fixture);
            assert_eq!(fixture.lines as usize, lines);
            drop(sink);
            std::fs::write(&fixture.path, format!("{theirs}{}", &again[..cut])).unwrap();
            let mut sink = fixture.sink();
            for line in &LINES[lines..] {
                push(&mut sink, &[*line]);
                fixture.mark = flush(&mut sink);
            }
            assert_eq!(fixture.text(), format!("{theirs}{again}"), "{ours}, cut at {cut}");
        }
    }
}

#[test]
fn a_line_of_another_process_does_not_keep_us_in_a_renamed_file() {
    for is_removed in [false, true] {
        let mut fixture = Fixture::new();
        let mut sink = fixture.sink();
        push(&mut sink, &LINES[..2]);
        flush(&mut sink);
        let noted = format!("{}# a note\n", fixture.text());
        std::fs::write(&fixture.path, &noted).unwrap();
        let renamed = fixture.path.with_extension("log.1");
        std::fs::rename(&fixture.path, &renamed).unwrap();
        if is_removed {
            std::fs::remove_file(&renamed).unwrap();
        }
        push(&mut sink, &LINES[2..]);
        flush(&mut sink);
        assert_eq!(fixture.text(), "three\nfour\n");
        assert!(is_removed || std::fs::read_to_string(&renamed).unwrap() == noted);
    }
}

/// Returns a sink whose last write failed after that many bytes.
fn torn(fixture: &mut Fixture, cut: usize) -> FileSink {
    let mut sink = fixture.sink();
    push(&mut sink, &["before"]);
    fixture.mark = flush(&mut sink);
    push(&mut sink, &LINES);
    let open = sink.open.as_ref().unwrap();
    open.file.write_all_at(&TEXT.as_bytes()[..cut], open.written).unwrap();
    sink
}

#[test]
fn an_incomplete_write_in_a_renamed_file_is_truncated() {
    for cut in 0..=TEXT.len() {
        let mut fixture = Fixture::new();
        let mut sink = torn(&mut fixture, cut);
        let renamed = fixture.path.with_extension("log.1");
        std::fs::rename(&fixture.path, &renamed).unwrap();
        assert!(sink.prepare().unwrap().is_some());
        fixture.mark = flush(&mut sink);
        assert_eq!(std::fs::read_to_string(&renamed).unwrap(), "before\n", "cut at {cut}");
        assert_eq!(fixture.text(), TEXT, "cut at {cut}");
    }
}

#[test]
fn an_incomplete_write_in_a_removed_file_is_repeated_in_the_new_one() {
    for cut in 0..=TEXT.len() {
        let mut fixture = Fixture::new();
        let mut sink = torn(&mut fixture, cut);
        std::fs::remove_file(&fixture.path).unwrap();
        flush(&mut sink);
        assert_eq!(fixture.text(), TEXT, "cut at {cut}");
    }
}

/// Sets or clears a file's immutable flag (chattr(1)). Returns false if the file system or the user
/// cannot.
fn set_immutable(path: &Path, is_immutable: bool) -> bool {
    let flags = if is_immutable { IFlags::IMMUTABLE } else { IFlags::empty() };
    ioctl_setflags(File::open(path).unwrap(), flags).is_ok()
}

#[test]
#[expect(clippy::print_stderr, reason = "a skipped test is reported")]
fn a_renamed_file_that_cannot_be_written_does_not_stop_the_sink() {
    for torn in ["", "on"] {
        let mut fixture = Fixture::new();
        let mut sink = fixture.sink();
        push(&mut sink, &["before"]);
        fixture.mark = flush(&mut sink);
        drop(sink);
        let renamed = fixture.path.with_extension("log.1");
        std::fs::rename(&fixture.path, &renamed).unwrap();
        let text = format!("before\n{torn}");
        std::fs::write(&renamed, &text).unwrap();
        std::fs::set_permissions(&renamed, fs::Permissions::from_mode(0o440)).unwrap();
        let is_immutable = set_immutable(&renamed, true);
        if !is_immutable && File::options().write(true).open(&renamed).is_ok() {
            eprintln!("SKIPPED: root can write every file, and this file system has no immutable ones");
            return;
        }
        let mut sink = fixture.sink();
        push(&mut sink, &LINES);
        flush(&mut sink);
        assert_eq!(std::fs::read_to_string(&renamed).unwrap(), text);
        assert!(!is_immutable || set_immutable(&renamed, false));
        assert_eq!(fixture.text(), TEXT);
    }
}

#[test]
fn a_file_that_another_sink_writes_is_refused() {
    let mut fixture = Fixture::new();
    let mut first = fixture.sink();
    let mut second = FileSink::new(fixture.options(), (None, None), Arc::new(|| 0));
    let last = Resume { position: Position::default(), mark: Vec::new() };
    let error = second.resume(&last).unwrap_err().to_string();
    assert!(error.contains("another process or another sink"), "{error}");
    push(&mut first, &LINES);
    flush(&mut first);
    drop(first);
    second.resume(&last).unwrap();
    push(&mut second, &["five"]);
    flush(&mut second);
    assert_eq!(fixture.text(), format!("{TEXT}five\n"));
}
