//! The OpenMetrics text format, version 1.0, which the `prometheus` crate does not write. Source:
//! the OpenMetrics specification, sections "Text format" and "Canonical numbers".

use std::fmt::Write as _;

use prometheus::proto::{LabelPair, MetricFamily, MetricType};

/// Writes the families, which must be sorted by name as the registry returns them.
pub(super) fn encode(families: &[MetricFamily]) -> String {
    let mut out = String::with_capacity(64 << 10);
    for family in families {
        write_family(&mut out, family);
    }
    out.push_str("# EOF\n");
    out
}

fn write_family(out: &mut String, family: &MetricFamily) {
    let (kind, name) = match family.get_field_type() {
        // The suffix belongs to the sample and not to the family.
        MetricType::COUNTER => ("counter", family.name().strip_suffix("_total").unwrap_or(family.name())),
        MetricType::GAUGE => ("gauge", family.name()),
        MetricType::HISTOGRAM => ("histogram", family.name()),
        // None is declared.
        MetricType::SUMMARY | MetricType::UNTYPED => return,
    };
    // Writing into a string cannot fail.
    let _ = writeln!(out, "# TYPE {name} {kind}\n# HELP {name} {}", escape(family.help()));
    for metric in family.get_metric() {
        let labels = metric.get_label();
        let mut sample = |suffix: &str, le: Option<f64>, value: &str| {
            write_sample(out, &format!("{name}{suffix}"), labels, le, value);
        };
        match family.get_field_type() {
            MetricType::COUNTER => sample("_total", None, &number(metric.get_counter().get_value())),
            MetricType::HISTOGRAM => {
                let histogram = metric.get_histogram();
                for bucket in histogram.get_bucket() {
                    sample("_bucket", Some(bucket.upper_bound()), &bucket.cumulative_count().to_string());
                }
                let count = histogram.get_sample_count().to_string();
                sample("_bucket", Some(f64::INFINITY), &count);
                sample("_sum", None, &number(histogram.get_sample_sum()));
                sample("_count", None, &count);
            }
            _ => sample("", None, &number(metric.get_gauge().get_value())),
        }
    }
}

fn write_sample(out: &mut String, name: &str, labels: &[LabelPair], le: Option<f64>, value: &str) {
    out.push_str(name);
    let labels = labels.iter().map(|label| format!("{}=\"{}\"", label.name(), escape(label.value())));
    let bound = le.map(|bound| format!("le=\"{}\"", canonical(bound)));
    let labels: Vec<String> = labels.chain(bound).collect();
    if !labels.is_empty() {
        let _ = write!(out, "{{{}}}", labels.join(","));
    }
    let _ = writeln!(out, " {value}");
}

/// Returns a bound as every implementation writes it, since it is compared as text.
fn canonical(bound: f64) -> String {
    match bound {
        f64::INFINITY => "+Inf".to_owned(),
        // As Go's `%g`, which has exponents from 10^6 on for whole numbers.
        _ if bound.abs() < 1e6 => format!("{bound:?}"),
        _ => {
            let text = format!("{bound:e}");
            let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
            format!("{digits}e+{exponent:0>2}")
        }
    }
}

fn number(value: f64) -> String {
    match value {
        f64::INFINITY => "+Inf".to_owned(),
        f64::NEG_INFINITY => "-Inf".to_owned(),
        value => value.to_string(),
    }
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use prometheus::{Gauge, Histogram, HistogramOpts, IntCounterVec, Opts, Registry};

    use super::*;

    #[test]
    fn each_type_is_written_as_specified() {
        let registry = Registry::new();
        let counter = IntCounterVec::new(Opts::new("a_total", "A \"b\\c\"."), &["x", "y"]).unwrap();
        counter.with_label_values(&["1", "q\"\n\\"]).inc_by(3);
        let gauge = Gauge::new("b_seconds", "B.").unwrap();
        gauge.set(1.5);
        let options = HistogramOpts::new("c_seconds", "C.").buckets(vec![0.0001, 0.25, 1.0, 691_200.0]);
        let histogram = Histogram::with_opts(options).unwrap();
        histogram.observe(0.5);
        registry.register(Box::new(counter)).unwrap();
        registry.register(Box::new(gauge)).unwrap();
        registry.register(Box::new(histogram)).unwrap();
        let expected = r#"# TYPE a counter
# HELP a A \"b\\c\".
a_total{x="1",y="q\"\n\\"} 3
# TYPE b_seconds gauge
# HELP b_seconds B.
b_seconds 1.5
# TYPE c_seconds histogram
# HELP c_seconds C.
c_seconds_bucket{le="0.0001"} 0
c_seconds_bucket{le="0.25"} 0
c_seconds_bucket{le="1.0"} 1
c_seconds_bucket{le="691200.0"} 1
c_seconds_bucket{le="+Inf"} 1
c_seconds_sum 0.5
c_seconds_count 1
# EOF
"#;
        assert_eq!(encode(&registry.gather()), expected);
        assert_eq!(canonical(2.5e6), "2.5e+06");
    }
}
