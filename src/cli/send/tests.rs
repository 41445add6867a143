use clap::Parser;
use ed25519_dalek::pkcs8::EncodePrivateKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;

use super::super::exit::Exit;
use super::delivery::{self, AUTHORIZATION_VARIABLE};
use super::*;
use crate::send::receiver::{Answer, Receiver};
use crate::wire::event::Reason;
use crate::wire::line::Line;
use crate::wire::{record, signature};

#[derive(clap::Parser)]
struct Command {
    #[command(flatten)]
    args: Args,
}

/// Result and output of a run.
struct RunOutput {
    result: Result<(), Failure>,
    out: String,
    complaints: String,
}

struct Fixture {
    dir: tempfile::TempDir,
    receiver: Receiver,
    stdin: Vec<u8>,
    variable: Option<&'static str>,
}

impl Fixture {
    fn new(script: impl Into<Vec<Answer>>) -> Self {
        let fixture = Self {
            dir: tempfile::tempdir().unwrap(),
            receiver: Receiver::start(script),
            stdin: Vec::new(),
            variable: None,
        };
        let pem = key().0.to_pkcs8_pem(LineEnding::LF).unwrap();
        fixture.file("key.pem", pem.as_bytes());
        fixture
    }

    fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn run(&self, args: &[&str]) -> RunOutput {
        let to = self.receiver.endpoint().to_string();
        let all = [&["send", "--to", &to, "--linger", "1h"], args].concat();
        let args = Command::try_parse_from(all).unwrap_or_else(|error| panic!("{error}")).args;
        let (mut out, mut complaints) = (Vec::new(), Vec::new());
        let stdin = Box::new(io::Cursor::new(self.stdin.clone()));
        let console = console(&mut out, &mut complaints);
        let environment = |name: &str| {
            assert_eq!(name, AUTHORIZATION_VARIABLE);
            self.variable.map(OsString::from)
        };
        let result = send(&args, &environment, stdin, console);
        let text = |bytes| String::from_utf8(bytes).unwrap();
        RunOutput { result, out: text(out), complaints: text(complaints) }
    }

    fn lines(&self) -> Vec<String> {
        self.receiver.requests().iter().flat_map(crate::send::receiver::Request::lines).collect()
    }
}

/// Returns a console that is no terminal.
fn console<'a>(out: &'a mut dyn Write, complaints: &'a mut dyn Write) -> Console<'a> {
    Console { out, complaints, waiting: indicatif::ProgressBar::hidden(), is_one_terminal: false }
}

fn key() -> SigningKey {
    SigningKey::from_seed(&[9; 32])
}

fn verifies(line: &str) -> bool {
    let parsed = Line::parse(line.as_bytes()).unwrap();
    let Some(signed) = parsed.signed() else { return false };
    let signature = ed25519_dalek::Signature::from_bytes(&signature::decode(signed.value).unwrap());
    key().0.verifying_key().verify_strict(&signed.first.message(), &signature).is_ok()
}

const CEF: &str = "2023-05-19T00:03:39Z konghq.com CEF:0|KongInc|Konnect|1.0|konnect|Authz.usage|1|rt=1684454619000 src=::1 action=list granted=true org_id=o principal_id=p user_agent=a b trace_id=1 sig=old";
const JSON: &str =
    r#"{"name":"Ingress","rt":1684454619000,"sig":"old","trace_id":18446744073709551616,"user_agent":"x"}"#;
const CPS: &str = r#"{"event":{"name":"Ingress","rt":"1684454619000","trace_id":"2"}}"#;

