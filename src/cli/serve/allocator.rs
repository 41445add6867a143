//! Lets the C library give memory back that batches have taken.
//!
//! glibc raises, with each large piece of memory that is freed, the size from which it asks the system for pieces of
//! their own, up to 32 MiB (mallopt(3), `M_MMAP_THRESHOLD`). After the first large batches those that follow leave
//! holes in its arenas, which it keeps for good: twice `limits.in_flight` and more. A fixed threshold ends that, and it is
//! read from the environment before `main`.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

/// The variable of mallopt(3).
const THRESHOLD: &str = "MALLOC_MMAP_THRESHOLD_";

/// 1 MiB: what is smaller is used again soon.
const BYTES: &str = "1048576";

/// Starts this program again in this process, with the threshold in its environment; returns when it is there
/// already, or when there is no glibc. To be called first, before there is a second thread or an open file; what was
/// inherited stays. When it cannot be done, the daemon works all the same and keeps more memory.
pub(super) fn give_back() {
    if !cfg!(all(target_os = "linux", target_env = "gnu")) || std::env::var_os(THRESHOLD).is_some() {
        return;
    }
    let Ok(program) = std::env::current_exe() else { return };
    let mut arguments = std::env::args_os();
    let Some(name) = arguments.next() else { return };
    // Returns only when it failed.
    let _ = Command::new(program).arg0(name).args(arguments).env(THRESHOLD, BYTES).exec();
}
