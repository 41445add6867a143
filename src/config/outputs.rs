//! Checks that each sink has a file of its own, through links, whether the files exist or not.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use super::document::Document;
use super::{Config, SinkKind};

/// Checks that no two sinks write to one file, and none to the ledger's.
pub(super) fn are_distinct(config: &Config, document: &mut Document<'_>) {
    let lock = real_path(&config.data_dir.join("lock"));
    let own = identities(database_files(&config.data_dir.join("ledger.db")).into_iter().chain([lock]));
    let mut seen: HashMap<FileIdentity, &str> = HashMap::new();
    for (name, sink) in &config.sinks {
        let Some(path) = sink.kind.path() else { continue };
        let files = match sink.kind {
            SinkKind::Sqlite(_) => identities(database_files(path)),
            _ => identities([real_path(path)]),
        };
        let path = path.display();
        if files.iter().any(|file| own.contains(file)) && !document.is_wrong(&["data_dir"]) {
            let problem =
                format!("the sink `{name}` writes to the ledger's own `{path}`; give it another file");
            document.check(&["sinks", name], &["path"], problem);
        }
        if let Some(first) = files.iter().find_map(|file| seen.get(file)) {
            let problem = format!(
                "the sinks `{first}` and `{name}` write to one file, `{path}`; give each its own file, or make it one \
                 sink with a list of streams"
            );
            document.check(&["sinks", name], &["path"], problem);
        }
        // A placeholder for a wrong path belongs to no sink.
        if !document.is_wrong(&["sinks", name, "path"]) {
            seen.extend(files.into_iter().map(|file| (file, name.as_str())));
        }
    }
}

/// What tells two output files apart. A file that exists may have several names (hard links); one
/// that does not exist yet has one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum FileIdentity {
    Name(PathBuf),
    File { device: u64, inode: u64 },
}

/// Of real paths.
fn identities(paths: impl IntoIterator<Item = PathBuf>) -> Vec<FileIdentity> {
    let both = |path: PathBuf| {
        let file = path.metadata().ok();
        let file = file.map(|file| FileIdentity::File { device: file.dev(), inode: file.ino() });
        [Some(FileIdentity::Name(path)), file]
    };
    paths.into_iter().flat_map(both).flatten().collect()
}

/// Where a path leads to, whether there is anything or not: without symbolic links and `..`.
/// Opening a link to nothing makes what it names.
fn real_path(path: &Path) -> PathBuf {
    follow(&std::path::absolute(path).unwrap_or_else(|_| path.to_owned()), &mut { LINKS })
}

/// Linux follows no more in one path (path_resolution(7)).
const LINKS: u32 = 40;

fn follow(path: &Path, links_left: &mut u32) -> PathBuf {
    let mut real = PathBuf::new();
    for component in path.components() {
        if component == Component::ParentDir {
            real.pop();
            continue;
        }
        real.push(component);
        if *links_left > 0
            && let Ok(target) = real.read_link()
        {
            *links_left -= 1;
            real.pop();
            real = follow(&real.join(target), links_left);
        }
    }
    real
}

/// A database and the files that SQLite makes next to it.
fn database_files(path: &Path) -> [PathBuf; 4] {
    let real = real_path(path);
    ["", "-wal", "-shm", "-journal"].map(|suffix| {
        let mut file = real.clone().into_os_string();
        file.push(suffix);
        file.into()
    })
}