#[test]
fn generated_events_are_signed_and_receipts_printed() {
    let fixture = Fixture::new([Answer::receipt(3, 1, 0), Answer::receipt(1, 0, 0)]);
    let key = fixture.path("key.pem");
    let output = fixture.run(&["--key", &key, "--generate", "5", "--seed", "1", "--batch-events", "4"]);
    output.result.unwrap();
    let (load, results): (Vec<_>, Vec<_>) =
        output.out.split_inclusive('\n').partition(|line| line.contains(" events/s over "));
    assert!(load.len() == 1 && load[0].contains(" s; answers after p50 "), "{load:?}");
    assert_eq!(
        results.concat(),
        "batch 1: 4 events, 200, accepted 3, duplicates 1, quarantined 0\n\
         batch 2: 1 event, 200, accepted 1, duplicates 0, quarantined 0\n\
         5 events in 2 batches: accepted 4, duplicates 1, quarantined 0\n"
    );
    assert_eq!(output.complaints, "");
    let lines = fixture.lines();
    assert_eq!(lines.len(), 5);
    assert!(lines.iter().all(|line| line.contains(" CEF:0|KongInc|Konnect|") && verifies(line)));
}

#[test]
fn events_keep_their_format_and_get_a_new_signature() {
    let mut fixture = Fixture::new([Answer::receipt(3, 0, 0)]);
    fixture.stdin = format!("{CEF}\r\n\n{JSON}\n{CPS}").into_bytes();
    fixture.run(&["--key", &fixture.path("key.pem"), "--quiet"]).result.unwrap();
    let lines = fixture.lines();
    let formats: Vec<Format> =
        lines.iter().map(|line| Line::parse(line.as_bytes()).unwrap().format()).collect();
    assert_eq!(formats, Format::ALL);
    assert!(lines.iter().all(|line| verifies(line) && !line.contains("old")));
    assert!(lines[1].contains("\"18446744073709551616\""), "{}", lines[1]);
}

#[test]
fn events_are_converted_and_missing_header_fields_are_filled_in() {
    let fixture = Fixture::new([Answer::receipt(2, 0, 0)]);
    let file = fixture.file("events", format!("{JSON}\n{CPS}\n").as_bytes());
    fixture.run(&["--unsigned", "--format", "cef", &file]).result.unwrap();
    assert_eq!(
        fixture.lines(),
        [
            "2023-05-19T00:03:39Z konghq.com CEF:0|KongInc|Konnect|1.0|Ingress|1|rt=1684454619000 trace_id=18446744073709551616 user_agent=x",
            "2023-05-19T00:03:39Z konghq.com CEF:0|KongInc|Konnect|1.0|Ingress|1|rt=1684454619000 trace_id=2",
        ]
    );
}

#[test]
fn an_invalid_line_is_reported_and_the_others_are_sent() {
    let fixture = Fixture::new([Answer::receipt(2, 0, 0)]);
    let long = format!("{{\"a\":\"{}\"}}", "x".repeat(1000));
    let longer = "y".repeat(80_000);
    let text = format!("{JSON}\n\nno event\x1b\n{{\"a\":1,\"a\":2}}\n{long}\n{longer}\n{CPS}\n");
    let file = fixture.file("events", text.as_bytes());
    let output = fixture.run(&["--unsigned", "--batch-bytes", "1000B", &file]);
    let failure = output.result.unwrap_err();
    assert_eq!((failure.exit, failure.message.as_str()), (Exit::Finding, "4 input lines could not be sent"));
    assert_eq!(fixture.lines().len(), 2);
    let said: Vec<&str> = output.complaints.lines().collect();
    assert_eq!(said.len(), 4, "{}", output.complaints);
    for (said, what) in said.iter().zip([
        "events, line 3: cannot be sent: neither a JSON object nor a CEF header",
        "events, line 4: cannot be sent: the keys a are ambiguous",
        "events, line 5: cannot be sent: its 1108 bytes do not fit into a batch of at most 1000",
        "events, line 6: cannot be sent: it is longer than 71536 bytes",
    ]) {
        assert!(said.contains(what), "{said}");
    }
}

#[test]
fn raw_lines_are_sent_unchanged() {
    let fixture = Fixture::new([Answer::new(202, "", "")]);
    let file = fixture.file("raw", b"no event\r\n \n{} \r\r\n");
    let output = fixture.run(&["--input-format", "raw", &file]);
    output.result.unwrap();
    assert_eq!(fixture.lines(), ["no event", "{} \r"]);
    assert_eq!(
        output.out,
        "batch 1: 2 events, 202, no receipt\n\
         2 events in 1 batch: accepted 0, duplicates 0, quarantined 0, without a receipt 2\n"
    );
}

