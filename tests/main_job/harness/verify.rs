//! Runs of `auditgate verify`.

use std::process::Output;

use serde_json::Value;

use super::programs::auditgate;
use super::site::Site;

/// Verifies files with the site's keys.
pub(crate) fn verify(site: &Site, files: &[&str]) -> Output {
    let mut command = auditgate();
    command.arg("verify").arg("--jwks").arg(site.path("jwks.json"));
    command.args(files.iter().map(|file| site.path(file))).output().unwrap()
}

/// Runs `verify` with the site's keys and further arguments, in the site's directory.
pub(crate) fn verify_with(site: &Site, arguments: &[&str]) -> Output {
    let mut command = auditgate();
    command
        .current_dir(site.path(""))
        .args(["verify", "--jwks", "jwks.json"])
        .args(arguments)
        .output()
        .unwrap()
}

/// Runs `verify --json`, and returns the exit code and the report.
pub(crate) fn report(site: &Site, arguments: &[&str]) -> (Option<i32>, Value) {
    let output = verify_with(site, &[&["--json"], arguments].concat());
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    (output.status.code(), report)
}

/// Returns the findings of a report: file, line and verdict.
pub(crate) fn findings(report: &Value) -> Vec<(String, u64, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let one = |finding: &Value| {
        assert!(!text(&finding["reason"]).is_empty());
        (text(&finding["file"]), finding["line"].as_u64().unwrap(), text(&finding["verdict"]))
    };
    report["findings"].as_array().unwrap().iter().map(one).collect()
}

/// Returns what a command wrote to stdout.
pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Checks that that many lines are good and none is anything else.
#[track_caller]
pub(crate) fn assert_all_good(output: &Output, count: usize) {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(stdout(output), format!("good {count}, bad 0, unsigned 0, malformed 0\n"));
}
