//! `auditgate send --spool`: a sender that keeps what it is to send, from the command line.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::super::exit::Failure;
use super::super::serve::sender::{Finished, Mode, run_as};
use super::super::serve::sockets::Inherited;
use super::delivery::{authorization, count};
use super::{Args, InputFormat, display};
use crate::config::sender::{
    FileInput, Input, InputKind, Receiver, SenderConfig, Signatures, Signing, SigningKeyOptions, Start,
};
use crate::config::{Admin, Log};
use crate::escape::escape;
use crate::observe::logging;
use crate::secret::Secret;

/// Sends through a spool, and prints a summary to `out`.
///
/// # Errors
/// 1 when something was not delivered or an input line cannot be sent, 2 for arguments that
/// contradict each other, 74 for disks, 78 for keys, certificates and the authorization.
pub(super) fn run(
    args: &Args,
    directory: &Path,
    environment: &dyn Fn(&str) -> Option<OsString>,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let config = config(args, directory, environment)?;
    let mode = if args.follow { Mode::Follow } else { Mode::UntilEnd };
    let finished = run_as(config, Inherited::default(), mode)?;
    if !args.delivery.quiet {
        writeln!(out, "{}", summary(&finished))
            .and_then(|()| out.flush())
            .map_err(|error| Failure::io(format!("standard output cannot be written: {error}")))?;
    }
    let Finished { rejected, deliveries, waiting, .. } = finished;
    let mut problems = Vec::new();
    if waiting > 0 && mode == Mode::UntilEnd {
        let why = deliveries.last_error.map(|error| format!(": {}", escape(&error))).unwrap_or_default();
        let waiting = count(waiting, "event");
        problems.push(format!("{} keeps {waiting} for the next run{why}", display(directory)));
    }
    let aside = rejected + deliveries.refused;
    if aside > 0 {
        let lines = count(aside, "line");
        problems.push(format!("{}/rejects.jsonl has {lines} that cannot be sent", display(directory)));
    }
    if deliveries.receipts.quarantined > 0 && args.delivery.strict {
        problems.push(format!("{} quarantined", count(deliveries.receipts.quarantined, "line")));
    }
    if problems.is_empty() { Ok(()) } else { Err(Failure::finding(problems.join("; "))) }
}

/// Returns the configuration that the arguments stand for.
fn config(
    args: &Args,
    directory: &Path,
    environment: &dyn Fn(&str) -> Option<OsString>,
) -> Result<SenderConfig, Failure> {
    let delivery = &args.delivery;
    if args.input_format == InputFormat::Quarantine {
        return Err(Failure::usage("--spool does not read quarantine records: leave one of them out"));
    }
    let is_relay = args.relay || args.input_format == InputFormat::Raw;
    let (signatures, signing) = match &args.key {
        _ if is_relay => (Signatures::Relay, None),
        Some(key) => {
            let keys = vec![SigningKeyOptions { file: Some(key.clone()), ..SigningKeyOptions::default() }];
            (Signatures::Sign, Some(Signing { keys, jwks: None, serve_jwks: args.serve_jwks }))
        }
        None if args.unsigned => (Signatures::Off, None),
        None => {
            return Err(Failure::usage(
                "there is no key to sign with: add --key FILE, --relay or --unsigned",
            ));
        }
    };
    let secret = |text: String| Secret::new(text.into_bytes()).map_err(Failure::config);
    let absolute = |path: &PathBuf| {
        let unknown = |error| Failure::io(format!("cannot find the current directory: {error}"));
        std::path::absolute(path).map_err(unknown)
    };
    let mut inputs = BTreeMap::new();
    for path in &args.files {
        let (name, kind) = if path.as_os_str() == "-" {
            ("-".to_owned(), InputKind::Stdin)
        } else {
            let path = absolute(path)?;
            if !args.follow && !path.exists() {
                return Err(Failure::io(format!("cannot read {}: it does not exist", display(&path))));
            }
            let start = Start::Beginning;
            (path.display().to_string(), InputKind::File(FileInput { path, start }))
        };
        inputs.insert(name, Input { kind });
    }
    if inputs.is_empty() {
        inputs.insert("-".to_owned(), Input { kind: InputKind::Stdin });
    }
    let rate = delivery.rate.map(|rate| rate.ceil().max(1.0));
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 1 and a thousand million"
    )]
    let rate = rate.map(|rate| rate as usize);
    Ok(SenderConfig {
        file: PathBuf::new(),
        data_dir: absolute(&directory.to_owned())?,
        spool_size: args.spool_size.get() as u64,
        format: args.format,
        signatures,
        receiver: Receiver {
            url: delivery.endpoint()?,
            authorization: authorization(delivery, environment)?.map(secret).transpose()?,
            ca: delivery.ca.clone(),
            cert: delivery.client_cert.clone(),
            key: delivery.client_key.clone(),
            pin: delivery.pins.clone(),
            proxy: delivery.proxy.clone(),
            batch_events: delivery.batch_events.get(),
            batch_bytes: delivery.batch_bytes.get(),
            linger: delivery.linger,
            connections: delivery.connections.get(),
            rate,
            timeout: delivery.timeout,
        },
        signing,
        inputs,
        admin: Admin::default(),
        log: Log { level: "warn".to_owned(), format: logging::Format::default() },
    })
}

fn summary(finished: &Finished) -> String {
    let Finished { taken, known, rejected, deliveries, waiting } = finished;
    let mut text = format!(
        "{} taken; {} delivered in {}: accepted {}, duplicates {}, quarantined {}",
        count(*taken, "event"),
        deliveries.events,
        count(deliveries.batches, "batch"),
        deliveries.receipts.accepted,
        deliveries.receipts.duplicates,
        deliveries.receipts.quarantined
    );
    for (number, what) in [
        (*known, "were in the spool before"),
        (rejected + deliveries.refused, "set aside"),
        (*waiting, "wait in the spool"),
    ] {
        if number > 0 {
            text.push_str(&format!("; {number} {what}"));
        }
    }
    text
}
