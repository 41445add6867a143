//! `auditgate keygen`: a key pair for producers, and for trying things out.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{EncodePrivateKey, KeypairBytes};
use rand::TryRng;
use rand::rngs::SysRng;
use zeroize::Zeroizing;

use super::exit::Failure;
use crate::escape::escape;
use crate::trust::jwks;

/// File name of the private key.
pub const KEY_FILE: &str = "signing-key.pem";
/// File name of the public key.
pub const JWKS_FILE: &str = "jwks.json";

/// Generates a new Ed25519 key pair.
///
/// Writes signing-key.pem (PKCS#8, readable by its owner only) for `auditgate send --key` and
/// jwks.json for a source's `jwks = { file = "..." }`. Files that exist are never overwritten.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The directory to write to; created when it is missing
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
}

/// Generates the key pair and prints to `out` what was written.
///
/// # Errors
/// A file exists already, or writing failed (exit code 74). No new file is left then.
pub fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let mut seed = Zeroizing::new([0; 32]);
    SysRng
        .try_fill_bytes(seed.as_mut_slice())
        .map_err(|error| Failure::io(format!("the system gives no randomness for a key: {error}")))?;
    let written = write(&args.dir, &SigningKey::from_bytes(&seed))?;
    let report = format!(
        "{}: the private key; anyone who reads it can sign\n{}: the public key\nkey ID (RFC 7638 thumbprint): {}\n",
        shown(&written.key),
        shown(&written.jwks),
        written.thumbprint
    );
    out.write_all(report.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| Failure::io(format!("the keys are written, but standard output is not: {error}")))
}

struct Written {
    key: PathBuf,
    jwks: PathBuf,
    thumbprint: String,
}

/// Writes both files or none.
///
/// The public half goes first. If the machine stops between the two, a key set without a private
/// key is left: nothing can be signed with it, and the next run reports it. The other way round, a
/// private key would be left that looks usable although no receiver has its public half.
fn write(dir: &Path, key: &SigningKey) -> Result<Written, Failure> {
    let (key_file, jwks_file) = (dir.join(KEY_FILE), dir.join(JWKS_FILE));
    let public = key.verifying_key().to_bytes();
    let thumbprint = jwks::thumbprint(&public);
    let document = jwks::document(&[(Some(thumbprint.clone()), public)]);
    // Version 1 (RFC 8410, section 7), without the public key: OpenSSL 3.0 cannot read the version
    // with it.
    let pair = KeypairBytes { secret_key: key.to_bytes(), public_key: None };
    let pem = pair
        .to_pkcs8_pem(LineEnding::LF)
        .map_err(|error| Failure::bug(format!("the new key has no PKCS#8 form: {error}")))?;

    let unwritable = |path: &Path, error: &io::Error| {
        Failure::io(format!("cannot write {}: {error}; choose another directory with --dir", shown(path)))
    };
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|error| unwritable(dir, &error))?;
    if exists(&key_file) {
        return Err(taken(&key_file, &jwks_file));
    }
    create(&jwks_file, 0o644, document.as_bytes()).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => taken(&key_file, &jwks_file),
        _ => unwritable(&jwks_file, &error),
    })?;
    if let Err(error) = create(&key_file, 0o600, pem.as_bytes()) {
        // `create` has just made it, so it is not another process's.
        let _ = fs::remove_file(&jwks_file);
        return Err(match error.kind() {
            io::ErrorKind::AlreadyExists => taken(&key_file, &jwks_file),
            _ => unwritable(&key_file, &error),
        });
    }
    if let Err(error) = File::open(dir).and_then(|dir| dir.sync_all()) {
        let _ = fs::remove_file(&key_file).and_then(|()| fs::remove_file(&jwks_file));
        return Err(unwritable(dir, &error));
    }
    Ok(Written { key: key_file, jwks: jwks_file, thumbprint })
}

/// Writes a new file to the disk. On an error the file is removed.
fn create(path: &Path, mode: u32, bytes: &[u8]) -> io::Result<()> {
    // O_EXCL: neither an existing file nor a link, dangling or not, is written to.
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).inspect_err(|_| {
        let _ = fs::remove_file(path);
    })
}

