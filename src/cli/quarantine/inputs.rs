//! Where quarantined lines are: the sinks of the configuration, or files that are named.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::super::config_file::ConfigFile;
use super::super::exit::Failure;
use super::Problems;
use crate::config::{Config, Secrets, SinkKind};
use crate::deliver::file::{Rendering, rotated_at};
use crate::escape::escape;
use crate::verify::find::{find, of_sink};
use crate::wire::event::Stream;

/// The arguments that name inputs.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct InputArgs {
    #[command(flatten)]
    pub(super) config: ConfigFile,

    /// Only the sink of this name
    #[arg(long, value_name = "NAME", conflicts_with = "files")]
    pub(super) sink: Option<String>,

    /// Files instead of the sinks of the configuration: JSON lines, compressed or not, and databases
    /// of SQLite sinks; of a directory, those in it and below it
    #[arg(value_name = "FILE|DIRECTORY")]
    pub(super) files: Vec<PathBuf>,
}

/// A file with quarantined lines, among others perhaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Input {
    pub(super) path: PathBuf,
    pub(super) role: Role,
    /// The sink that it belongs to, as far as the configuration says.
    pub(super) sink: Option<Rc<str>>,
}

/// What a file is for the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The daemon has rotated it, and writes no more to it.
    Rotated,
    /// The daemon writes to it, or may do so.
    Current,
    /// Another program has renamed it. The daemon may still finish a line in it.
    Renamed,
    /// A database, or a file that was named: what it is shows when it is read.
    Unknown,
}

/// All inputs, in the order of sinks and of time.
pub(super) struct Inputs(pub(super) Vec<Input>);

impl Inputs {
    /// Finds the inputs. What cannot be read is told to `problems`.
    ///
    /// # Errors
    /// 78 for the configuration, and where no sink of it has quarantined lines; 2 for a sink that
    /// there is not.
    pub(super) fn find(args: &InputArgs, problems: &mut Problems) -> Result<Self, Failure> {
        if args.files.is_empty() {
            return of_sinks(&args.config.load(Secrets::SkipMissing)?, args.sink.as_deref(), problems);
        }
        let found = find(&args.files);
        for (path, error) in &found.unreadable {
            problems.add(format!("cannot read {}: {error}", path.display()));
        }
        Ok(Self(found.files.into_iter().map(named).collect()))
    }

    /// Refuses inputs of several sinks: each may have the same lines.
    ///
    /// # Errors
    /// 2 when there are.
    pub(super) fn of_one_sink(self) -> Result<Self, Failure> {
        let mut sinks: Vec<&str> = self.0.iter().filter_map(|input| input.sink.as_deref()).collect();
        sinks.dedup();
        match sinks[..] {
            [] | [_] => Ok(self),
            _ => Err(Failure::usage(format!(
                "several sinks take the stream `quarantine` and may have the same lines; choose one with --sink: {}",
                sinks.join(", ")
            ))),
        }
    }

    /// Returns whether they belong to more than one sink.
    pub(super) fn are_of_several_sinks(&self) -> bool {
        self.0.windows(2).any(|pair| pair[0].sink != pair[1].sink)
    }
}

fn named(path: PathBuf) -> Input {
    let is_rotated =
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| rotated_at(name).is_some());
    Input { path, role: if is_rotated { Role::Rotated } else { Role::Unknown }, sink: None }
}

fn of_sinks(config: &Config, wanted: Option<&str>, problems: &mut Problems) -> Result<Inputs, Failure> {
    let mut inputs = Vec::new();
    let mut known: Vec<&str> = Vec::new();
    for (name, sink) in &config.sinks {
        if !sink.streams.contains(&Stream::Quarantine) {
            continue;
        }
        let path = match &sink.kind {
            SinkKind::File(options) if options.format == Rendering::Json => &options.path,
            SinkKind::Sqlite(options) => &options.path,
            SinkKind::File(_) => {
                if wanted.is_none() {
                    remark(&format!("sink `{name}` is left out: its format `raw` keeps no reasons"));
                }
                continue;
            }
            SinkKind::Syslog(_) => continue,
        };
        known.push(name);
        if wanted.is_some_and(|wanted| wanted != name) {
            continue;
        }
        let sink_name: Rc<str> = Rc::from(name.as_str());
        let mut add =
            |path: PathBuf, role| inputs.push(Input { path, role, sink: Some(Rc::clone(&sink_name)) });
        match &sink.kind {
            SinkKind::File(_) => match of_sink(path) {
                Ok(files) => {
                    for file in files.rotated {
                        let role = match named(file.clone()).role {
                            Role::Rotated => Role::Rotated,
                            _ => Role::Renamed,
                        };
                        add(file, role);
                    }
                    files.current.into_iter().for_each(|path| add(path, Role::Current));
                }
                Err(error) => {
                    problems.add(format!("cannot read the directory of {}: {error}", path.display()));
                }
            },
            // It is made when the daemon first starts.
            _ if path.exists() => add(path.clone(), Role::Unknown),
            _ => {}
        }
    }
    let file = config.file.display();
    match wanted {
        _ if known.is_empty() => Err(Failure::config(format!(
            "no sink of {file} keeps quarantined lines where they can be read: a file with format = \"json\" or a database \
             that takes the stream `quarantine`; name the files instead"
        ))),
        Some(wanted) if !known.contains(&wanted) => Err(Failure::usage(format!(
            "--sink {}: {file} has no such sink with quarantined lines; it has {}",
            escape(wanted),
            known.join(", ")
        ))),
        _ => Ok(Inputs(inputs)),
    }
}

/// Says on standard error what does not matter for the exit code.
pub(super) fn remark(text: &str) {
    let _ = writeln!(io::stderr(), "auditgate: {}", escape(text));
}

/// Returns a path as it is shown.
pub(super) fn shown(path: &Path) -> String {
    escape(&path.to_string_lossy()).into_owned()
}
