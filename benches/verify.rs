//! Cost of `auditgate verify` compared with bare batch verification of the same lines, on all
//! cores. The two run alternately, so that a noisy machine disturbs both.
//!
//! `cargo bench --bench verify [-- LINES [ROUNDS]]`; 200000 lines and 5 rounds by default. The
//! lines are in rotated zstd files; `verify` opens, inflates, splits, parses and verifies them and
//! counts. Prints wall time and CPU time (`/proc/self/stat`) and their ratios; before that, what
//! bare verification costs by the size of its batches.

#![expect(clippy::unwrap_used, reason = "a bench stops at the first surprise")]

mod bare;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use auditgate::send::sample;
use auditgate::trust::verify::Claim;
use auditgate::verify::judge::BATCH_SIZE;
use auditgate::wire::event::{Event, Format};
use auditgate::wire::line::Line;
use auditgate::wire::{cef, json, signature};
use ed25519_dalek::{Signer as _, SigningKey};
use rand::SeedableRng as _;
use rand::rngs::StdRng;

const FILES: usize = 8;

fn main() {
    let mut numbers = std::env::args().skip(1).filter_map(|argument| argument.parse::<usize>().ok());
    let (count, rounds) = (numbers.next().unwrap_or(200_000), numbers.next().unwrap_or(5));
    let dir = tempfile::tempdir().unwrap();
    let key = SigningKey::from_bytes(&[7; 32]);
    let lines = lines(&key, count);
    write(dir.path(), &key, &lines);
    let signed: Vec<Signed> = lines.iter().map(|line| signed(line)).collect();
    println!("{count} lines of {} bytes", lines.iter().map(Vec::len).sum::<usize>() / count.max(1));
    for together in [32, 256, 512, 1024, 2048, 4096, 8192, 16_384] {
        let (_, cpu) = measured(|| bare(&key, &signed[..count.min(100_000)], together));
        println!("bare, {together:>5} together: {:5.2} µs of CPU a line", micros(cpu, count.min(100_000)));
    }
    let (mut walls, mut cpus) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let (bare_wall, bare_cpu) = measured(|| bare(&key, &signed, BATCH_SIZE));
        let (wall, cpu) = measured(|| verify(dir.path(), count));
        println!(
            "round {round}: verify {:5.2} µs a line ({:.0} lines/s), bare {:5.2}; CPU {:5.2} and {:5.2}",
            micros(wall, count),
            count as f64 / wall.as_secs_f64(),
            micros(bare_wall, count),
            micros(cpu, count),
            micros(bare_cpu, count),
        );
        walls.push(wall.as_secs_f64() / bare_wall.as_secs_f64());
        cpus.push(cpu.as_secs_f64() / bare_cpu.as_secs_f64());
    }
    println!(
        "median: verify takes {:.2} of the time of bare verification, {:.2} of its CPU",
        median(walls),
        median(cpus)
    );
}

/// What is verified of a line, and nothing else of it.
struct Signed {
    message: Vec<u8>,
    signature: [u8; 64],
}

/// Events of every kind in every format.
fn lines(key: &SigningKey, count: usize) -> Vec<Vec<u8>> {
    let samples = sample::Samples::new(StdRng::seed_from_u64(7), || 1_767_323_045_678);
    samples
        .take(count)
        .zip(Format::ALL.into_iter().cycle())
        .map(|(event, format)| line(key, format, &event))
        .collect()
}

fn line(key: &SigningKey, format: Format, event: &Event) -> Vec<u8> {
    let mut line = match format {
        Format::Cef => cef::write(event).unwrap(),
        Format::Json => json::write(event),
        Format::Cps => json::write_wrapped(event),
    };
    let made = key.sign(&line).to_bytes();
    signature::insert(format, &mut line, &made);
    line
}

fn signed(line: &[u8]) -> Signed {
    let line = Line::parse(line).unwrap();
    let signed = line.signed().unwrap();
    Signed {
        message: signed.first.message().into_owned(),
        signature: signature::decode(signed.value).unwrap(),
    }
}

fn write(dir: &Path, key: &SigningKey, lines: &[Vec<u8>]) {
    let document = auditgate::trust::jwks::document(&[(None, key.verifying_key().to_bytes())]);
    std::fs::write(dir.join("jwks.json"), document).unwrap();
    std::fs::create_dir(dir.join("log")).unwrap();
    for (number, part) in lines.chunks(lines.len().div_ceil(FILES)).enumerate() {
        let text: Vec<u8> = part.iter().flat_map(|line| line.iter().chain(b"\n")).copied().collect();
        let name = format!("log/verified.log.20260102T030405Z-{number:04}.zst");
        std::fs::write(dir.join(name), zstd::stream::encode_all(&text[..], 0).unwrap()).unwrap();
    }
}

fn bare(key: &SigningKey, lines: &[Signed], together: usize) {
    bare::verify_all(key, lines, together, |line| Claim {
        signature: line.signature,
        first: (&line.message, &[]),
        second: None,
    });
}

fn verify(dir: &Path, count: usize) {
    let output = Command::new(env!("CARGO_BIN_EXE_auditgate"))
        .current_dir(dir)
        .args(["verify", "--jwks", "jwks.json", "log"])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(said, format!("good {count}, bad 0, unsigned 0, malformed 0\n"));
}

/// Wall time, and CPU time of this process and the children that ended meanwhile.
fn measured(work: impl FnOnce()) -> (Duration, Duration) {
    let (before, start) = (cpu(), Instant::now());
    work();
    (start.elapsed(), cpu() - before)
}

/// User and system time of this process and of its children (proc_pid_stat(5), fields 14 to 17).
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11..15].iter().map(|field| field.parse::<u64>().unwrap()).sum();
    // A tick is 10 ms on every Linux that Rust's standard library runs on.
    Duration::from_millis(ticks * 10)
}

fn micros(time: Duration, count: usize) -> f64 {
    time.as_secs_f64() * 1e6 / count as f64
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or_default()
}
