//! Whether the ledger's files still are where they were opened. SQLite would continue in files that
//! were deleted or renamed, and what it commits there would never be found.

use std::fs::Metadata;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Paths of the files, and the files that are known to be open.
pub(super) struct FileIdentity(Vec<(PathBuf, (u64, u64))>);

impl FileIdentity {
    /// Records the lock that is held, the database that was just opened, and its log, if it has
    /// one.
    ///
    /// # Errors
    /// When one cannot be examined.
    pub(super) fn of(lock: (&Path, &Metadata), database: &Path) -> io::Result<Self> {
        let (path, metadata) = lock;
        let mut files = vec![(path.to_owned(), number(metadata)), (database.to_owned(), find(database)?)];
        // SQLite puts the log next to the real file. It exists from the first transaction on, and
        // until the database is closed; a checkpoint only shortens it.
        let mut log = database.canonicalize()?.into_os_string();
        log.push("-wal");
        let log = PathBuf::from(log);
        match find(&log) {
            Ok(number) => files.push((log, number)),
            // A file system without shared memory, where SQLite keeps no such log.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(Self(files))
    }

    /// Checks the paths. Costs a system call a file.
    ///
    /// # Errors
    /// The first path that no longer leads to its file. A file that cannot be examined counts as
    /// present.
    pub(super) fn check(&self) -> Result<(), &Path> {
        for (path, number) in &self.0 {
            let is_there = match find(path) {
                Ok(found) => found == *number,
                Err(error) => !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory),
            };
            if !is_there {
                return Err(path);
            }
        }
        Ok(())
    }
}

fn find(path: &Path) -> io::Result<(u64, u64)> {
    path.metadata().map(|metadata| number(&metadata))
}

/// Returns the device and the inode.
fn number(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}
