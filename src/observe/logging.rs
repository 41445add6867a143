//! The daemon's log: one line an event to stderr, for people or for machines. systemd's journal gets
//! the priority of each line, and no second time.
//!
//! No environment variable sets the level; the configuration does, and [`Handle::set_level`]
//! changes it while the daemon runs. What a sender wrote can end up in a field, so every value is
//! escaped before it is written: it cannot forge a line, colour a terminal or change the reading
//! direction.
//!
//! Every message from `info` on has a stable `code` as its first field; `docs/log-messages.md`
//! lists them.
//!
//! A line that cannot be written (stderr is closed, its disk is full) is lost; the daemon goes on.

use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal as _};

use crate::escape::{Notation, write_escaped};
use tracing::dispatcher::{self, Dispatch};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Registry;
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::{Format as EventFormat, Json, JsonFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::reload;

/// Format of the log's lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// RFC 3339 time in UTC, level, message and fields; in colour on a terminal unless `NO_COLOR`
    /// is set.
    #[default]
    Human,
    /// One object a line: `timestamp`, `level`, `message`, then the fields; `spans` where there are
    /// any.
    Json,
}

/// Reason why logging could not be started or changed.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The operator's fault: the level cannot be parsed.
    #[error(
        "`{0}` is not a log level; write off, error, warn, info, debug or trace, or a part of the program with one \
         of these, as in \"info,auditgate::receive=debug\""
    )]
    Directive(String),
    /// A bug: a process has one log.
    #[error("the log has already been started in this process; this is a bug, please report it")]
    AlreadyStarted,
    /// A bug: the log that the handle belongs to was dropped.
    #[error("the log level could not be changed ({0}); the former one stays in force")]
    Reload(#[source] reload::Error),
}

/// Starts the process's log on stderr.
///
/// `level_directives` is a level (`info`), or a list with other levels for parts of the program
/// (`info,auditgate::receive=debug`); without a level of its own the rest is at `info`.
///
/// # Errors
/// [`LoggingError::Directive`] for an invalid level, [`LoggingError::AlreadyStarted`] the second
/// time.
pub fn start(level_directives: &str, format: Format) -> Result<Handle, LoggingError> {
    let levels = parse_levels(level_directives)?;
    // https://no-color.org: any value but the empty one.
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let look = match (is_journal(), !plain && std::io::stderr().is_terminal()) {
        (true, _) => Look::Journal,
        (false, true) => Look::Colours,
        (false, false) => Look::Plain,
    };
    let (log, handle) = build(levels, format, look, std::io::stderr);
    dispatcher::set_global_default(log).map_err(|_| LoggingError::AlreadyStarted)?;
    Ok(handle)
}

/// Checks a level as [`start`] does.
///
/// # Errors
/// [`LoggingError::Directive`] for an unreadable level.
pub fn check_level(level_directives: &str) -> Result<(), LoggingError> {
    parse_levels(level_directives).map(drop)
}

/// Handle that changes the level of a running log.
#[derive(Clone, Debug)]
pub struct Handle {
    levels: reload::Handle<Targets, Registry>,
}

impl Handle {
    /// Replaces the level, from the next line on. `level_directives` is as for [`start`].
    ///
    /// # Errors
    /// [`LoggingError::Directive`] for an invalid level; the former one then stays in force.
    pub fn set_level(&self, level_directives: &str) -> Result<(), LoggingError> {
        self.levels.reload(parse_levels(level_directives)?).map_err(LoggingError::Reload)
    }
}

/// Look of the lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    Plain,
    /// For a terminal.
    Colours,
    /// For systemd's journal.
    Journal,
}

/// Returns whether stderr is the journal's socket (systemd.exec(5), `JOURNAL_STREAM`).
fn is_journal() -> bool {
    let Some(stream) = std::env::var_os("JOURNAL_STREAM") else { return false };
    let stderr = rustix::fs::fstat(std::io::stderr());
    stderr
        .is_ok_and(|stderr| stream.to_str() == Some(format!("{}:{}", stderr.st_dev, stderr.st_ino).as_str()))
}

/// Returns the prefix by which the journal knows the priority of a line (sd-daemon(3)); empty where
/// stderr is not the journal.
pub fn prefix(level: Level) -> &'static str {
    if is_journal() { priority(level) } else { "" }
}

fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "<3>",
        Level::WARN => "<4>",
        Level::INFO => "<6>",
        Level::DEBUG | Level::TRACE => "<7>",
    }
}

