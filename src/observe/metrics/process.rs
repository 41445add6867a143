//! The standard `process_*` metrics, read from /proc/self at each rendering.

use std::fs;
use std::io;
use std::time::Duration;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Counter, Gauge};
use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};

/// Collects the metrics of this process. One whose value the system does not tell is left out.
pub(super) struct Process {
    descriptions: Vec<Desc>,
    started: Option<f64>,
}

/// Values at one moment.
#[derive(Default)]
struct Values {
    cpu_seconds: f64,
    resident_bytes: Option<f64>,
    virtual_bytes: Option<f64>,
    threads: Option<f64>,
    open_fds: Option<f64>,
    max_fds: Option<f64>,
    started: Option<f64>,
}

impl Process {
    /// Creates the collector; the time of the start is read once, since it cannot change.
    pub(super) fn new() -> prometheus::Result<Self> {
        let every = Values {
            cpu_seconds: 0.0,
            resident_bytes: Some(0.0),
            virtual_bytes: Some(0.0),
            threads: Some(0.0),
            open_fds: Some(0.0),
            max_fds: Some(0.0),
            started: Some(0.0),
        };
        let descriptions = every.metrics()?.iter().flat_map(|metric| metric.desc()).cloned().collect();
        // The system's start is known to the second only.
        let started = Stat::of_this_process().and_then(|stat| Some((boot_time()? + stat.started?).floor()));
        Ok(Self { descriptions, started })
    }

    fn values(&self) -> Values {
        let used = Duration::try_from(clock_gettime(ClockId::ProcessCPUTime));
        let Stat { threads, virtual_bytes, resident_bytes, .. } = Stat::of_this_process().unwrap_or_default();
        Values {
            cpu_seconds: used.unwrap_or_default().as_secs_f64(),
            resident_bytes,
            virtual_bytes,
            threads,
            open_fds: open_fds().ok(),
            max_fds: getrlimit(Resource::Nofile).current.map(float),
            started: self.started,
        }
    }
}

impl Collector for Process {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        // The names are valid, or `new` had failed.
        let metrics = self.values().metrics().unwrap_or_default();
        metrics.iter().flat_map(|metric| metric.collect()).collect()
    }
}

impl Values {
    fn metrics(&self) -> prometheus::Result<Vec<Box<dyn Collector>>> {
        let cpu =
            Counter::new("process_cpu_seconds_total", "CPU time of the process, in user and system mode.")?;
        cpu.inc_by(self.cpu_seconds);
        let mut metrics: Vec<Box<dyn Collector>> = vec![Box::new(cpu)];
        for (name, help, value) in [
            ("process_resident_memory_bytes", "Memory of the process that is in RAM.", self.resident_bytes),
            ("process_virtual_memory_bytes", "Size of the process's address space.", self.virtual_bytes),
            ("process_start_time_seconds", "Unix time at which the process started.", self.started),
            ("process_open_fds", "Open file descriptors.", self.open_fds),
            ("process_max_fds", "Maximum number of open file descriptors.", self.max_fds),
            ("process_threads", "Threads of the process.", self.threads),
        ] {
            if let Some(value) = value {
                let gauge = Gauge::new(name, help)?;
                gauge.set(value);
                metrics.push(Box::new(gauge));
            }
        }
        Ok(metrics)
    }
}

/// What is read from `/proc/self/stat` (proc(5)).
#[derive(Debug, Default, PartialEq)]
struct Stat {
    threads: Option<f64>,
    /// Seconds after the system's start at which the process started.
    started: Option<f64>,
    virtual_bytes: Option<f64>,
    resident_bytes: Option<f64>,
}

impl Stat {
    fn of_this_process() -> Option<Self> {
        let text = fs::read_to_string("/proc/self/stat").ok()?;
        Self::parse(&text, float(clock_ticks_per_second()), float(page_size() as u64))
    }

    fn parse(text: &str, ticks_per_second: f64, page_size: f64) -> Option<Self> {
        // The second field is the program's name in parentheses, which can hold spaces and
        // parentheses.
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let field = |number: usize| Some(float(fields.get(number - 3)?.parse().ok()?));
        Some(Self {
            threads: field(20),
            started: field(22).map(|ticks| ticks / ticks_per_second),
            virtual_bytes: field(23),
            resident_bytes: field(24).map(|pages| pages * page_size),
        })
    }
}

/// Returns the Unix time of the system's start.
fn boot_time() -> Option<f64> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    let time = text.lines().find_map(|line| line.strip_prefix("btime "))?;
    Some(float(time.trim().parse().ok()?))
}

/// Returns the number of open file descriptors, without the one that reads the directory.
fn open_fds() -> io::Result<f64> {
    Ok(float((fs::read_dir("/proc/self/fd")?.count() as u64).saturating_sub(1)))
}

#[expect(clippy::cast_precision_loss, reason = "a metric's value is an f64")]
fn float(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_move_the_fields() {
        let text = "42 (a) 1 (b c) S 1 42 42 0 -1 4194560 10 0 0 0 7 3 0 0 20 0 9 0 250 16384 3 1844 1 1";
        let stat = Stat::parse(text, 100.0, 4096.0).unwrap();
        let expected = Stat {
            threads: Some(9.0),
            started: Some(2.5),
            virtual_bytes: Some(16384.0),
            resident_bytes: Some(12288.0),
        };
        assert_eq!(stat, expected);
        assert_eq!(Stat::parse("42 (a", 100.0, 4096.0), None);
        assert_eq!(Stat::parse("42 (a) S", 100.0, 4096.0), Some(Stat::default()));
    }

    #[test]
    fn every_value_of_this_process_is_told_and_plausible() {
        let values = Process::new().unwrap().values();
        let started = values.started.unwrap();
        let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
        assert!(started < now + 1.0 && now - started < 86_400.0, "{started}, and now is {now}");
        assert!(values.cpu_seconds > 0.0);
        assert!(values.threads.unwrap() >= 1.0);
        let (resident, all) = (values.resident_bytes.unwrap(), values.virtual_bytes.unwrap());
        assert!((1e6..all).contains(&resident), "{resident} of {all}");
        let (open, most) = (values.open_fds.unwrap(), values.max_fds.unwrap());
        assert!((3.0..most).contains(&open), "{open} of {most}");
    }
}