/// Returns whether something is at the path, even a dangling link, which must not be written
/// through.
fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

fn taken(key: &Path, jwks: &Path) -> Failure {
    match (exists(key), exists(jwks)) {
        (false, true) => Failure::io(format!(
            "{} exists without {KEY_FILE} next to it, as an interrupted run leaves it: remove it if nothing uses \
             it, or choose another directory with --dir",
            shown(jwks)
        )),
        _ => Failure::io(format!(
            "{} exists already and keys are never overwritten: choose another directory with --dir",
            shown(key)
        )),
    }
}

fn shown(path: &Path) -> String {
    escape(&path.to_string_lossy()).into_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::exit::Exit;
    use super::*;
    use crate::send;

    fn keygen(dir: &Path) -> Result<String, Failure> {
        let mut out = Vec::new();
        run(&Args { dir: dir.to_owned() }, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn the_private_and_the_public_key_belong_together() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("new").join("keys");
        let out = keygen(&dir).unwrap();
        let key = send::SigningKey::read(&dir.join(KEY_FILE)).unwrap();
        let parsed = jwks::parse(&fs::read(dir.join(JWKS_FILE)).unwrap(), 1).unwrap();
        assert!(parsed.refused.is_empty());
        let [public] = parsed.keys.keys() else { panic!("{parsed:?}") };
        assert_eq!(public.bytes(), &key.public_key());
        assert_eq!(public.id(), public.thumbprint());
        assert!(out.contains(public.id()) && out.contains(KEY_FILE) && out.contains(JWKS_FILE), "{out}");
        // A version 1 key always begins like this, up to the length of the seed.
        let pem = fs::read_to_string(dir.join(KEY_FILE)).unwrap();
        assert!(
            pem.starts_with("-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEI"),
            "the key is of version 2"
        );
        assert_eq!((mode(&dir), mode(&dir.join(KEY_FILE))), (0o700, 0o600));
    }

    #[test]
    fn two_runs_make_two_keys() {
        let parent = tempfile::tempdir().unwrap();
        let (one, two) = (parent.path().join("1"), parent.path().join("2"));
        keygen(&one).unwrap();
        keygen(&two).unwrap();
        assert_ne!(
            send::SigningKey::read(&one.join(KEY_FILE)).unwrap(),
            send::SigningKey::read(&two.join(KEY_FILE)).unwrap()
        );
    }

    #[test]
    fn no_file_is_overwritten_and_no_partial_pair_is_left() {
        for (present, absent, says) in
            [(KEY_FILE, JWKS_FILE, "never overwritten"), (JWKS_FILE, KEY_FILE, "interrupted run")]
        {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join(present), "mine").unwrap();
            let failure = keygen(dir.path()).unwrap_err();
            assert_eq!(failure.exit, Exit::Io);
            assert!(failure.message.contains(says), "{failure}");
            assert_eq!(fs::read(dir.path().join(present)).unwrap(), b"mine");
            assert!(!exists(&dir.path().join(absent)));
        }
        let dir = tempfile::tempdir().unwrap();
        keygen(dir.path()).unwrap();
        let before = fs::read(dir.path().join(KEY_FILE)).unwrap();
        assert!(keygen(dir.path()).unwrap_err().message.contains("never overwritten"));
        assert_eq!(fs::read(dir.path().join(KEY_FILE)).unwrap(), before);
    }

    #[test]
    fn a_link_is_not_written_through() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        std::os::unix::fs::symlink(&target, dir.path().join(KEY_FILE)).unwrap();
        assert!(keygen(dir.path()).is_err());
        assert!(!exists(&target) && !exists(&dir.path().join(JWKS_FILE)));
    }

    #[test]
    fn a_directory_that_cannot_be_created_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let failure = keygen(&file.join("keys")).unwrap_err();
        assert_eq!(failure.exit, Exit::Io);
        assert!(failure.message.contains("file/keys"), "{failure}");
    }
}
