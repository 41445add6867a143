//! Output of `auditgate verify`: findings as they come, and the totals at the end.

use std::io::{self, IsTerminal as _, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::escape::{escape, escape_json};
use crate::verify::judge::{Counts, Finding, JudgedBlock, Keys, Verdict, joined};
use crate::verify::read::{Fault, Kind};
use crate::verify::run::News;
use crate::wire::record::time_stamp;

/// Writes the report. Findings are not kept, so that a file of bad lines does not fill the memory.
pub(super) struct Report<'a> {
    files: &'a [PathBuf],
    keys: &'a Keys,
    json: bool,
    out: &'a mut dyn Write,
    progress: Progress,
    total: Sum,
    by_file: Vec<FileSum>,
    left_out: Vec<Remark>,
    /// Number of these that are whole files.
    files_left_out: usize,
    unreadable: Vec<Remark>,
    has_findings: bool,
}

/// Counts of one file or of all.
#[derive(Default)]
struct Sum {
    counts: Counts,
    by_key: Vec<u64>,
    times: Option<(i64, i64)>,
}

impl Sum {
    fn add(&mut self, judged: &JudgedBlock) {
        self.counts += judged.counts;
        self.times = joined(self.times, judged.times);
        self.by_key.resize(self.by_key.len().max(judged.by_key.len()), 0);
        for (sum, more) in self.by_key.iter_mut().zip(&judged.by_key) {
            *sum += more;
        }
    }
}

struct FileSum {
    kind: Option<Kind>,
    sum: Sum,
}

/// A finding in the JSON report.
#[derive(Serialize)]
struct JsonFinding<'a> {
    file: &'a str,
    line: u64,
    verdict: Verdict,
    reason: &'a str,
}

#[derive(Clone, Serialize)]
struct Remark {
    file: String,
    reason: String,
}

#[derive(Serialize)]
struct JsonSum<'a> {
    #[serde(flatten)]
    counts: Counts,
    first: Option<String>,
    last: Option<String>,
    keys: Vec<JsonKey<'a>>,
}

#[derive(Serialize)]
struct JsonKey<'a> {
    kid: &'a str,
    thumbprint: &'a str,
    good: u64,
}

#[derive(Serialize)]
struct JsonFile<'a> {
    file: String,
    kind: Option<&'static str>,
    #[serde(flatten)]
    sum: JsonSum<'a>,
}

#[derive(Serialize)]
struct JsonEnd<'a> {
    #[serde(flatten)]
    total: JsonSum<'a>,
    files: Vec<JsonFile<'a>>,
    left_out: &'a [Remark],
    unreadable: &'a [Remark],
}

impl<'a> Report<'a> {
    /// Creates an empty report on these files. `read` counts the bytes that were read.
    pub(super) fn new(
        files: &'a [PathBuf],
        keys: &'a Keys,
        json: bool,
        read: Arc<AtomicU64>,
        out: &'a mut dyn Write,
    ) -> Self {
        Self {
            files,
            keys,
            json,
            out,
            progress: Progress::new(files, read),
            total: Sum::default(),
            by_file: files.iter().map(|_| FileSum { kind: None, sum: Sum::default() }).collect(),
            left_out: Vec::new(),
            files_left_out: 0,
            unreadable: Vec::new(),
            has_findings: false,
        }
    }

    /// Records something that is not checked although it is in a directory that was named.
    pub(super) fn left_out(&mut self, path: &Path, reason: &str) {
        self.files_left_out += 1;
        self.not_checked(path, reason.to_owned());
    }

    fn not_checked(&mut self, path: &Path, reason: String) {
        let remark = Remark { file: path.display().to_string(), reason };
        self.progress.remark(&format!("left out {}: {}", remark.file, remark.reason));
        self.left_out.push(remark);
    }

    /// Records something that cannot be read.
    pub(super) fn unreadable(&mut self, path: &Path, reason: String) {
        let remark = Remark { file: path.display().to_string(), reason };
        self.progress.remark(&format!("cannot read {}: {}", remark.file, remark.reason));
        self.unreadable.push(remark);
    }

    /// Adds news about a file.
    ///
    /// # Errors
    /// When the report cannot be written.
    pub(super) fn news(&mut self, index: usize, news: News) -> io::Result<()> {
        let (Some(path), Some(file)) = (self.files.get(index), self.by_file.get_mut(index)) else {
            return Ok(());
        };
        self.progress.advance();
        match news {
            News::Opened { kind, quarantined } => {
                file.kind = Some(kind);
                if quarantined > 0 {
                    let reason = format!("{quarantined} lines in its table `quarantine`");
                    self.not_checked(path, reason);
                }
            }
            News::JudgedBlock(judged) => {
                file.sum.add(&judged);
                self.total.add(&judged);
                for finding in judged.findings {
                    self.finding(path, &finding)?;
                }
            }
            News::Fault(Fault::Finding(finding)) => {
                file.sum.counts.count(finding.verdict);
                self.total.counts.count(finding.verdict);
                self.finding(path, &finding)?;
            }
            News::Fault(Fault::Unreadable(reason)) => self.unreadable(path, reason),
            News::Ended => {}
        }
        Ok(())
    }

