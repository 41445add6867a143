//! Reads and judges on all cores, in bounded memory, and reports in the order of files and lines.
//!
//! A few readers take one file after the other, split it into blocks and queue these for the
//! judges, one on each core. With every block goes a channel for its result, and the reporter takes
//! these in their order: the first file's until it ends, then the second's. A reader that is ahead
//! waits when its queue is full, so that memory holds a fixed number of blocks, whatever the files'
//! size. The file that the reporter waits for always has a reader, since files are taken in their
//! order: there is no circular wait.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use parking_lot::Mutex;

use super::judge::{Block, JudgedBlock, Keys, Selection, judge};
use super::read::{Blocks, Fault, Kind};

/// Message to the reporter, in this order for each file.
#[derive(Debug)]
pub enum News {
    /// It is open.
    Opened {
        /// Kind of the file.
        kind: Kind,
        /// Number of quarantined lines in the database, which are not judged.
        quarantined: u64,
    },
    /// Some of its lines are judged.
    JudgedBlock(JudgedBlock),
    /// It cannot be read (any further), or a line of it cannot.
    Fault(Fault),
    /// The end of the file.
    Ended,
}

/// A block and the channel for its result.
type Job = (Block, SyncSender<JudgedBlock>);

/// Message of a reader about its file.
enum Step {
    Said(News),
    Queued(Receiver<JudgedBlock>),
}

/// Checks files on `threads` cores. `read` counts the bytes that were read, before inflation.
/// `report` gets the file's index and the news about it.
///
/// # Errors
/// The first one of `report`, which ends the work.
pub fn check<E>(
    files: &[PathBuf],
    keys: &Keys,
    selection: Selection,
    threads: usize,
    read: &Arc<AtomicU64>,
    mut report: impl FnMut(usize, News) -> Result<(), E>,
) -> Result<(), E> {
    // One core inflates for about six that verify.
    let readers = threads.div_ceil(4).min(files.len());
    let ahead = 2 * threads / readers.max(1) + 2;
    let (jobs, queue) = sync_channel::<Job>(threads);
    let queue = Mutex::new(queue);
    let (tell, told): (Vec<_>, Vec<_>) = files.iter().map(|_| sync_channel::<Step>(ahead)).unzip();
    let (tell, next) = (Mutex::new(tell.into_iter().map(Some).collect::<Vec<_>>()), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        // Moved in here, so that whatever ends this function also ends the threads: the readers
        // find that the receivers are gone, and then the judges that the senders are.
        let told = told;
        for _ in 0..threads {
            scope.spawn(|| judge_all(&queue, keys, selection));
        }
        for _ in 0..readers {
            let jobs = jobs.clone();
            scope.spawn(|| {
                let jobs = jobs;
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(path) = files.get(index) else { return };
                    let tell = tell.lock()[index].take();
                    if let Some(tell) = tell
                        && read_one(path, read, &jobs, &tell).is_none()
                    {
                        return;
                    }
                }
            });
        }
        drop(jobs);
        for (index, steps) in told.into_iter().enumerate() {
            for step in steps {
                let news = match step {
                    Step::Said(news) => news,
                    Step::Queued(judged) => match judged.recv() {
                        Ok(judged) => News::JudgedBlock(judged),
                        // Its judge panicked; the scope passes that on.
                        Err(_) => continue,
                    },
                };
                report(index, news)?;
            }
            report(index, News::Ended)?;
        }
        Ok(())
    })
}

/// Reads one file. Returns none when the receiver is gone.
fn read_one(
    path: &std::path::Path,
    read: &Arc<AtomicU64>,
    jobs: &SyncSender<Job>,
    tell: &SyncSender<Step>,
) -> Option<()> {
    let mut blocks = match Blocks::open(path, read) {
        Ok(blocks) => blocks,
        Err(fault) => return tell.send(Step::Said(News::Fault(fault))).ok(),
    };
    let opened = News::Opened { kind: blocks.kind(), quarantined: blocks.quarantined() };
    tell.send(Step::Said(opened)).ok()?;
    loop {
        match blocks.block() {
            Ok(None) => return Some(()),
            Ok(Some(block)) => {
                let (put, result) = sync_channel(1);
                tell.send(Step::Queued(result)).ok()?;
                jobs.send((block, put)).ok()?;
            }
            Err(fault) => {
                let goes_on = fault.goes_on();
                tell.send(Step::Said(News::Fault(fault))).ok()?;
                if !goes_on {
                    return Some(());
                }
            }
        }
    }
}

fn judge_all(queue: &Mutex<Receiver<Job>>, keys: &Keys, selection: Selection) {
    loop {
        let job = queue.lock().recv();
        let Ok((block, result)) = job else { return };
        let mut entries = block.entries();
        let all = entries.len();
        if selection.skip_quarantine {
            entries.retain(|entry| !entry.is_quarantined());
        }
        let mut judged = judge(&entries, keys, selection.window, &mut rand::rng());
        judged.counts.skipped = (all - entries.len()) as u64;
        // The receiver may be gone.
        let _ = result.send(judged);
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::super::judge::tests::{cef, keys, signed};
    use super::super::judge::{Counts, joined};
    use super::*;

    #[test]
    fn files_are_reported_in_order_with_any_number_of_threads() {
        let dir = tempfile::tempdir().unwrap();
        let pool: Vec<String> = (0..50).map(|n| signed(1, &cef("1000", n))).collect();
        let mut wanted = Vec::new();
        let files: Vec<PathBuf> = (0..9_usize)
            .map(|file| {
                let mut text = String::new();
                for line in 0..(file * 1_777) % 5_000 {
                    let is_bad = (line + file) % 997 == 5;
                    if is_bad {
                        wanted.push((file, line as u64 + 1));
                    }
                    let good = &pool[line % pool.len()];
                    text += &if is_bad { good.replacen("KongInc", "KongIno", 1) } else { good.clone() };
                    text.push('\n');
                }
                let path = dir.path().join(file.to_string());
                std::fs::write(&path, text).unwrap();
                path
            })
            .collect();
        for threads in [1, 2, 7, 40] {
            let (mut counts, mut times, mut found, mut ended) =
                (Counts::default(), None, Vec::new(), Vec::new());
            let read = Arc::default();
            let report = |file, news| {
                match news {
                    News::JudgedBlock(judged) => {
                        counts += judged.counts;
                        times = joined(times, judged.times);
                        found.extend(judged.findings.iter().map(|finding| (file, finding.line)));
                    }
                    News::Ended => ended.push(file),
                    News::Opened { .. } => assert_eq!(ended.len(), file),
                    News::Fault(fault) => panic!("{fault:?}"),
                }
                Ok::<_, Infallible>(())
            };
            check(&files, &keys(&[1]), Selection::default(), threads, &read, report).unwrap();
            assert_eq!(found, wanted);
            assert_eq!(ended, (0..9).collect::<Vec<_>>());
            assert_eq!((counts.bad, counts.findings()), (wanted.len() as u64, wanted.len() as u64));
            assert_eq!(times, Some((1000, 1000)));
            assert_eq!(
                read.load(Ordering::Relaxed),
                files.iter().map(|file| file.metadata().unwrap().len()).sum::<u64>()
            );
        }
        // An error of the callback ends the run.
        let report = |_, _| Err("enough");
        assert_eq!(
            check(&files, &keys(&[1]), Selection::default(), 2, &Arc::default(), report),
            Err("enough")
        );
    }
}
