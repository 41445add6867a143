use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use clap::Parser;

use super::*;
use crate::cli::exit::Exit;
use crate::config::{self, Secrets};
use crate::receive::tls::Certificates;

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    args: Args,
}

/// The arguments, with every directory below `dir`, and this process's user as the daemon's.
fn args(dir: &Path, others: &[&str]) -> Args {
    let user = uzers::get_current_username().unwrap().into_string().unwrap();
    let place = |name: &str| dir.join(name).display().to_string();
    let mut all = vec!["init".to_owned(), "--user".to_owned(), user];
    for (option, name) in [("--dir", "etc"), ("--data-dir", "lib"), ("--log-dir", "log")] {
        all.extend([option.to_owned(), place(name)]);
    }
    all.extend(others.iter().map(ToString::to_string));
    Command::try_parse_from(all).unwrap().args
}

fn complete(args: &Args, answers: Option<&str>) -> Result<Plan, Failure> {
    let mut answers = answers.map(str::as_bytes);
    Plan::complete(args, answers.as_mut().map(|answers| answers as &mut dyn io::BufRead))
}

const HOST: [&str; 4] = ["--host", "logs.example.com", "--region", "eu,us"];

#[test]
fn what_is_written_is_a_good_configuration_with_private_secrets() {
    let dir = tempfile::tempdir().unwrap();
    let options = [&HOST[..], &["--test-ca", "--sqlite", "--syslog", "tls://siem.example.com:6514"]].concat();
    let plan = complete(&args(dir.path(), &options), None).unwrap();
    let written = files::write(&plan).unwrap();

    let file = dir.path().join("etc/config.toml");
    let loaded = config::load(&file, &|_| None, Secrets::Require).unwrap();
    assert_eq!(loaded.sources.keys().collect::<Vec<_>>(), ["check", "konnect-eu", "konnect-us"]);
    assert_eq!(loaded.sinks.keys().collect::<Vec<_>>(), ["check", "rejects", "search", "siem", "verified"]);
    for source in loaded.sources.keys().filter(|source| *source != "check") {
        let region = source.trim_start_matches("konnect-");
        let token = fs::read_to_string(dir.path().join("etc/tokens").join(region)).unwrap();
        assert!(loaded.sources[source].authorization[0].matches(token.trim_end().as_bytes()));
    }
    let config::Tls::Files(files) = loaded.listen.tls else { panic!("no TLS") };
    let now = (crate::clock::Clock::system().wall)() / 1000;
    let examined = Certificates::examine(files, now).unwrap();
    assert_eq!((examined.doubt, examined.weaknesses), (None, vec![]));
    for private in ["etc/tokens/us", "etc/tokens/check", "etc/tls/key.pem", "etc/check/signing-key.pem"] {
        let mode = dir.path().join(private).metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o007, 0, "{private} has mode {mode:o}");
    }
    let report = report(&plan, &written);
    assert!(report.contains("https://logs.example.com:8443/konnect/eu"), "{report}");
    assert!(report.contains(&*written.tokens[0]) && report.contains("--ca "), "{report}");
}

#[test]
fn nothing_is_overwritten_and_nothing_is_left_after_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let plan = complete(&args(dir.path(), &[&HOST[..], &["--test-ca"]].concat()), None).unwrap();
    files::write(&plan).unwrap();
    let before = fs::read(dir.path().join("etc/config.toml")).unwrap();
    let again = files::write(&plan).unwrap_err();
    assert_eq!(again.exit, Exit::Io);
    assert!(again.message.contains("exists already and is not overwritten"), "{again}");
    assert_eq!(fs::read(dir.path().join("etc/config.toml")).unwrap(), before);

    // The configuration is written last, and only a token is in the way.
    fs::remove_dir_all(dir.path().join("etc")).unwrap();
    fs::create_dir_all(dir.path().join("etc/tokens")).unwrap();
    fs::write(dir.path().join("etc/tokens/check"), "mine").unwrap();
    assert_eq!(files::write(&plan).unwrap_err().exit, Exit::Io);
    let left: Vec<_> =
        fs::read_dir(dir.path().join("etc")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["tokens"]);
    assert_eq!(fs::read_to_string(dir.path().join("etc/tokens/check")).unwrap(), "mine");
    assert_eq!(fs::read_dir(dir.path().join("etc/tokens")).unwrap().count(), 1);
}

#[test]
fn what_is_not_given_is_asked() {
    let dir = tempfile::tempdir().unwrap();
    let bare = args(dir.path(), &[]);
    let plan = complete(&bare, Some("logs.example.com\nUS, sg\n\n")).unwrap();
    assert_eq!((plan.host.as_str(), plan.regions), ("logs.example.com", vec![Region::Us, Region::Sg]));
    assert_eq!(plan.certificate, Certificate::Test);
    for (answers, named) in [
        ("https://logs.example.com\n", "without https://"),
        ("logs.example.com\nus,mars\n", "`mars` is not one of"),
        ("logs.example.com\nus\n/does/not/exist\n\n", "cannot find /does/not/exist"),
    ] {
        let error = complete(&bare, Some(answers)).unwrap_err();
        assert!(error.exit == Exit::Usage && error.message.contains(named), "{error}");
    }
    let error = complete(&bare, None).unwrap_err();
    assert!(error.exit == Exit::Usage && error.message.starts_with("--host is missing"), "{error}");
}