    fn finding(&mut self, path: &Path, finding: &Finding) -> io::Result<()> {
        let file = path.display().to_string();
        let Finding { line, verdict, reason } = finding;
        let text = if self.json {
            let lead = if self.has_findings { "," } else { "{\"findings\":[" };
            let finding = JsonFinding { file: &file, line: *line, verdict: *verdict, reason };
            format!("{lead}\n{}", escape_json(&serde_json::to_string(&finding)?))
        } else {
            format!("{}:{line}: {}: {}\n", escape(&file), verdict.as_str(), escape(reason))
        };
        self.has_findings = true;
        let out = &mut *self.out;
        self.progress.suspend(|| out.write_all(text.as_bytes()))
    }

    /// Writes the end of the report. Returns the totals and the number of files that could not be
    /// read.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn end(self) -> io::Result<(Counts, usize)> {
        self.progress.bar.finish_and_clear();
        let counts = self.total.counts;
        if self.json {
            let end = JsonEnd {
                total: self.sum(&self.total),
                files: self
                    .files
                    .iter()
                    .zip(&self.by_file)
                    .map(|(path, file)| self.file(path, file))
                    .collect(),
                left_out: &self.left_out,
                unreadable: &self.unreadable,
            };
            let text = serde_json::to_string(&end)?;
            let text = escape_json(&text);
            let lead = if self.has_findings { "\n]," } else { "{\"findings\":[]," };
            writeln!(self.out, "{lead}{}", text.strip_prefix('{').unwrap_or(&text))?;
        } else {
            let Counts {
                good,
                good_in_quarantine,
                good_unverified,
                bad,
                unsigned,
                malformed,
                torn,
                damaged,
                outside,
            } = counts;
            write!(self.out, "good {good}, bad {bad}, unsigned {unsigned}, malformed {malformed}")?;
            let left_out = self.files_left_out as u64;
            for (name, count) in [
                ("good in quarantine", good_in_quarantine),
                ("good unverified", good_unverified),
                ("torn", torn),
                ("damaged", damaged),
                ("outside the time asked for", outside),
                ("left out", left_out),
            ] {
                if count > 0 {
                    write!(self.out, ", {name} {count}")?;
                }
            }
            writeln!(self.out)?;
        }
        Ok((counts, self.unreadable.len()))
    }

    fn file(&self, path: &Path, file: &FileSum) -> JsonFile<'_> {
        JsonFile {
            file: path.display().to_string(),
            kind: file.kind.map(Kind::as_str),
            sum: self.sum(&file.sum),
        }
    }

    fn sum(&self, sum: &Sum) -> JsonSum<'_> {
        let keys = self.keys.keys().iter().enumerate().map(|(index, key)| JsonKey {
            kid: key.ids.first().map_or("", String::as_str),
            thumbprint: &key.thumbprint,
            good: sum.by_key.get(index).copied().unwrap_or_default(),
        });
        JsonSum {
            counts: sum.counts,
            first: sum.times.map(|(first, _)| time_stamp(first)),
            last: sum.times.map(|(_, last)| time_stamp(last)),
            keys: keys.collect(),
        }
    }
}

/// A bar on the terminal, when both outputs are one and the files' sizes are known.
struct Progress {
    bar: ProgressBar,
    read: Arc<AtomicU64>,
}

impl Progress {
    fn new(files: &[PathBuf], read: Arc<AtomicU64>) -> Self {
        let size = |path: &PathBuf| Some(path.metadata().ok().filter(std::fs::Metadata::is_file)?.len());
        let sizes: Option<u64> = files.iter().map(size).sum();
        let wanted = io::stdout().is_terminal() && io::stderr().is_terminal();
        let bar = match sizes.filter(|_| wanted) {
            Some(bytes) => ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::stderr_with_hz(5)),
            None => ProgressBar::hidden(),
        };
        if let Ok(style) =
            ProgressStyle::with_template("{bar:40} {percent:>3}% {binary_bytes_per_sec} {eta} left")
        {
            bar.set_style(style);
        }
        Self { bar, read }
    }

    fn advance(&self) {
        self.bar.set_position(self.read.load(Ordering::Relaxed));
    }

    /// Runs `write` while the bar is hidden.
    fn suspend<T>(&self, write: impl FnOnce() -> T) -> T {
        self.bar.suspend(write)
    }

    fn remark(&self, text: &str) {
        // When stderr is closed, the report itself still lists the remark.
        let _ = self.suspend(|| writeln!(io::stderr(), "auditgate: {}", escape(text)));
    }
}
