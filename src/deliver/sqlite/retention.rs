//! Which rows have expired, by a clock that may be wrong.
//!
//! If the clock is far ahead at a start, or jumps there, every row would be deleted, and nothing
//! tells that from a long time in which nothing arrived or the daemon was stopped. So after a start
//! and after a jump the rows themselves are a second clock: there is a row of every day in which
//! time really passed. After a gap of more than a day, rows expire as if it were one day after the
//! last row before the gap. That ends when the rows after the gap are a week old or more, because a
//! wrong clock is noticed within a week; or when this process has run for a week and the clock ran
//! evenly with it.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, params};

use crate::clock::Clock;

const DAY: i64 = 86_400_000;

/// Time for which the clock must have been confirmed before it is trusted alone, in milliseconds.
const CLOCK_TRUST_DELAY: i64 = 7 * DAY;

/// Difference between the wall clock and the steady one that counts as a jump, in milliseconds:
/// large, since a machine that was suspended looks the same.
const CLOCK_JUMP: i64 = DAY;

/// Retention time of rows, and what is known about the clock.
pub(super) struct Retention {
    retain: i64,
    clock: Clock,
    last_look: (i64, Duration),
    /// Time since which the wall clock has run evenly, by the steady one.
    consistent_since: Duration,
    /// It was logged that rows are kept because the clock is in doubt.
    warned: bool,
}

impl Retention {
    pub(super) fn new(retain: Duration, clock: Clock) -> Self {
        let last_look = ((clock.wall)(), (clock.steady)());
        Self { retain: milliseconds(retain), consistent_since: last_look.1, clock, last_look, warned: false }
    }

    /// Returns the time before which arrivals have expired, in milliseconds since the Unix epoch.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub(super) fn cutoff(&mut self, connection: &Connection, path: &Path) -> rusqlite::Result<i64> {
        let (wall, steady) = ((self.clock.wall)(), (self.clock.steady)());
        let (last_wall, last_steady) = self.last_look;
        let off = wall - last_wall - milliseconds(steady.saturating_sub(last_steady));
        self.last_look = (wall, steady);
        if off.abs() > CLOCK_JUMP {
            let (path, seconds) = (path.display(), off / 1000);
            tracing::warn!(
                code = "retention-clock-jumped",
                %path,
                seconds,
                "clock jumped by {seconds} s; for a week, events in {path} expire only as far as other events \
                 confirm the time"
            );
            self.consistent_since = steady;
            self.warned = false;
        }
        let by_clock = wall.saturating_sub(self.retain);
        if milliseconds(steady.saturating_sub(self.consistent_since)) >= CLOCK_TRUST_DELAY {
            return Ok(by_clock);
        }
        // With less than a day to keep, a day more would be everything.
        let grace = DAY.min(self.retain / 2);
        let by_rows = confirmed_until(connection, wall, grace)?.saturating_sub(self.retain);
        if by_rows < by_clock && !self.warned && is_any_before(connection, by_clock)? {
            let (path, seconds) = (path.display(), (by_clock - by_rows) / 1000);
            tracing::warn!(
                code = "retention-clock-doubtful",
                %path,
                seconds,
                "clock is {seconds} s ahead of the events in {path}: nothing arrived for long, or it is wrong; \
                 events that only the clock says have expired are kept for a week more. Check the clock"
            );
            self.warned = true;
        }
        Ok(by_rows.min(by_clock))
    }
}

/// Returns the time up to which the rows confirm that time passed: the wall clock's, when there are
/// rows of every day since before the last week, else `grace` after the last row before the first
/// gap.
fn confirmed_until(connection: &Connection, wall: i64, grace: i64) -> rusqlite::Result<i64> {
    let start = match newest_until(connection, wall.saturating_sub(CLOCK_TRUST_DELAY))? {
        Some(start) => start,
        None => match oldest(connection)? {
            Some(start) => start,
            None => return Ok(wall),
        },
    };
    let mut reached = start;
    // Two steps are more than a day, so that there are few.
    while reached < wall.saturating_sub(grace) {
        match newest_until(connection, reached.saturating_add(DAY))? {
            Some(next) if next > reached => reached = next,
            _ => return Ok(reached.saturating_add(grace).min(wall)),
        }
    }
    Ok(wall)
}

fn newest_until(connection: &Connection, time: i64) -> rusqlite::Result<Option<i64>> {
    let sql = "SELECT max(newest) FROM (\
               SELECT max(received_at) AS newest FROM event_rows WHERE received_at <= ?1 UNION ALL \
               SELECT max(received_at) FROM quarantine WHERE received_at <= ?1)";
    connection.prepare_cached(sql)?.query_row(params![time], |row| row.get(0))
}

fn oldest(connection: &Connection) -> rusqlite::Result<Option<i64>> {
    let sql = "SELECT min(oldest) FROM (\
               SELECT min(received_at) AS oldest FROM event_rows UNION ALL \
               SELECT min(received_at) FROM quarantine)";
    connection.prepare_cached(sql)?.query_row([], |row| row.get(0))
}

fn is_any_before(connection: &Connection, time: i64) -> rusqlite::Result<bool> {
    Ok(oldest(connection)?.is_some_and(|oldest| oldest < time))
}

fn milliseconds(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}