#[test]
fn quarantined_lines_are_sent_again() {
    let mut fixture = Fixture::new([Answer::receipt(4, 0, 0)]);
    let (bad, whole) = (Reason::BadSignature, Reason::UndecodableBody);
    let raws: [(&[u8], Reason); 4] = [
        (CEF.as_bytes(), bad),
        (b"{\n}", whole),
        ("\u{202e}x\u{1b}".as_bytes(), bad),
        (b"\xef\xbb\xbfa\r\n\nb", bad),
    ];
    for (raw, reason) in raws {
        let record = record::Quarantined { received_at: 0, source: "us", reason, detail: "no key fits", raw };
        record::write_quarantined(&mut fixture.stdin, &record);
    }
    fixture.stdin.extend_from_slice(JSON.as_bytes());
    let output = fixture.run(&["--input-format", "quarantine", "-"]);
    assert_eq!(output.result.unwrap_err().message, "2 input lines could not be sent");
    assert_eq!(fixture.lines(), [CEF, "\u{202e}x\u{1b}", "a", "b"]);
    assert!(
        output.complaints.contains("standard input, line 2: cannot be sent: it is a body without an event")
    );
    assert!(
        output.complaints.contains("standard input, line 5: cannot be sent: it is not a quarantine record")
    );
}

#[test]
fn compressed_files_are_decompressed() {
    let fixture = Fixture::new([Answer::receipt(3, 0, 0)]);
    let mut record = Vec::new();
    let (raw, reason) = (CEF.as_bytes(), Reason::BadSignature);
    let quarantined = record::Quarantined { received_at: 0, source: "us", reason, detail: "", raw };
    record::write_quarantined(&mut record, &quarantined);
    let zstd = fixture.file("q.jsonl.zst", &zstd::encode_all(&record[..], 1).unwrap());
    let gzip = fixture.file("q.gz", &crate::wire::batch::encode(&record).unwrap());
    let plain = fixture.file("q", &record);
    fixture.run(&["--input-format", "quarantine", &zstd, &gzip, &plain]).result.unwrap();
    assert_eq!(fixture.lines(), [CEF; 3]);
}

#[test]
fn undelivered_events_are_counted() {
    let fixture = Fixture::new([Answer::receipt(2, 0, 0), Answer::new(413, "", "")]);
    let args = ["--unsigned", "--generate", "5", "--batch-events", "2"];
    let output = fixture.run(&args);
    let failure = output.result.unwrap_err();
    let host = fixture.receiver.endpoint().authority().to_owned();
    assert_eq!(failure.exit, Exit::Finding);
    assert_eq!(
        failure.message,
        format!(
            "3 events in 2 of 3 batches could not be delivered, the first because {host} answered 413: send smaller batches"
        )
    );
    assert!(output.out.contains("batch 2: 2 events, not delivered, 1 attempt: "), "{}", output.out);
    assert!(output.out.ends_with("duplicates 0, quarantined 0, not delivered 3\n"), "{}", output.out);

    // On a terminal, the line of the batch has said why.
    let args = Command::try_parse_from(
        [&["send", "--to", &fixture.receiver.endpoint().to_string()], &args[..]].concat(),
    );
    let (mut out, mut complaints) = (Vec::new(), Vec::new());
    let console = Console { is_one_terminal: true, ..console(&mut out, &mut complaints) };
    let failure = send(&args.unwrap().args, &|_| None, Box::new(io::empty()), console).unwrap_err();
    assert_eq!(failure.message, "5 events in 3 of 3 batches could not be delivered, the first is batch 1");
}

