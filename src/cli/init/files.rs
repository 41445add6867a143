//! The files and directories that `auditgate init` writes: all of them or none.

use std::fmt::Write as _;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, chown, fchown};
use std::path::{Path, PathBuf};

use rand::TryRng as _;
use rand::rngs::SysRng;
use zeroize::Zeroizing;

use super::answers::{Certificate, Plan};
use crate::cli::exit::Failure;
use crate::cli::{keygen, test_ca};

/// What was written.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) paths: Vec<PathBuf>,
    /// Value of the `Authorization` header of each region, in the plan's order.
    pub(super) tokens: Vec<Zeroizing<String>>,
}

/// The account of the daemon.
#[derive(Clone, Copy)]
struct Account {
    uid: u32,
    gid: u32,
}

/// Writes everything. What was written is removed again when something fails.
///
/// # Errors
/// 2 when there is no such user, 74 when something exists already or cannot be written.
pub(super) fn write(plan: &Plan) -> Result<Written, Failure> {
    let account = account(&plan.user)?;
    let config = plan.dir.join("config.toml");
    if fs::symlink_metadata(&config).is_ok() {
        return Err(Failure::io(format!(
            "{} exists already and is not overwritten; edit it, or choose another directory with --dir",
            config.display()
        )));
    }
    let mut site = Site { account, made: Vec::new() };
    let written = site.write(plan, &config);
    if written.is_err() {
        // The newest first, so that a directory is empty when its turn comes.
        for (path, is_directory) in site.made.iter().rev() {
            let _ = if *is_directory { fs::remove_dir(path) } else { fs::remove_file(path) };
        }
    }
    written
}

/// Returns the daemon's account; none unless root runs this.
fn account(user: &str) -> Result<Option<Account>, Failure> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let unknown = || {
        Failure::usage(format!(
            "this machine has no user `{user}`; install the package, or create it: useradd --system --user-group \
             --home-dir /nonexistent --shell /usr/sbin/nologin {user}"
        ))
    };
    let found = uzers::get_user_by_name(user).ok_or_else(unknown)?;
    Ok(Some(Account { uid: found.uid(), gid: found.primary_group_id() }))
}

struct Site {
    account: Option<Account>,
    /// Paths that were made, and whether they are directories.
    made: Vec<(PathBuf, bool)>,
}

impl Site {
    fn write(&mut self, plan: &Plan, config: &Path) -> Result<Written, Failure> {
        let Plan { dir, data_dir, log_dir, .. } = plan;
        // Root's, so that the daemon cannot change its own configuration.
        self.directory(dir, 0o755, false)?;
        self.directory(data_dir, 0o750, true)?;
        self.directory(log_dir, 0o750, true)?;
        self.directory(&dir.join("tokens"), 0o750, false)?;
        let mut tokens = Vec::new();
        for region in &plan.regions {
            tokens.push(self.token(&dir.join("tokens").join(region.as_str()))?);
        }
        self.token(&dir.join("tokens/check"))?;
        if plan.certificate == Certificate::Test {
            self.directory(&dir.join("tls"), 0o750, false)?;
            let made = test_ca::make(&[&plan.host, "localhost", "127.0.0.1"]).map_err(Failure::bug)?;
            self.file(&dir.join("tls/ca.pem"), 0o644, made.authority.as_bytes())?;
            self.file(&dir.join("tls/cert.pem"), 0o644, made.chain.as_bytes())?;
            self.file(&dir.join("tls/key.pem"), 0o640, made.key.as_bytes())?;
        }
        let check = dir.join("check");
        self.directory(&check, 0o755, false)?;
        keygen::run(&keygen::Args { dir: check.clone() }, &mut io::sink())?;
        for name in [keygen::JWKS_FILE, keygen::KEY_FILE] {
            self.made.push((check.join(name), false));
        }
        self.file(config, 0o640, configuration(plan).as_bytes())?;
        let files = self.made.iter().filter(|(_, is_directory)| !is_directory);
        Ok(Written { paths: files.map(|(path, _)| path.clone()).collect(), tokens })
    }

