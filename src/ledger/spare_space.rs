//! Space that is kept for a start: SQLite cannot open a database without a small file next to it,
//! and on a full disk there is no space for one. Then this space is released, the daemon starts,
//! and answers 429 until there is space.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

/// Size of the spare space, in bytes: several times what opening takes, the index of the log and a
/// few pages of the log.
const BYTES: usize = 256 << 10;

fn file(data_dir: &Path) -> PathBuf {
    data_dir.join("reserve")
}

/// Reserves the space, unless it is reserved already. On an error nothing is kept.
pub(super) fn reserve(data_dir: &Path) -> io::Result<()> {
    let path = file(data_dir);
    if fs::metadata(&path).is_ok_and(|metadata| metadata.len() >= BYTES as u64) {
        Ok(())
    } else {
        fill(&path)
    }
}

/// Releases the space; returns false when there was none.
pub(super) fn release(data_dir: &Path) -> bool {
    fs::remove_file(file(data_dir)).is_ok()
}

/// Returns whether the disk is full, by trying.
pub(super) fn is_disk_full(data_dir: &Path) -> bool {
    let probe = data_dir.join("reserve.probe");
    let filled = fill(&probe);
    let _ = fs::remove_file(&probe);
    filled
        .is_err_and(|error| matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
}

/// Creates a file of that size, or none.
fn fill(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let write = |mut file: File| {
        file.write_all(&vec![0; BYTES])?;
        file.sync_all()
    };
    let filled =
        File::options().create(true).truncate(true).write(true).mode(0o600).open(path).and_then(write);
    if filled.is_err() {
        let _ = fs::remove_file(path);
    }
    filled
}