/// Writers that put the priority in front of each line, for the journal.
struct Prefixing<W> {
    writer: W,
    is_journal: bool,
}

impl<'a, W: MakeWriter<'a>> MakeWriter<'a> for Prefixing<W> {
    type Writer = Prefixed<W::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        Prefixed { writer: self.writer.make_writer(), prefix: "" }
    }

    fn make_writer_for(&'a self, metadata: &tracing::Metadata<'_>) -> Self::Writer {
        let prefix = if self.is_journal { priority(*metadata.level()) } else { "" };
        Prefixed { writer: self.writer.make_writer_for(metadata), prefix }
    }
}

/// Writer of one line.
struct Prefixed<W> {
    writer: W,
    prefix: &'static str,
}

impl<W: io::Write> io::Write for Prefixed<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.prefix.is_empty() {
            return self.writer.write(line);
        }
        // In one piece, since other threads write too. The layer gives a line whole.
        self.writer.write_all(&[self.prefix.as_bytes(), line].concat())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

fn build<W>(levels: Targets, format: Format, look: Look, writer: W) -> (Dispatch, Handle)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let (levels, handle) = reload::Layer::new(levels);
    let registry = tracing_subscriber::registry().with(levels);
    // The layer would report a failed write with eprintln!, which panics when stderr is what
    // failed.
    let writer = Prefixing { writer, is_journal: look == Look::Journal };
    let layer = tracing_subscriber::fmt::layer().with_writer(writer).log_internal_errors(false);
    let log = match format {
        Format::Human => {
            let layer = layer.with_target(false).with_ansi(look == Look::Colours).fmt_fields(HumanFields);
            match look {
                // The journal has a time and a priority of its own.
                Look::Journal => Dispatch::new(registry.with(layer.without_time().with_level(false))),
                Look::Colours | Look::Plain => Dispatch::new(registry.with(layer)),
            }
        }
        Format::Json => {
            let lines = EventFormat::default()
                .json()
                .flatten_event(true)
                .with_target(false)
                .with_current_span(false)
                .with_span_list(true);
            let layer = layer.with_ansi(false).fmt_fields(JsonFields::new()).event_format(JsonLines(lines));
            Dispatch::new(registry.with(layer))
        }
    };
    (log, Handle { levels: handle })
}

/// Parses levels. Stricter than the parser of tracing-subscriber, which takes a misspelt level for
/// the name of a part of the program and then logs nothing.
fn parse_levels(directives: &str) -> Result<Targets, LoggingError> {
    let mut levels = Targets::new().with_default(LevelFilter::INFO);
    for directive in directives.split(',').map(str::trim) {
        let refused = || LoggingError::Directive(directive.to_owned());
        let (target, level) = match directive.split_once('=') {
            Some((target, level)) => (Some(target.trim()), level.trim()),
            None => (None, directive),
        };
        // LevelFilter parses an empty text as a level.
        if level.is_empty() || target.is_some_and(str::is_empty) {
            return Err(refused());
        }
        let level: LevelFilter = level.parse().map_err(|_| refused())?;
        levels = match target {
            Some(target) => levels.with_target(target, level),
            None => levels.with_default(level),
        };
    }
    Ok(levels)
}

/// Formatter of `message key=value key=value`. Only the values are escaped: the names come from our
/// code, and the colours are ours.
struct HumanFields;

impl<'writer> FormatFields<'writer> for HumanFields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut visitor = HumanVisitor { writer, first: true, result: Ok(()) };
        fields.record(&mut visitor);
        visitor.result
    }
}

struct HumanVisitor<'writer> {
    writer: Writer<'writer>,
    first: bool,
    result: fmt::Result,
}

impl HumanVisitor<'_> {
    fn write(&mut self, field: &Field, value: &dyn fmt::Debug) -> fmt::Result {
        if !std::mem::take(&mut self.first) {
            self.writer.write_char(' ')?;
        }
        match field.name() {
            "message" => {}
            name if self.writer.has_ansi_escapes() => {
                write!(self.writer, "\x1b[3m{name}\x1b[0m\x1b[2m=\x1b[0m")?;
            }
            name => write!(self.writer, "{name}=")?,
        }
        write!(Escaping { notation: Notation::Human, out: &mut self.writer }, "{value:?}")
    }
}

impl Visit for HumanVisitor<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if self.result.is_ok() {
            self.result = self.write(field, value);
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.record_debug(field, &format_args!("{value}"));
        } else {
            self.record_debug(field, &value);
        }
    }
}

