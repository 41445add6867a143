use std::fs;
use std::io::Write as _;
use std::path::Path;

use proptest::prelude::*;

use super::super::InputLine;
use super::*;

/// An input on a directory, and what it has handed out.
struct Fixture {
    dir: tempfile::TempDir,
    options: FollowOptions,
    follow: Follow,
    checkpoint: Option<Vec<u8>>,
    lines: Vec<String>,
}

impl Fixture {
    fn new(path: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = FollowOptions { quiet: Duration::ZERO, ..FollowOptions::new(dir.path().join(path)) };
        let follow = Follow::new(options.clone());
        Self { dir, options, follow, checkpoint: None, lines: Vec::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn append(&self, name: &str, text: &str) {
        let mut file = fs::File::options().append(true).create(true).open(self.path(name)).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    fn rename(&self, from: &str, to: &str) {
        fs::rename(self.path(from), self.path(to)).unwrap();
    }

    /// Starts again from the last checkpoint.
    fn restart(&mut self) {
        self.follow = Follow::new(self.options.clone());
        self.follow.resume(self.checkpoint.as_deref()).unwrap();
    }

    /// Reads one chunk. Returns whether there was anything.
    fn read_some(&mut self) -> bool {
        let chunk = self.follow.read(Duration::ZERO).unwrap();
        let text = |line: &InputLine| String::from_utf8(line.bytes.clone()).unwrap();
        self.lines.extend(chunk.lines.iter().map(text));
        let is_new = chunk.checkpoint.is_some();
        self.checkpoint = chunk.checkpoint.or(self.checkpoint.take());
        is_new
    }

    /// Reads until nothing is new, and returns the lines since the last call.
    fn read(&mut self) -> Vec<String> {
        while self.read_some() {}
        std::mem::take(&mut self.lines)
    }
}

fn gzip(path: &Path) {
    let packed = crate::wire::batch::encode(&fs::read(path).unwrap()).unwrap();
    let modified = fs::metadata(path).unwrap().modified().unwrap();
    let mut name = path.as_os_str().to_owned();
    name.push(".gz");
    fs::write(&name, packed).unwrap();
    fs::File::options().write(true).open(&name).unwrap().set_modified(modified).unwrap();
    fs::remove_file(path).unwrap();
}

#[test]
fn lines_are_read_as_they_are_appended_and_only_when_they_are_whole() {
    let mut it = Fixture::new("app.log");
    assert_eq!(it.read(), [""; 0]);
    it.append("app.log", "one\ntwo\r\nthr");
    assert_eq!(it.read(), ["one", "two"]);
    it.append("app.log", "ee\n");
    it.restart();
    assert_eq!(it.read(), ["three"]);
    it.restart();
    assert_eq!(it.read(), [""; 0]);
}

#[test]
fn lines_know_their_file_and_number() {
    let mut it = Fixture::new("app.log");
    it.append("app.log", "one\n\ntwo\n");
    let chunk = it.follow.read(Duration::ZERO).unwrap();
    let numbers: Vec<u64> = chunk.lines.iter().map(|line| line.origin.line).collect();
    assert_eq!(numbers, [1, 2, 3]);
    assert!(chunk.lines[0].origin.file.ends_with("/app.log"));
    it.append("app.log", "three\n");
    assert_eq!(it.follow.read(Duration::ZERO).unwrap().lines[0].origin.line, 4);
}

#[test]
fn a_renamed_file_is_read_to_its_end_before_the_new_one() {
    for is_restarted in [false, true] {
        let mut it = Fixture::new("app.log");
        it.append("app.log", "head\na1\n");
        it.read();
        it.append("app.log", "a2\n");
        it.rename("app.log", "app.log.1");
        // A writer that still has the old file open.
        it.append("app.log.1", "a3\n");
        it.append("app.log", "head\nb1\n");
        if is_restarted {
            it.restart();
        }
        assert_eq!(it.read(), ["a2", "a3", "head", "b1"]);
        it.append("app.log.1", "a4");
        it.append("app.log", "b2\n");
        assert_eq!(it.read(), ["a4", "b2"]);
    }
}

#[test]
fn several_rotations_without_a_reader_are_read_in_order() {
    for is_compressed in [false, true] {
        let mut it = Fixture::new("app.log");
        it.append("app.log", "head\na1\n");
        it.read();
        it.append("app.log", "a2\n");
        for generation in ["b", "c", "d"] {
            for number in (1..4).rev().filter(|number| it.path(&format!("app.log.{number}")).exists()) {
                it.rename(&format!("app.log.{number}"), &format!("app.log.{}", number + 1));
            }
            it.rename("app.log", "app.log.1");
            // File systems round times.
            std::thread::sleep(Duration::from_millis(12));
            it.append("app.log", &format!("head\n{generation}1\n"));
        }
        if is_compressed {
            gzip(&it.path("app.log.3"));
            gzip(&it.path("app.log.2"));
        }
        it.restart();
        assert_eq!(it.read(), ["a2", "head", "b1", "head", "c1", "head", "d1"]);
        it.restart();
        assert_eq!(it.read(), [""; 0]);
    }
}

#[test]
fn a_copy_that_is_made_before_truncation_continues_the_file() {
    for is_restarted in [false, true] {
        let mut it = Fixture::new("app.log");
        it.append("app.log", "a1\n");
        it.read();
        it.append("app.log", "a2\n");
        fs::copy(it.path("app.log"), it.path("app.log.1")).unwrap();
        let mut lines = Vec::new();
        if is_restarted {
            it.restart();
        } else {
            // The copy is there, and the original is not truncated yet.
            lines = it.read();
        }
        fs::write(it.path("app.log"), "").unwrap();
        it.append("app.log", "b1\nb2\nb3\n");
        lines.extend(it.read());
        assert_eq!(lines, ["a2", "b1", "b2", "b3"]);
    }
}

#[test]
fn a_truncated_file_begins_again() {
    let mut it = Fixture::new("app.log");
    it.append("app.log", "a1\na2\n");
    it.read();
    fs::write(it.path("app.log"), "b1\n").unwrap();
    assert_eq!(it.read(), ["b1"]);
    // Longer than before at once, with the same inode.
    fs::write(it.path("app.log"), "c1\nc2\nc3\n").unwrap();
    assert_eq!(it.read(), ["c1", "c2", "c3"]);
}

#[test]
fn an_inode_of_another_file_does_not_mislead() {
    let mut it = Fixture::new("app.log");
    it.append("app.log", "a1\n");
    it.read();
    let mut state: State = serde_json::from_slice(&it.checkpoint.clone().unwrap()).unwrap();
    it.rename("app.log", "app.log.1");
    it.append("app.log.1", "a2\n");
    it.append("app.log", "b1\nb2\n");
    use std::os::unix::fs::MetadataExt as _;
    state.files[0].id.1 = fs::metadata(it.path("app.log")).unwrap().ino();
    it.checkpoint = Some(serde_json::to_vec(&state).unwrap());
    it.restart();
    assert_eq!(it.read(), ["a2", "b1", "b2"]);
}

#[test]
fn a_file_that_is_removed_while_it_is_open_is_read_to_its_end() {
    let mut it = Fixture::new("app.log");
    it.append("app.log", "a1\n");
    it.read();
    it.append("app.log", "a2\na3");
    fs::remove_file(it.path("app.log")).unwrap();
    assert_eq!(it.read(), ["a2", "a3"]);
    it.append("app.log", "b1\n");
    assert_eq!(it.read(), ["b1"]);
}

#[test]
fn old_generations_are_not_read_at_the_first_start() {
    let mut it = Fixture::new("app.log");
    it.append("app.log.1", "old\n");
    it.append("app.log", "new\n");
    it.append("app-other.log", "other\n");
    assert_eq!(it.read(), ["new"]);
    gzip(&it.path("app.log.1"));
    it.restart();
    assert_eq!(it.read(), [""; 0]);
}

#[test]
fn the_first_start_can_be_at_the_end() {
    let mut it = Fixture::new("app.log");
    it.append("app.log", "old\nhalf");
    it.options.from_end = true;
    it.restart();
    assert_eq!(it.read(), [""; 0]);
    it.append("app.log", " a line\nnew\n");
    it.restart();
    assert_eq!(it.read(), ["new"]);
    // A file that appears later is new.
    it.rename("app.log", "app.log.1");
    it.append("app.log", "b1\n");
    assert_eq!(it.read(), ["b1"]);
}

#[test]
fn a_directory_and_a_pattern_are_all_their_files() {
    for path in ["", "*.log"] {
        let mut it = Fixture::new(path);
        it.append("a.log", "a1\n");
        it.append(".hidden.log", "h\n");
        it.append("c.log.gz", "packed\n");
        assert_eq!(it.read(), ["a1"]);
        it.append("b.log", "b1\n");
        it.append("a.log", "a2\n");
        it.rename("a.log", "renamed.log");
        let mut lines = it.read();
        lines.sort_unstable();
        assert_eq!(lines, ["a2", "b1"]);
        fs::remove_file(it.path("b.log")).unwrap();
        it.read();
        let state: State = serde_json::from_slice(&it.checkpoint.clone().unwrap()).unwrap();
        assert!(state.files.iter().all(|known| !known.path.ends_with("b.log")));
    }
}

#[test]
fn a_line_that_is_too_long_is_handed_over_by_its_beginning() {
    let mut it = Fixture::new("app.log");
    it.options.limits.line = 10;
    it.restart();
    it.append("app.log", "a1\n0123456789\n0123456789a\n");
    assert_eq!(it.read(), ["a1", "0123456789", "0123456789"]);
    it.append("app.log", &"x".repeat(300_000));
    assert_eq!(it.read(), ["xxxxxxxxxx"]);
    it.restart();
    it.append("app.log", &"x".repeat(300_000));
    it.append("app.log", "\na2\n");
    let chunk = it.follow.read(Duration::ZERO).unwrap();
    assert_eq!(chunk.lines.iter().map(|line| line.origin.line).collect::<Vec<_>>(), [5]);
    assert!(!chunk.lines[0].is_truncated);
}

#[test]
fn a_symbolic_link_is_followed_to_its_new_target() {
    let mut it = Fixture::new("app.log");
    it.append("one", "a1\n");
    std::os::unix::fs::symlink(it.path("one"), it.path("app.log")).unwrap();
    assert_eq!(it.read(), ["a1"]);
    it.append("one", "a2\n");
    it.append("two", "b1\n");
    fs::remove_file(it.path("app.log")).unwrap();
    std::os::unix::fs::symlink(it.path("two"), it.path("app.log")).unwrap();
    assert_eq!(it.read(), ["a2", "b1"]);
}

#[test]
fn an_input_until_the_end_takes_the_last_line_without_a_terminator() {
    let mut it = Fixture::new("app.log");
    it.options.until_end = true;
    it.restart();
    it.append("app.log", "a1\na2");
    assert_eq!(it.read(), ["a1", "a2"]);
    assert!(it.follow.is_at_end());
}

#[test]
fn a_file_that_cannot_be_read_does_not_hinder_the_others() {
    let mut it = Fixture::new("");
    std::os::unix::fs::symlink("/proc/self/mem", it.path("bad.log")).unwrap();
    it.append("good.log", "a1\n");
    let chunk = it.follow.read(Duration::ZERO).unwrap();
    assert_eq!(chunk.lines.len(), 1);
}

#[test]
fn a_file_that_cannot_be_opened_for_a_time_is_not_read_again() {
    for is_restarted in [false, true] {
        let mut it = Fixture::new("app.log");
        it.append("app.log", "a1\n");
        it.read();
        it.rename("app.log", "elsewhere");
        // Not even root can open a link to itself.
        std::os::unix::fs::symlink("app.log", it.path("app.log")).unwrap();
        if is_restarted {
            it.restart();
        }
        let error = it.follow.read(Duration::ZERO).unwrap_err();
        assert!(error.to_string().contains("app.log: "), "{error}");
        fs::remove_file(it.path("app.log")).unwrap();
        it.rename("elsewhere", "app.log");
        it.append("app.log", "a2\n");
        assert_eq!(it.read(), ["a2"]);
    }
}

#[test]
fn a_disk_that_is_mounted_later_brings_the_files_back() {
    for path in ["logs/app.log", "logs"] {
        let mut it = Fixture::new(path);
        fs::create_dir(it.path("logs")).unwrap();
        it.append("logs/app.log", "a1\n");
        it.append("logs/app.log.1", "old\n");
        it.read();
        it.rename("logs", "elsewhere");
        it.restart();
        assert_eq!(it.read(), [""; 0]);
        fs::create_dir(it.path("logs")).unwrap();
        assert_eq!(it.read(), [""; 0]);
        fs::remove_dir(it.path("logs")).unwrap();
        it.restart();
        it.rename("elsewhere", "logs");
        it.append("logs/app.log", "a2\n");
        assert_eq!(it.read(), ["a2"], "{path}");
    }
}

/// A step of the writer, of a rotation, or of the reader.
#[derive(Clone, Debug)]
enum Step {
    Append(u8),
    Rename,
    CopyAndTruncate,
    Compress,
    Read,
    Restart,
    Crash,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1..30u8).prop_map(Step::Append),
        1 => Just(Step::Rename),
        1 => Just(Step::CopyAndTruncate),
        1 => Just(Step::Compress),
        3 => Just(Step::Read),
        1 => Just(Step::Restart),
        1 => Just(Step::Crash),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn every_line_is_read_once_and_in_order(steps in prop::collection::vec(step(), 1..40)) {
        let mut it = Fixture::new("app.log");
        it.options.limits.lines = 7;
        it.restart();
        it.read();
        let (mut written, mut read) = (Vec::new(), Vec::new());
        let mut rotations = 0;
        for step in steps {
            match step {
                Step::Append(count) => {
                    // The same first line in each generation, and lines of the same length.
                    if !it.path("app.log").exists() || fs::metadata(it.path("app.log")).unwrap().len() == 0 {
                        it.append("app.log", &format!("# {rotations:05} {}\n", "-".repeat(2000)));
                        written.push(format!("# {rotations:05} {}", "-".repeat(2000)));
                    }
                    for _ in 0..count {
                        let line = format!("line {:06}", written.len());
                        it.append("app.log", &format!("{line}\n"));
                        written.push(line);
                    }
                }
                Step::Rename | Step::CopyAndTruncate if !it.path("app.log").exists() => {}
                Step::Rename | Step::CopyAndTruncate => {
                    // The order of generations is that of their times, which file systems round.
                    std::thread::sleep(Duration::from_millis(12));
                    rotations += 1;
                    let name = format!("app.log-{rotations:05}");
                    if matches!(step, Step::Rename) {
                        it.rename("app.log", &name);
                    } else {
                        fs::copy(it.path("app.log"), it.path(&name)).unwrap();
                        fs::write(it.path("app.log"), "").unwrap();
                    }
                }
                Step::Compress => {
                    let name = it.path(&format!("app.log-{rotations:05}"));
                    if name.exists() {
                        gzip(&name);
                    }
                }
                Step::Read => {
                    it.read_some();
                    read.append(&mut it.lines);
                }
                Step::Restart => it.restart(),
                Step::Crash => {
                    // What was read and not committed is read again.
                    let _ = it.follow.read(Duration::ZERO).unwrap();
                    it.restart();
                }
            }
        }
        read.extend(it.read());
        let shown = |lines: &[String]| -> Vec<String> { lines.iter().map(|line| line[..line.len().min(12)].to_owned()).collect() };
        prop_assert_eq!(shown(&read), shown(&written));
    }
}

#[test]
fn files_that_change_while_they_are_looked_at_are_read_once() {
    let mut it = Fixture::new("app.log");
    it.read();
    let (dir, is_done) = (it.dir.path().to_owned(), std::sync::atomic::AtomicBool::new(false));
    let (written, mut read) = std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            let (mut written, path) = (0, dir.join("app.log"));
            for rotation in 0..400 {
                for _ in 0..7 {
                    let mut file = fs::File::options().append(true).create(true).open(&path).unwrap();
                    writeln!(file, "line {written:06}").unwrap();
                    written += 1;
                }
                let rotated = dir.join(format!("app.log-{rotation:05}"));
                match rotation % 3 {
                    0 => fs::rename(&path, &rotated).unwrap(),
                    1 => {
                        fs::copy(&path, &rotated).unwrap();
                        fs::File::create(&path).unwrap();
                    }
                    _ => {}
                }
            }
            is_done.store(true, std::sync::atomic::Ordering::SeqCst);
            written
        });
        let mut read = Vec::new();
        while !is_done.load(std::sync::atomic::Ordering::SeqCst) {
            it.read_some();
            read.append(&mut it.lines);
        }
        read.extend(it.read());
        (writing.join().unwrap(), read)
    });
    read.sort_unstable();
    let expected: Vec<String> = (0..written).map(|number| format!("line {number:06}")).collect();
    let missing: Vec<_> = expected.iter().filter(|line| read.binary_search(line).is_err()).collect();
    assert!(missing.is_empty(), "{missing:?}");
    assert!(read == expected, "{} lines of {written}", read.len());
}