#[test]
fn a_refusal_of_every_batch_ends_the_run_and_is_said_once() {
    for (status, advice) in [(401, "check the authorization"), (404, "check the path of the URL")] {
        let fixture = Fixture::new([Answer::receipt(2, 0, 0), Answer::new(status, "", "")]);
        let output = fixture.run(&["--unsigned", "--generate", "5000", "--batch-events", "2"]);
        let failure = output.result.unwrap_err();
        let host = fixture.receiver.endpoint().authority().to_owned();
        assert_eq!(failure.exit, Exit::Finding);
        assert_eq!(
            failure.message,
            format!(
                "{host} answered {status}: {advice}; the receiver would refuse every batch, so sending has stopped at \
                 batch 2: 2 events delivered before it, 2 events refused, the rest not sent"
            )
        );
        assert!(output.out.ends_with("batch 2: 2 events, not delivered, 1 attempt\n"), "{}", output.out);
        assert_eq!(output.complaints, "");
        // The next batch may have been posted already.
        assert!((2..=3).contains(&fixture.receiver.requests().len()));
    }
}

#[test]
fn quarantined_lines_are_a_warning_or_a_finding() {
    let quarantined = "3 of 5 lines quarantined; the receiver's output of the stream `quarantine` has the reasons (there: \
                       auditgate quarantine list)";
    let fixture = Fixture::new([Answer::receipt(2, 0, 3)]);
    let output = fixture.run(&["--unsigned", "--generate", "5"]);
    output.result.unwrap();
    assert_eq!(output.complaints, format!("auditgate: warning: {quarantined}\n"));
    let output = fixture.run(&["--unsigned", "--generate", "5", "--strict", "--quiet"]);
    let failure = output.result.unwrap_err();
    assert_eq!((failure.exit, failure.message.as_str()), (Exit::Finding, quarantined));
    assert_eq!((output.out, output.complaints), (String::new(), String::new()));
}

#[test]
fn retries_can_be_turned_off() {
    let fixture = Fixture::new([Answer::new(500, "", "")]);
    let output = fixture.run(&["--unsigned", "--generate", "1", "--retries", "0"]);
    assert_eq!(output.result.unwrap_err().exit, Exit::Finding);
    assert_eq!(fixture.receiver.requests().len(), 1);
}

#[test]
fn the_authorization_comes_from_one_of_three_places() {
    let mut fixture = Fixture::new([Answer::receipt(1, 0, 0)]);
    fixture.variable = Some(" Bearer variable\n");
    let file = fixture.file("token", b"Splunk file \n");
    for (args, wanted) in [
        (&["--authorization", "Basic x y"][..], "Basic x y"),
        (&["--authorization-file", &file], "Splunk file"),
        (&[], "Bearer variable"),
    ] {
        fixture.run(&[&["--unsigned", "--generate", "1"], args].concat()).result.unwrap();
        let head = fixture.receiver.requests().last().unwrap().head.clone();
        assert!(head.contains(&format!("authorization: {wanted}\r\n")), "{head}");
    }
    fixture.variable = None;
    fixture.run(&["--unsigned", "--generate", "1"]).result.unwrap();
    assert!(!fixture.receiver.requests().last().unwrap().head.contains("authorization"));
    let args = Command::try_parse_from(["send", "--to", "x", "--authorization", "hunter2"]).unwrap().args;
    assert!(!format!("{args:?}").contains("hunter2"));
}

