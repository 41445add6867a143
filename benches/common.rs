//! What benchmarks of the real program share: an event, and how a figure is taken.

use std::path::Path;
use std::time::Duration;

/// An event as the producer writes it, not signed yet.
pub(crate) fn event(number: u64) -> String {
    format!(
        "2025-05-19T00:03:39Z konghq.com CEF:0|KongInc|Konnect|1.0|KongGateway|Ingress|1|rt={} src=127.0.0.6 \
         request=/konnect-api/api/control_planes/1c026712-c17d-4e30-ac27-53a6cdc56b9c/services act=POST \
         status=200 org_id=b065b594-6afc-4658-9101-5d9cf3f36b7b principal_id=87655c36-8d63-48fe-9a1e-{number:012x} \
         user_agent=Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/537.36 trace_id={} query={{}}",
        1_747_613_019_000 + number,
        1_146_381_705_542_353_508 + number / 3,
    )
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// User and system time of a process with all its threads (proc_pid_stat(5), fields 14 and 15).
pub(crate) fn cpu(process: &str) -> Duration {
    ticks(process, 11)
}

/// The two numbers of ticks in `/proc/PID/stat` from that field behind the name on.
pub(crate) fn ticks(process: &str, first: usize) -> Duration {
    let stat = std::fs::read_to_string(Path::new("/proc").join(process).join("stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[first..first + 2].iter().map(|field| field.parse::<u64>().unwrap()).sum();
    // A tick is 10 ms on every Linux that Rust's standard library runs on.
    Duration::from_millis(ticks * 10)
}