/// The JSON formatter's lines, with escapes that JSON itself does not require.
struct JsonLines(EventFormat<Json>);

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut escaping = Escaping { notation: Notation::Json, out: &mut writer };
        self.0.format_event(context, Writer::new(&mut escaping), event)
    }
}

/// Passes text on through [`write_escaped`].
struct Escaping<'a, W> {
    notation: Notation,
    out: &'a mut W,
}

impl<W: fmt::Write> fmt::Write for Escaping<'_, W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        write_escaped(text, self.notation, self.out)
    }
}

#[cfg(test)]
mod tests {
    use crate::escape::is_hazardous;
    use std::sync::{Arc, Mutex};

    use super::*;

    /// One hazardous character of each kind, and harmless ones next to them.
    const HOSTILE: &str = "a\n\r\t\x1b[31m\x00\x07\x7f\u{85}\u{9b}\u{61c}\u{200e}\u{200f}\u{2028}\u{2029}\u{202a}\u{202e}\
         \u{2066}\u{2069}z\u{a0}\u{200d}\u{2027}\u{202f}\u{2065}\u{206a}é😀\"\\";

    #[derive(Clone, Default)]
    struct Output(Arc<Mutex<Vec<u8>>>);

    impl Output {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }

        fn json(&self) -> serde_json::Value {
            serde_json::from_str(&self.text()).unwrap()
        }
    }

    impl io::Write for Output {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(levels: &str, format: Format, look: Look, events: impl FnOnce(&Handle)) -> Output {
        let output = Output::default();
        let writer = output.clone();
        let (log, handle) = build(parse_levels(levels).unwrap(), format, look, move || writer.clone());
        dispatcher::with_default(&log, || events(&handle));
        output
    }

    fn assert_one_harmless_line(text: &str) {
        let line = text.strip_suffix('\n').unwrap();
        assert!(!line.chars().any(is_hazardous), "{line:?}");
    }

    struct Shown;

    impl fmt::Debug for Shown {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(HOSTILE)
        }
    }

    impl fmt::Display for Shown {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(HOSTILE)
        }
    }

    impl std::error::Error for Shown {}

    fn hostile_events() {
        let span = tracing::info_span!("delivery", peer = %HOSTILE, later = tracing::field::Empty);
        let _entered = span.enter();
        span.record("later", HOSTILE);
        let error: &dyn std::error::Error = &Shown;
        tracing::error!(text = HOSTILE, shown = %Shown, debug = ?Shown, error, r#type = HOSTILE, "{HOSTILE}");
    }

    #[test]
    fn a_human_line_has_time_level_message_and_fields() {
        let text = logged("info", Format::Human, Look::Plain, |_| {
            tracing::info!(source = "us", events = 3, peer = %"::1", "Batch committed");
        })
        .text();
        let (time, rest) = text.split_at(27);
        time::OffsetDateTime::parse(time, &time::format_description::well_known::Rfc3339).unwrap();
        assert!(time.ends_with('Z'));
        assert_eq!(rest, "  INFO Batch committed source=\"us\" events=3 peer=::1\n");
    }

    #[test]
    fn a_message_given_as_a_field_is_not_quoted() {
        let text =
            logged("info", Format::Human, Look::Plain, |_| tracing::info!(message = "Plain", n = 1)).text();
        assert!(text.ends_with(" Plain n=1\n"), "{text}");
    }

    #[test]
    fn a_json_line_is_one_flat_object() {
        let output = logged("info", Format::Json, Look::Plain, |_| {
            tracing::warn!(source = "us", events = 3, "Batch committed");
        });
        assert_eq!(output.text().matches('\n').count(), 1);
        let mut object = output.json();
        let time = object["timestamp"].take();
        time::OffsetDateTime::parse(time.as_str().unwrap(), &time::format_description::well_known::Rfc3339)
            .unwrap();
        assert_eq!(
            object,
            serde_json::json!({
                "timestamp": null, "level": "WARN", "message": "Batch committed", "source": "us", "events": 3,
            })
        );
    }

    #[test]
    fn a_code_is_the_first_field_in_both_formats() {
        let log = |subject: &str| {
            crate::log_throttle::log_throttled!(warn, subject, code = "sink-failing", subject, "it failed");
        };
        let text = logged("info", Format::Human, Look::Plain, |_| log("a")).text();
        assert!(text.ends_with(" WARN it failed code=\"sink-failing\" unlogged=0 subject=\"a\"\n"), "{text}");
        assert_eq!(logged("info", Format::Json, Look::Plain, |_| log("b")).json()["code"], "sink-failing");
        // A value cannot imitate a code.
        let text = logged("info", Format::Human, Look::Plain, |_| log("code=\"x\"")).text();
        assert!(!text.contains("code=\"x\""), "{text}");
    }

    #[test]
    fn hostile_values_make_one_harmless_human_line() {
        let text = logged("info", Format::Human, Look::Plain, |_| hostile_events()).text();
        assert_one_harmless_line(&text);
        assert!(text.contains(r"a\u{a}\u{d}\u{9}\u{1b}[31m\u{0}\u{7}\u{7f}\u{85}\u{9b}\u{61c}"), "{text}");
        assert!(text.contains("delivery{"), "{text}");
    }

    #[test]
    fn hostile_values_make_one_harmless_json_line_and_read_back_unchanged() {
        let output = logged("info", Format::Json, Look::Plain, |_| hostile_events());
        assert_one_harmless_line(&output.text());
        assert!(output.text().contains(r"\u007f\u0085\u009b\u061c\u200e\u200f\u2028\u2029\u202a\u202e"));
        let object = output.json();
        for field in ["message", "text", "shown", "debug", "error"] {
            assert_eq!(object[field], HOSTILE, "{field}");
        }
        assert_eq!(object["spans"][0]["peer"], HOSTILE);
        assert_eq!(object["spans"][0]["later"], HOSTILE);
    }

    #[test]
    fn values_cannot_write_colours() {
        let text = logged("info", Format::Human, Look::Colours, |_| hostile_events()).text();
        assert!(text.contains("\x1b[31mERROR\x1b[0m"), "{text:?}");
        assert!(text.contains("\x1b[3mtext\x1b[0m\x1b[2m=\x1b[0m\""), "{text:?}");
        let mut rest = text;
        for sequence in ["\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[3m", "\x1b[31mERROR"] {
            rest = rest.replace(sequence, "");
        }
        assert_one_harmless_line(&rest);
    }

    #[test]
    fn the_level_can_be_changed_while_running() {
        let text = logged("warn", Format::Human, Look::Plain, |handle| {
            tracing::info!("one");
            handle.set_level("info").unwrap();
            tracing::info!("two");
            handle.set_level("inof").unwrap_err();
            tracing::info!("three");
            handle.set_level("off").unwrap();
            tracing::error!("four");
        })
        .text();
        let logged: Vec<_> = ["one", "two", "three", "four"].map(|word| text.contains(word)).into();
        assert_eq!(logged, [false, true, true, false]);
    }

    #[test]
    fn a_module_can_have_its_own_level() {
        let text = logged("auditgate::receive = debug , off", Format::Human, Look::Plain, |_| {
            tracing::debug!(target: "auditgate::receive::tls", "shown");
            tracing::error!(target: "hyper", "hidden");
        })
        .text();
        assert!(text.contains("shown") && !text.contains("hidden"));
        let levels = parse_levels("auditgate=debug").unwrap();
        assert_eq!(levels.default_level(), Some(LevelFilter::INFO));
    }

    #[test]
    fn a_misspelt_level_is_refused_by_name() {
        for (directives, named) in [
            ("", ""),
            ("inof", "inof"),
            ("info,", ""),
            ("info, a=loud", "a=loud"),
            ("=info", "=info"),
            ("a=", "a="),
        ] {
            match parse_levels(directives) {
                Err(LoggingError::Directive(directive)) => assert_eq!(directive, named),
                other => panic!("{directives:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_handle_without_its_log_returns_an_error() {
        let (log, handle) = build(Targets::new(), Format::Human, Look::Plain, io::sink);
        drop(log);
        assert!(matches!(handle.set_level("info"), Err(LoggingError::Reload(_))));
    }

    #[test]
    fn exactly_the_hazardous_characters_are_escaped() {
        let expected: Vec<u32> = [0..=0x1f, 0x7f..=0x9f, 0x61c..=0x61c, 0x200e..=0x200f, 0x2028..=0x202e]
            .into_iter()
            .chain([0x2066..=0x2069])
            .flatten()
            .collect();
        let found: Vec<u32> = ('\0'..=char::MAX).filter(|&c| is_hazardous(c)).map(u32::from).collect();
        assert_eq!(found, expected);
    }
}