    /// Makes a directory, unless it is there; its parent must be.
    fn directory(&mut self, path: &Path, mode: u32, is_daemons: bool) -> Result<(), Failure> {
        if path.is_dir() {
            return Ok(());
        }
        let failed = |error| Failure::io(format!("cannot make {}: {error}", path.display()));
        DirBuilder::new().mode(mode).create(path).map_err(failed)?;
        self.made.push((path.to_owned(), true));
        match self.account {
            Some(Account { uid, gid }) => {
                chown(path, Some(if is_daemons { uid } else { 0 }), Some(gid)).map_err(failed)
            }
            None => Ok(()),
        }
    }

    /// Writes a new file, which the daemon's group may read as the mode says.
    fn file(&mut self, path: &Path, mode: u32, bytes: &[u8]) -> Result<(), Failure> {
        let failed = |error: io::Error| Failure::io(format!("cannot write {}: {error}", path.display()));
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(failed)?;
        self.made.push((path.to_owned(), false));
        if let Some(Account { gid, .. }) = self.account {
            fchown(&file, Some(0), Some(gid)).map_err(failed)?;
        }
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed)
    }

    /// Writes a new random token; returns the value of the header.
    fn token(&mut self, path: &Path) -> Result<Zeroizing<String>, Failure> {
        let mut random = Zeroizing::new([0; 32]);
        SysRng
            .try_fill_bytes(random.as_mut_slice())
            .map_err(|error| Failure::io(format!("the system gives no randomness for a token: {error}")))?;
        let mut token = Zeroizing::new("Bearer ".to_owned());
        for byte in random.iter() {
            // Writing into a string cannot fail.
            let _ = write!(token, "{byte:02x}");
        }
        self.file(path, 0o640, format!("{}\n", *token).as_bytes())?;
        Ok(token)
    }
}

/// Returns the configuration's text.
fn configuration(plan: &Plan) -> String {
    let quoted = |path: &Path| toml::Value::from(path.display().to_string()).to_string();
    let (cert, key) = match &plan.certificate {
        Certificate::Own { cert, key } => (cert.clone(), key.clone()),
        Certificate::Test => (plan.dir.join("tls/cert.pem"), plan.dir.join("tls/key.pem")),
    };
    let sources: Vec<_> =
        plan.regions.iter().map(|region| format!("\"konnect-{}\"", region.as_str())).collect();
    let sources = format!("[{}]", sources.join(", "));
    let log = |name: &str| quoted(&plan.log_dir.join(name));
    let mut text = format!(
        "# Written by `auditgate init`. Every key is explained in config.example.toml and auditgate.toml(5).\n\
         data_dir = {}\n\n\
         [listen]\naddress = \"{}\"\ntls = {{ cert = {}, key = {} }}\n",
        quoted(&plan.data_dir),
        plan.address,
        quoted(&cert),
        quoted(&key)
    );
    for region in &plan.regions {
        let region = region.as_str();
        // Writing into a string cannot fail.
        let _ = write!(
            text,
            "\n[sources.konnect-{region}]\npath = \"/konnect/{region}\"\n\
             authorization = {{ file = \"tokens/{region}\" }}\n\
             jwks = {{ url = \"https://{region}.api.konghq.com/v2/audit-log-webhook/jwks.json\" }}\n"
        );
    }
    let _ = write!(
        text,
        "\n# For events of your own, signed with check/signing-key.pem: the whole way, without Konnect.\n\
         [sources.check]\npath = \"/check\"\nauthorization = {{ file = \"tokens/check\" }}\n\
         jwks = {{ file = \"check/jwks.json\" }}\n\n\
         [sinks.verified]\ntype = \"file\"\npath = {}\nformat = \"raw\"\nsources = {sources}\n\n\
         [sinks.check]\ntype = \"file\"\npath = {}\nformat = \"raw\"\nsources = [\"check\"]\n\
         rotate = {{ size = \"1MiB\", keep = 1 }}\n\n\
         [sinks.rejects]\ntype = \"file\"\nstream = \"quarantine\"\npath = {}\nformat = \"json\"\n",
        log("verified.log"),
        log("check.log"),
        log("quarantine.jsonl")
    );
    if plan.sqlite {
        let path = quoted(&plan.data_dir.join("events.db"));
        let _ = write!(
            text,
            "\n[sinks.search]\ntype = \"sqlite\"\npath = {path}\nretain = \"90d\"\nsources = {sources}\n"
        );
    }
    if let Some(address) = &plan.syslog {
        let _ =
            write!(text, "\n[sinks.siem]\ntype = \"syslog\"\naddress = \"{address}\"\nsources = {sources}\n");
    }
    text
}
