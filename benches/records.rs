//! Cost of turning lines into what sinks write, without any I/O: one thread, batches of 500 sample
//! events, CEF, JSON and CPS in turn.
//!
//! `cargo bench --bench records [-- ROUNDS]`; 20 rounds by default. Prints the CPU time an event of
//! each stage. Of each batch the fastest round counts, and the rounds take the stages alternately:
//! what else the machine does disturbs all of them, and little.

#![expect(clippy::unwrap_used, reason = "a bench stops at the first surprise")]

use std::hint::black_box;
use std::time::Duration;

use auditgate::deliver::file::{FileOptions, FileSink, Rendering};
use auditgate::deliver::sink::{Item, Sink};
use auditgate::deliver::syslog::{SyslogOptions, SyslogSink};
use auditgate::ledger::{Position, Resume};
use auditgate::send::sample::Samples;
use auditgate::wire::event::{Event, Format, Verdict};
use auditgate::wire::line::Line;
use auditgate::wire::{cef, json, signature};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rustix::time::{ClockId, clock_gettime};

const LINES: usize = 20_000;
const EVENTS_A_BATCH: usize = 500;

/// Does its work for one batch of lines.
type Stage = Box<dyn FnMut(&[Vec<u8>])>;

fn main() {
    let rounds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(20);
    let dir = tempfile::tempdir().unwrap();
    for formats in [&Format::ALL[..1], &Format::ALL[1..2], &Format::ALL] {
        let samples = Samples::new(StdRng::seed_from_u64(7), || 1_767_323_045_678);
        let lines: Vec<Vec<u8>> = samples
            .take(LINES)
            .zip(formats.iter().cycle())
            .map(|(event, format)| line(*format, &event))
            .collect();
        let size = lines.iter().map(Vec::len).sum::<usize>() / LINES;
        let names: Vec<&str> = formats.iter().map(|format| format.as_str()).collect();
        println!("{} of {size} bytes", names.join(", "));
        let file = |name: &str, format| {
            let path = dir.path().join(name);
            let options: FileOptions = toml::from_str(&format!("path = {path:?}\nformat = \"raw\"")).unwrap();
            let options = FileOptions { format, ..options };
            FileSink::new(options, (None, None), std::sync::Arc::new(|| 0))
        };
        let syslog = |structured: bool| {
            let options: SyslogOptions =
                toml::from_str(&format!("address = \"tcp://127.0.0.1:9\"\nstructured_data = {structured}"))
                    .unwrap();
            SyslogSink::new(options).unwrap()
        };
        let mut stages: [(&str, Stage); 5] = [
            ("parse", Box::new(parse)),
            ("raw line", Box::new(collected(file("raw", Rendering::Raw)))),
            ("JSON record", Box::new(collected(file("json", Rendering::Json)))),
            ("syslog message", Box::new(collected(syslog(false)))),
            ("syslog message with structured data", Box::new(collected(syslog(true)))),
        ];
        let mut sums = [Duration::ZERO; 5];
        for batch in lines.chunks(EVENTS_A_BATCH) {
            let mut best = [Duration::MAX; 5];
            for _ in 0..rounds {
                for ((_, stage), best) in stages.iter_mut().zip(&mut best) {
                    let before = cpu();
                    stage(batch);
                    *best = (cpu() - before).min(*best);
                }
            }
            sums.iter_mut().zip(best).for_each(|(sum, best)| *sum += best);
        }
        for ((name, _), sum) in stages.iter().zip(sums) {
            println!("  {name:<36} {:5.2} µs", sum.as_secs_f64() * 1e6 / LINES as f64);
        }
    }
}

fn line(format: Format, event: &Event) -> Vec<u8> {
    let mut line = match format {
        Format::Cef => cef::write(event).unwrap(),
        Format::Json => json::write(event),
        Format::Cps => json::write_wrapped(event),
    };
    signature::insert(format, &mut line, &[7; 64]);
    line
}

fn parse(batch: &[Vec<u8>]) {
    for line in batch {
        black_box(Line::parse(line).unwrap());
    }
}

/// Pushes batches into a sink, which forgets them.
fn collected(mut sink: impl Sink) -> impl FnMut(&[Vec<u8>]) {
    let start = Resume { position: Position::default(), mark: Vec::new() };
    move |batch| {
        let items: Vec<Item<'_>> = batch
            .iter()
            .map(|raw| Item {
                behind: Position::default(),
                received_at: 1_767_323_045_678,
                source: "konnect-us",
                verdict: &Verdict::Verified { key: 0 },
                key_id: Some("b065b594-6afc-4658-9101-5d9cf3f36b7b"),
                raw,
            })
            .collect();
        sink.push_all(&items);
        black_box(sink.collected());
        sink.resume(&start).unwrap();
    }
}

/// CPU time of this process with all its threads.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.try_into().unwrap(), time.tv_nsec.try_into().unwrap())
}