#[test]
fn conflicting_arguments_are_refused_before_any_post() {
    let fixture = Fixture::new([]);
    let key = fixture.path("key.pem");
    for args in [
        &["--key", &key, "--unsigned"][..],
        &["--unsigned", "--generate", "1", "x"],
        &["--unsigned", "--seed", "1"],
        &["--unsigned", "--authorization", "a", "--authorization-file", &key],
    ] {
        let all = [&["send", "--to", "http://localhost/"], args].concat();
        assert!(Command::try_parse_from(all).is_err(), "{args:?}");
    }
    for args in [
        &["x"][..],
        &["--input-format", "raw", "--key", &key],
        &["--input-format", "raw", "--format", "cef"],
        &["--input-format", "quarantine", "--generate", "1"],
        &["--unsigned", "-", "-"],
    ] {
        assert_eq!(fixture.run(args).result.unwrap_err().exit, Exit::Usage, "{args:?}");
    }
    let args = Command::try_parse_from(["send", "--to", "http://example.com/", "--unsigned"]).unwrap().args;
    let failure = run(&args, &mut Vec::new()).unwrap_err();
    assert_eq!(failure.exit, Exit::Usage);
    assert!(failure.message.starts_with("--to: "), "{failure}");
    for size in ["0", "1MB", "x", "-1", "1 KiB x"] {
        assert!(delivery::size(size).is_err(), "{size}");
    }
    assert_eq!(delivery::size("2KiB").map(std::num::NonZero::get), Ok(2048));
}

#[test]
fn unusable_files_have_their_exit_codes() {
    let fixture = Fixture::new([Answer::receipt(1, 0, 0)]);
    let (missing, garbage) = (fixture.path("missing"), fixture.file("garbage", b"\x00\n\n"));
    for (args, exit) in [
        (&["--key", &missing][..], Exit::Config),
        (&["--key", &garbage], Exit::Config),
        (&["--unsigned", "--authorization-file", &missing], Exit::Config),
        (&["--unsigned", "--authorization-file", &garbage], Exit::Config),
        (&["--unsigned", &missing], Exit::Io),
        (&["--unsigned", fixture.dir.path().to_str().unwrap()], Exit::Io),
    ] {
        let failure = fixture.run(args).result.unwrap_err();
        assert_eq!(failure.exit, exit, "{failure}");
        assert!(failure.message.contains(fixture.dir.path().to_str().unwrap()), "{failure}");
    }
    let args =
        Command::try_parse_from(["send", "--to", "https://localhost/", "--unsigned", "--ca", &garbage]);
    let failure = run(&args.unwrap().args, &mut Vec::new()).unwrap_err();
    assert_eq!(failure.exit, Exit::Config, "{failure}");
    assert!(failure.message.contains("garbage"), "{failure}");
    assert_eq!(fixture.receiver.requests().len(), 0);
}

#[test]
fn a_read_error_is_reported_after_the_lines_before_it_are_sent() {
    struct FailsAfterALine(bool);
    impl Read for FailsAfterALine {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if std::mem::replace(&mut self.0, true) {
                return Err(io::Error::other("disk on fire"));
            }
            buffer[..2].copy_from_slice(b"x\n");
            Ok(2)
        }
    }
    let fixture = Fixture::new([Answer::receipt(0, 0, 1)]);
    let to = fixture.receiver.endpoint().to_string();
    let args = Command::try_parse_from(["send", "--to", &to, "--input-format", "raw"]).unwrap().args;
    let (mut out, mut complaints) = (Vec::new(), Vec::new());
    let stdin = Box::new(FailsAfterALine(false));
    let failure = send(&args, &|_| None, stdin, console(&mut out, &mut complaints)).unwrap_err();
    assert_eq!(failure.exit, Exit::Io);
    assert!(failure.message.starts_with("cannot read standard input beyond line 1: disk on fire"));
    assert_eq!(fixture.lines(), ["x"]);
}

#[test]
fn a_closed_standard_output_loses_no_event() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let fixture = Fixture::new([Answer::receipt(1, 0, 0)]);
    let to = fixture.receiver.endpoint().to_string();
    let all = ["send", "--to", &to, "--unsigned", "--generate", "3", "--batch-events", "1"];
    let args = Command::try_parse_from(all).unwrap().args;
    let mut complaints = Vec::new();
    let mut closed = Closed;
    let console = console(&mut closed, &mut complaints);
    let failure = send(&args, &|_| None, Box::new(io::empty()), console).unwrap_err();
    assert_eq!(failure.exit, Exit::Io);
    assert!(failure.message.starts_with("everything was delivered"), "{failure}");
    assert_eq!(fixture.lines().len(), 3);
}
