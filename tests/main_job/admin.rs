//! Access to the admin endpoint: by the mode of the socket's file, or by a token.

use std::io::{self, Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use crate::harness::client::{Client, request};
use crate::harness::daemon::{Daemon, refused, serve};
use crate::harness::programs::auditgate;
use crate::harness::site::Site;
use crate::harness::{TEST_TIMEOUT, assert_contains, wait_until};

/// Returns a site with these lines in `[admin]`.
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

fn start(site: &Site) -> Daemon<'_> {
    let daemon = Daemon::spawn(site, serve(site));
    daemon.wait_for_log("code=\"listening\"");
    daemon
}

/// Sends a GET on a new connection, and returns the response.
fn ask(path: &Path, target: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(TEST_TIMEOUT))?;
    stream.write_all(format!("GET {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn wait_until_ready(path: &Path) {
    wait_until("the daemon is ready", || match ask(path, "/readyz") {
        Ok(answer) if answer.starts_with("HTTP/1.1 200 ") => Ok(()),
        other => Err(format!("{other:?}")),
    });
}

#[test]
fn the_endpoint_on_a_unix_socket_is_for_user_and_group() {
    let site = unix_site();
    let path = site.path("admin.sock");
    let site = at(site, &path);
    let daemon = start(&site);
    assert!(ask(&path, "/metrics").unwrap().contains("\nauditgate_build_info{"));
    wait_until_ready(&path);
    let metadata = std::fs::metadata(&path).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o660);

    // Another daemon at the same path, with a ledger of its own.
    let other = at(unix_site(), &path);
    assert_contains(&refused(&other, 74), &["admin.sock", "another process listens there"]);
    wait_until_ready(&path);

    // The socket's file of a killed daemon is replaced.
    daemon.kill9();
    assert!(path.exists());
    let daemon = start(&site);
    wait_until_ready(&path);
    daemon.terminate();
    assert!(!path.exists(), "a normal exit removes the file");

    std::fs::write(&path, "not yours").unwrap();
    assert_contains(&refused(&site, 74), &["a file that is not a socket exists there"]);
    assert_eq!(site.read("admin.sock"), b"not yours");
}

#[test]
fn an_inherited_socket_is_used_by_the_endpoint() {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let site = Site::new();
    let mut daemon = Daemon::spawn_on(&site, socket.try_clone().unwrap(), "admin");
    daemon.listens().unwrap();
    assert_eq!(daemon.admin, socket.local_addr().unwrap());
    assert_eq!(daemon.ask("/healthz").status, 200);
    daemon.terminate();
}

#[test]
fn an_inherited_unix_socket_is_not_removed() {
    let site = unix_site();
    let path = site.path("admin.sock");
    let site = at(site, &path);
    let socket = UnixListener::bind(&path).unwrap();
    for _ in 0..2 {
        let daemon = Daemon::spawn_on(&site, socket.try_clone().unwrap(), "admin");
        wait_until_ready(&path);
        daemon.terminate();
        assert!(path.exists());
    }
}

#[test]
fn with_a_token_requests_without_it_are_refused() {
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
    wait_until("a reload takes the new token up", || {
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
fn an_address_that_other_machines_reach_needs_a_token() {
    let site = site_with("address = \"0.0.0.0:0\"");
    let said = refused(&site, 78);
    assert_contains(&said, &["without `token`", "0.0.0.0:0", "add token = ", "unix:///PATH"]);
}
