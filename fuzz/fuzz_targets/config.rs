//! A configuration: every problem is reported without hazardous characters, and the printed form of
//! a valid one is valid.

#![no_main]

use std::cell::LazyCell;
use std::path::PathBuf;

use auditgate::cli::check_config::{self, Args};
use auditgate::config::{Config, ConfigError, Secrets, load};
use auditgate::escape::is_hazardous;
use auditgate_fuzz::directory;
use libfuzzer_sys::{Corpus, fuzz_target};

thread_local! {
    static FILE: LazyCell<PathBuf> = LazyCell::new(|| directory().join("config.toml"));
}

fuzz_target!(|text: &[u8]| -> Corpus {
    // A configuration may name any file for secrets and keys; none is read here.
    if [&b"file"[..], b"env", b"credential"]
        .iter()
        .any(|word| text.windows(word.len()).any(|part| part == *word))
        && [&b"/proc"[..], b"/dev", b"/sys"]
            .iter()
            .any(|word| text.windows(word.len()).any(|part| part == *word))
    {
        return Corpus::Reject;
    }
    FILE.with(|file| {
        let Ok(_) = read(file, text) else { return };
        let first = effective(file);
        read(file, &first).expect("what was printed is a configuration");
        assert_eq!(effective(file), first);
    });
    Corpus::Keep
});

fn read(file: &PathBuf, text: &[u8]) -> Result<Config, ConfigError> {
    std::fs::write(file, text).expect("the file");
    load(file, &|_| None, Secrets::SkipMissing).inspect_err(|error| {
        assert!(!error.problems().is_empty());
        for line in error.to_string().lines() {
            assert!(!line.contains(is_hazardous), "{line:?}");
        }
    })
}

fn effective(file: &PathBuf) -> Vec<u8> {
    let mut out = Vec::new();
    let args = Args { file: Some(file.clone()), skip_secrets: true, ..Args::default() };
    check_config::run(&args, &mut out).expect("it was good before");
    out
}
