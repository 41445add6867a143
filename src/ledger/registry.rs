//! Updates the table `sink` to the configuration.

use std::collections::BTreeMap;
use std::path::Path;

use rusqlite::{Connection, params};

use super::error::OpenError;
use super::subscription::{Forgetting, Subscription};
use super::{delivery, schema};

/// Registers the configured sinks, and removes others that have everything. A new one starts at the
/// present.
///
/// # Errors
/// When events wait for a sink that was removed, is of another type, or does not take them any
/// more; nothing is changed then.
pub(super) fn register(
    connection: &Connection,
    subscriptions: &[Subscription],
    path: &Path,
) -> Result<(), OpenError> {
    let database = |cause| OpenError::Database { path: path.to_owned(), cause };
    let transaction = connection.unchecked_transaction().map_err(database)?;
    let Changes { new, gone } = changes(connection, subscriptions, path)?;
    let present = schema::last_position(connection).map_err(database)? + 1;
    for subscription in new {
        let insert = "INSERT INTO sink (name, kind, batch, line, mark) VALUES (?1, ?2, ?3, 0, x'')";
        connection
            .execute(insert, params![subscription.sink, subscription.kind, present])
            .map_err(database)?;
    }
    for sink in gone {
        connection.execute("DELETE FROM sink WHERE name = ?1", [sink]).map_err(database)?;
    }
    transaction.commit().map_err(database)
}

/// Differences between the configured sinks and the registered ones.
pub(super) struct Changes<'a> {
    new: Vec<&'a Subscription>,
    /// Sinks that are no longer configured and have everything.
    gone: Vec<String>,
}

/// Returns what [`register`] would change. Only reads.
///
/// # Errors
/// As for [`register`].
pub(super) fn changes<'a>(
    connection: &Connection,
    subscriptions: &'a [Subscription],
    path: &Path,
) -> Result<Changes<'a>, OpenError> {
    let database = |cause| OpenError::Database { path: path.to_owned(), cause };
    let mut kinds = kinds(connection).map_err(database)?;
    let mut new = Vec::new();
    for subscription in subscriptions {
        let sink = subscription.sink.clone();
        match kinds.remove(&sink) {
            None => new.push(subscription),
            Some(was) if was != subscription.kind => {
                return Err(OpenError::KindChanged { sink, was, is: subscription.kind });
            }
            Some(_) => {
                let unwanted = delivery::unwanted(connection, subscription).map_err(database)?;
                if !unwanted.is_empty() {
                    return Err(OpenError::Narrowed { sink, pending: events(&unwanted) });
                }
            }
        }
    }
    let mut gone = Vec::new();
    for sink in kinds.into_keys() {
        match delivery::pending(connection, &sink).map_err(database)?.events {
            0 => gone.push(sink),
            pending => return Err(OpenError::Orphaned { sink, pending }),
        }
    }
    Ok(Changes { new, gone })
}

/// Gives up the events that keep the daemon from starting with a sink, or, by force, all that wait
/// for it.
pub(super) fn forget_sink(
    connection: &Connection,
    sink: &str,
    configured: Option<&Subscription>,
    by_force: bool,
) -> rusqlite::Result<Forgetting> {
    let transaction = connection.unchecked_transaction()?;
    let Some(kind) = kinds(connection)?.remove(sink) else { return Ok(Forgetting::Unknown) };
    let pending = delivery::pending(connection, sink)?.events;
    let forgetting = match configured.filter(|subscription| !by_force && subscription.kind == kind) {
        None => {
            connection.execute("DELETE FROM delivery WHERE sink = ?1", [sink])?;
            connection.execute("DELETE FROM sink WHERE name = ?1", [sink])?;
            Forgetting::All { given_up: pending }
        }
        Some(subscription) => {
            let unwanted = delivery::unwanted(connection, subscription)?;
            for (source, stream, _) in &unwanted {
                connection.execute(
                    "DELETE FROM delivery WHERE sink = ?1 AND stream = ?2 \
                     AND batch IN (SELECT position FROM batch INDEXED BY batch_summary WHERE source = ?3)",
                    params![sink, stream, source],
                )?;
            }
            match events(&unwanted) {
                0 => Forgetting::Refused { pending },
                given_up => Forgetting::NoLongerWanted { given_up },
            }
        }
    };
    connection.execute(
        "DELETE FROM batch WHERE NOT EXISTS (SELECT 1 FROM delivery WHERE delivery.batch = position)",
        [],
    )?;
    transaction.commit()?;
    Ok(forgetting)
}

fn events(unwanted: &[(String, usize, u64)]) -> u64 {
    unwanted.iter().map(|(.., events)| events).sum()
}

/// Returns every registered sink's type.
fn kinds(connection: &Connection) -> rusqlite::Result<BTreeMap<String, String>> {
    let mut find = connection.prepare("SELECT name, kind FROM sink")?;
    find.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
}
