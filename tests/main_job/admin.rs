//! Who may look at the admin endpoint: by the mode of a socket's file, or by a token.

use std::io::{self, Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use crate::harness::client::{Client, request};
use crate::harness::daemon::Daemon;
use crate::harness::programs::auditgate;
use crate::harness::site::Site;
use crate::harness::{PATIENCE, wait_until};

/// A site with an admin endpoint of its own kind.
fn site_with(admin: &str) -> Site {
    Site::new().edit("[admin]\naddress = \"127.0.0.1:0\"", &format!("[admin]\n{admin}"))
}

fn unix_site() -> Site {
    site_with("address = \"unix://PATH\"")
}

/// Writes the socket's path into the configuration.
fn at(site: Site, path: &Path) -> Site {
    site.edit("unix://PATH", &format!("unix://{}", path.display()))
}

fn command(site: &Site) -> Command {
    let mut command = auditgate();
    command.arg("serve").arg("--config").arg(site.path("config.toml"));
    command
}

fn start(site: &Site) -> Daemon<'_> {
    let daemon = Daemon::spawn(site, command(site));
    daemon.says("listening on ");
    daemon
}

/// What the endpoint answers on a connection of its own.
fn ask(path: &Path, target: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("GET {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn is_ready(path: &Path) {
    wait_until(PATIENCE, "the daemon is ready", || match ask(path, "/readyz") {
        Ok(answer) if answer.starts_with("HTTP/1.1 200 ") => Ok(()),
        other => Err(format!("{other:?}")),
    });
}

/// Starts a daemon that must fail with 74; what it said.
fn refused(site: &Site) -> String {
    let output = command(site).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(74), "{stderr}");
    stderr
}

#[test]
fn the_endpoint_on_a_unix_socket_is_for_user_and_group() {
    let site = unix_site();
    let path = site.path("admin.sock");
    let site = at(site, &path);
    let daemon = start(&site);
    assert!(ask(&path, "/metrics").unwrap().contains("\nauditgate_build_info{"));
    is_ready(&path);
    let metadata = std::fs::metadata(&path).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o660);

    // Another daemon at the same path, with a ledger of its own.
    let other = at(unix_site(), &path);
    let said = refused(&other);
    assert!(said.contains("admin.sock") && said.contains("another process listens there"), "{said}");
    is_ready(&path);

    // What a killed daemon leaves behind is replaced.
    daemon.kill9();
    assert!(path.exists());
    let daemon = start(&site);
    is_ready(&path);
    daemon.terminate();
    assert!(!path.exists(), "an orderly end leaves nothing behind");

    std::fs::write(&path, "not yours").unwrap();
    let said = refused(&site);
    assert!(said.contains("something that is no socket"), "{said}");
    assert_eq!(site.read("admin.sock"), b"not yours");
}

#[test]
fn an_inherited_address_is_the_endpoints() {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let site = Site::new();
    let mut daemon = Daemon::spawn_on(&site, socket.try_clone().unwrap(), "admin");
    daemon.listens().unwrap();
    assert_eq!(daemon.admin, socket.local_addr().unwrap());
    assert_eq!(daemon.ask("/healthz").status, 200);
    daemon.terminate();
}

#[test]
fn an_inherited_unix_socket_stays() {
    let site = unix_site();
    let path = site.path("admin.sock");
    let site = at(site, &path);
    let socket = UnixListener::bind(&path).unwrap();
    for _ in 0..2 {
        let daemon = Daemon::spawn_on(&site, socket.try_clone().unwrap(), "admin");
        is_ready(&path);
        daemon.terminate();
        assert!(path.exists());
    }
}

#[test]
fn with_a_token_nobody_looks_without_it() {
    let site = site_with("address = \"127.0.0.1:0\"\ntoken = { file = \"admin-token\" }");
    site.write("admin-token", "let-me-see\n");
    let daemon = Daemon::start(&site);
    let ask = |headers: &[(&str, &str)]| {
        let mut client = Client::connect(daemon.admin, None).unwrap();
        client.send(&request("GET", "/metrics", headers, b""));
        client.answer()
    };
    for wrong in [None, Some("Bearer let-me-se"), Some("Basic let-me-see"), Some("let-me-see")] {
        let headers: Vec<_> = wrong.map(|value| ("Authorization", value)).into_iter().collect();
        let answer = ask(&headers);
        assert_eq!((answer.status, answer.header("www-authenticate")), (401, Some("Bearer")), "{wrong:?}");
        assert!(!String::from_utf8_lossy(&answer.body).contains("auditgate_"), "{answer:?}");
    }
    assert_eq!(ask(&[("Authorization", "Bearer let-me-see")]).status, 200);

    site.write("admin-token", "look-again\n");
    daemon.signal("HUP");
    wait_until(PATIENCE, "a reload takes the new token up", || {
        match ask(&[("Authorization", "Bearer look-again")]).status {
            200 => Ok(()),
            status => Err(status.to_string()),
        }
    });
    assert_eq!(ask(&[("Authorization", "Bearer let-me-see")]).status, 401);
    daemon.terminate();

    let checked = auditgate().arg("check-config").arg(site.path("config.toml")).output().unwrap();
    let printed = String::from_utf8(checked.stdout).unwrap();
    assert!(printed.contains("token = ") && !printed.contains("let-me-see"), "{printed}");
}

#[test]
fn other_machines_are_not_let_in_without_a_token() {
    let site = site_with("address = \"0.0.0.0:0\"");
    let output = command(&site).output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    let said = String::from_utf8(output.stderr).unwrap();
    for words in ["without `token`", "0.0.0.0:0", "add token = ", "unix:///PATH"] {
        assert!(said.contains(words), "`{words}` is not in: {said}");
    }
}
