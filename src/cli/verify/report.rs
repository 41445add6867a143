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
    output: Output,
    /// Files that the daemon may be writing to, or may remove.
    live: &'a [PathBuf],
    out: &'a mut dyn Write,
    progress: Progress,
    total: Sum,
    by_file: Vec<FileSum>,
    left_out: Vec<Remark>,
    /// Number of these that are whole files.
    files_left_out: usize,
    unreadable: Vec<Remark>,
    has_findings: bool,
    /// With [`Output::OnlyFailure`], the first lines of what would have been printed.
    first: Vec<String>,
}

/// What is printed, apart from a failure of the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    /// Findings as they come, and the counts.
    Text,
    /// The same as JSON.
    Json,
    /// Nothing; the failure has the first findings.
    OnlyFailure,
}

/// Maximum number of lines that a failure has with [`Output::OnlyFailure`].
const MAX_FIRST: usize = 10;

/// Result of all files.
pub(super) struct Outcome {
    pub(super) counts: Counts,
    /// Number of files that could not be read.
    pub(super) unreadable: usize,
    /// With [`Output::OnlyFailure`], the counts and the first findings, a line each.
    pub(super) details: Vec<String>,
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
    /// Creates an empty report on these files, of which the daemon may be writing to the `live`
    /// ones. `read` counts the bytes that were read.
    pub(super) fn new(
        files: &'a [PathBuf],
        live: &'a [PathBuf],
        keys: &'a Keys,
        output: Output,
        read: Arc<AtomicU64>,
        out: &'a mut dyn Write,
    ) -> Self {
        Self {
            files,
            keys,
            output,
            live,
            out,
            progress: Progress::new(files, read, output),
            total: Sum::default(),
            by_file: files.iter().map(|_| FileSum { kind: None, sum: Sum::default() }).collect(),
            left_out: Vec::new(),
            files_left_out: 0,
            unreadable: Vec::new(),
            has_findings: false,
            first: Vec::new(),
        }
    }

    /// Records something that is not checked although it is in a directory that was named.
    pub(super) fn left_out(&mut self, path: &Path, reason: &str) {
        self.files_left_out += 1;
        self.not_checked(path, reason.to_owned());
    }

    fn not_checked(&mut self, path: &Path, reason: String) {
        let remark = Remark { file: path.display().to_string(), reason };
        if self.output != Output::OnlyFailure {
            self.progress.remark(&format!("left out {}: {}", remark.file, remark.reason));
        }
        self.left_out.push(remark);
    }

    /// Records something that cannot be read.
    pub(super) fn unreadable(&mut self, path: &Path, reason: String) {
        let remark = Remark { file: path.display().to_string(), reason };
        let text = format!("cannot read {}: {}", remark.file, remark.reason);
        if self.output == Output::OnlyFailure {
            self.keep_first(text);
        } else {
            self.progress.remark(&text);
        }
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
        let is_live = self.live.contains(path);
        match news {
            News::Opened { kind, quarantined } => {
                file.kind = Some(kind);
                if quarantined > 0 {
                    let reason = format!("{quarantined} lines in its table `quarantine`");
                    self.not_checked(path, reason);
                }
            }
            News::JudgedBlock(mut judged) => {
                if is_live {
                    // The daemon may be about to write the rest of it.
                    judged.findings.retain(|finding| finding.verdict != Verdict::Torn);
                    judged.counts.torn = 0;
                }
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
            News::Fault(Fault::Unreadable(_)) if is_live && !path.exists() => {
                self.left_out(path, "it was compressed, renamed or removed meanwhile");
            }
            News::Fault(Fault::Unreadable(reason)) => self.unreadable(path, reason),
            News::Ended => {}
        }
        Ok(())
    }

    fn finding(&mut self, path: &Path, finding: &Finding) -> io::Result<()> {
        let file = path.display().to_string();
        let Finding { line, verdict, reason } = finding;
        let plain = || format!("{}:{line}: {}: {}", escape(&file), verdict.as_str(), escape(reason));
        let text = match self.output {
            Output::Text => plain() + "\n",
            Output::Json => {
                let lead = if self.has_findings { "," } else { "{\"findings\":[" };
                let finding = JsonFinding { file: &file, line: *line, verdict: *verdict, reason };
                format!("{lead}\n{}", escape_json(&serde_json::to_string(&finding)?))
            }
            Output::OnlyFailure => {
                self.keep_first(plain());
                return Ok(());
            }
        };
        self.has_findings = true;
        let out = &mut *self.out;
        self.progress.suspend(|| out.write_all(text.as_bytes()))
    }

    /// Keeps a line for the failure, up to a limit.
    fn keep_first(&mut self, line: String) {
        if self.first.len() < MAX_FIRST {
            self.first.push(line);
        }
    }

    /// Writes the end of the report.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn end(self) -> io::Result<Outcome> {
        self.progress.bar.finish_and_clear();
        let counts = self.total.counts;
        let mut details = Vec::new();
        if self.output == Output::Json {
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
            let totals = totals(counts, self.files_left_out as u64);
            if self.output == Output::Text {
                writeln!(self.out, "{totals}")?;
            } else {
                let lines = self.first.len() as u64;
                let more = (counts.findings() + self.unreadable.len() as u64).saturating_sub(lines);
                details = self.first;
                if more > 0 {
                    details.push(format!("and {more} more; without --quiet, all of them are printed"));
                }
                details.push(totals);
            }
        }
        Ok(Outcome { counts, unreadable: self.unreadable.len(), details })
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

/// Returns the counts as one line.
fn totals(counts: Counts, left_out: u64) -> String {
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
        skipped,
    } = counts;
    let mut text = format!("good {good}, bad {bad}, unsigned {unsigned}, malformed {malformed}");
    for (name, count) in [
        ("good in quarantine", good_in_quarantine),
        ("good unverified", good_unverified),
        ("torn", torn),
        ("damaged", damaged),
        ("outside the time asked for", outside),
        ("quarantined and skipped", skipped),
        ("left out", left_out),
    ] {
        if count > 0 {
            text.push_str(&format!(", {name} {count}"));
        }
    }
    text
}

/// A bar on the terminal, when both outputs are one and the files' sizes are known.
struct Progress {
    bar: ProgressBar,
    read: Arc<AtomicU64>,
}

impl Progress {
    fn new(files: &[PathBuf], read: Arc<AtomicU64>, output: Output) -> Self {
        let size = |path: &PathBuf| Some(path.metadata().ok().filter(std::fs::Metadata::is_file)?.len());
        let sizes: Option<u64> = files.iter().map(size).sum();
        let wanted =
            output != Output::OnlyFailure && io::stdout().is_terminal() && io::stderr().is_terminal();
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
