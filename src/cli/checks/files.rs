//! Checks of what the daemon reads and writes on this machine.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::fs::{Access, access, statvfs};

use super::{Finding, Severity};
use crate::clock::Clock;
use crate::config::{AdminAddress, Config, SinkKind, Tls};
use crate::deliver::sqlite;
use crate::ledger::{Ledger, OpenError};
use crate::receive::tls::Certificates;

/// Days before the end of a certificate from which on it is reported.
pub const EXPIRY_WARNING_DAYS: i64 = 30;

/// Free space without which SQLite cannot open the ledger, in bytes.
const LEAST_SPACE: u64 = 1 << 20;

/// Checks the listener's certificate and key.
pub(super) fn certificate(config: &Config) -> Vec<Finding> {
    let Tls::Files(files) = &config.listen.tls else { return Vec::new() };
    let now = (Clock::system().wall)() / 1000;
    let subject = "listen.tls";
    match Certificates::examine(files.clone(), now) {
        Err(error) => vec![Finding::fatal(subject, error.to_string())],
        Ok(examined) => {
            let doubt = examined.doubt.map(|doubt| Finding::error(subject, doubt));
            let weaknesses = examined.weaknesses.into_iter();
            let mut found: Vec<_> = doubt
                .into_iter()
                .chain(weaknesses.map(|weakness| Finding::warning(subject, weakness)))
                .collect();
            // One that has expired is in doubt.
            let days = examined.not_after.map(|end| (end - now).div_euclid(86_400));
            if let Some(days) = days.filter(|days| (0..EXPIRY_WARNING_DAYS).contains(days)) {
                let path = files.cert.display();
                found.push(Finding::warning(
                    subject,
                    format!(
                        "the certificate {path} expires in {days} days; renew it: Konnect does not retry what fails \
                         because of a certificate"
                    ),
                ));
            }
            found
        }
    }
}

/// Checks that every directory exists and can be written.
pub(super) fn directories(config: &Config) -> Vec<Finding> {
    let mut found = Vec::new();
    let data_dir = &config.data_dir;
    let to_write = match data_dir.is_dir() {
        true => data_dir.as_path(),
        // The daemon makes it.
        false => data_dir.parent().unwrap_or(data_dir),
    };
    found.extend(unwritable(to_write).map(|problem| Finding::fatal("data_dir", problem)));
    for (name, sink) in &config.sinks {
        let subject = format!("sink `{name}`");
        let Some(path) = sink.kind.path() else { continue };
        let directory = path.parent().unwrap_or(path);
        if directory != data_dir
            && let Some(problem) = unwritable(directory)
        {
            // A missing one is a misspelt path, or a disk that is not mounted.
            let severity = if directory.is_dir() { Severity::Error } else { Severity::Fatal };
            let problem = format!("{} cannot be written: {problem}", path.display());
            found.push(Finding { severity, subject, problem });
            continue;
        }
        if path.is_dir() {
            found.push(Finding::error(subject, format!("{} is a directory; name a file", path.display())));
            continue;
        }
        if path.exists()
            && let Some(problem) = refused(path, Access::READ_OK | Access::WRITE_OK, "write")
        {
            found.push(Finding::error(subject.clone(), problem));
        }
        if let SinkKind::Sqlite(_) = &sink.kind
            && let Err(error) = sqlite::check(path)
        {
            // It belongs to another program; or that only has it locked at the moment.
            let is_foreign = error.cause.kind() == io::ErrorKind::InvalidData;
            let severity = if is_foreign { Severity::Fatal } else { Severity::Warning };
            found.push(Finding { severity, subject, problem: error.to_string() });
        }
    }
    if let AdminAddress::Unix(path) = &config.admin.address {
        let directory = path.parent().unwrap_or(path);
        found.extend(unwritable(directory).map(|problem| {
            // The unit makes /run/auditgate, each time that it starts.
            let is_made = directory.starts_with("/run") && !directory.exists();
            let severity = if is_made { Severity::Warning } else { Severity::Error };
            Finding { severity, subject: "admin.address".to_owned(), problem }
        }));
    }
    found
}

/// Returns why a directory cannot take new files, if so.
fn unwritable(directory: &Path) -> Option<String> {
    match directory.metadata() {
        Ok(metadata) if metadata.is_dir() => {
            refused(directory, Access::WRITE_OK | Access::EXEC_OK, "write in")
        }
        Ok(_) => Some(format!("{} is not a directory", directory.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Some(format!("{} does not exist; make it, writable for the daemon's user", directory.display()))
        }
        Err(error) => Some(format!("cannot look at {}: {error}", directory.display())),
    }
}

/// Returns why this process may not use a file, if so, with the file's owner and mode.
fn refused(path: &Path, wanted: Access, what: &str) -> Option<String> {
    let error = access(path, wanted).err()?;
    let user = uzers::get_current_username().map_or_else(
        || format!("user {}", uzers::get_current_uid()),
        |name| name.to_string_lossy().into_owned(),
    );
    let owner = path.metadata().map_or_else(
        |_| String::new(),
        |metadata| {
            let name = uzers::get_user_by_uid(metadata.uid());
            let name = name.map_or_else(
                || metadata.uid().to_string(),
                |user| user.name().to_string_lossy().into_owned(),
            );
            format!(" (owner {name}, mode {:04o})", metadata.mode() & 0o7777)
        },
    );
    let (path, cause) = (path.display(), io::Error::from(error));
    Some(match error {
        rustix::io::Errno::ACCESS => {
            format!("{user} may not {what} {path}{owner}; chown it to the daemon's user")
        }
        _ => format!("{user} cannot {what} {path}{owner}: {cause}"),
    })
}

/// Checks the space on the disk of `data_dir`.
pub(super) fn space(config: &Config) -> Option<Finding> {
    let data_dir = config.data_dir.ancestors().find(|path| path.is_dir())?;
    let disk = statvfs(data_dir).ok()?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    let (shown, backlog) = (bytesize::ByteSize(free), bytesize::ByteSize(config.limits.backlog));
    let path = config.data_dir.display();
    if free < LEAST_SPACE {
        let problem = format!("the disk of {path} is full: {shown} free; free 1 MiB or more on it");
        return Some(Finding::error("data_dir", problem));
    }
    (free < config.limits.backlog).then(|| {
        let problem = format!(
            "the disk of {path} has {shown} free, less than limits.backlog ({backlog}): while a sink is down it \
             fills before the backlog does; free space, or lower the limit"
        );
        Finding::warning("data_dir", problem)
    })
}

/// Checks the ledger against the sinks. Also returns whether a daemon works with it.
pub(super) fn ledger(config: &Config) -> (Option<Finding>, bool) {
    let sinks: Vec<_> = config.sinks.iter().map(|(name, sink)| sink.subscription(name)).collect();
    match Ledger::check(&config.data_dir, &sinks) {
        Ok(is_running) => (None, is_running),
        // Reported with the directory.
        Err(OpenError::Io { .. }) => (None, false),
        Err(error) => (Some(Finding::fatal("data_dir", error.to_string())), false),
    }
}
