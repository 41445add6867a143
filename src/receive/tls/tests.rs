use super::*;
use crate::net::authority::Authority;

#[test]
fn the_expiry_of_a_certificate_is_read() {
    let expiring = |year| {
        let mut parameters = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
        parameters.not_before = rcgen::date_time_ymd(1970, 1, 1);
        parameters.not_after = rcgen::date_time_ymd(year, 2, 3);
        let made = parameters.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap();
        (made.der().to_vec(), parameters.not_after.unix_timestamp())
    };
    // UTCTime has a year of two digits and ends in 2049; later years are GeneralizedTime (RFC 5280,
    // section 4.1.2.5).
    for year in [1999, 2000, 2049, 2050, 4096] {
        let (certificate, expected) = expiring(year);
        assert_eq!(not_after(&certificate), Some(expected), "{year}");
    }
    let (certificate, _) = expiring(2030);
    for cut in 0..certificate.len() {
        // A truncated certificate must not panic.
        let _ = not_after(&certificate[..cut]);
    }
    assert_eq!(not_after(b""), None);
    assert_eq!(not_after(&[0x30, 0xff]), None);
}

#[test]
fn each_fault_names_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let other = rcgen::KeyPair::generate().unwrap();
    std::fs::write(path("cert"), made.cert.pem()).unwrap();
    std::fs::write(path("key"), made.signing_key.serialize_pem()).unwrap();
    std::fs::write(path("other"), other.serialize_pem()).unwrap();
    std::fs::write(path("empty"), "").unwrap();
    let server = |cert: &Path, key: &Path| {
        let (cert, key) = (cert.to_owned(), key.to_owned());
        Certificates::load(Files { cert, key, client_ca: None, client_names: Vec::new() }, 0)
    };
    let names = server(&path("cert"), &path("key")).unwrap().names();
    assert!(names.iter().any(|name| name == "localhost"), "{names:?}");
    for (cert, key, named, why) in [
        ("missing", "key", "missing", "No such file"),
        ("cert", "missing", "missing", "No such file"),
        ("empty", "key", "empty", "no such section"),
        ("cert", "empty", "empty", "no such section"),
        ("key", "key", "key", "no such section"),
        ("cert", "other", "other", "the key belongs to another certificate"),
    ] {
        let error = server(&path(cert), &path(key)).unwrap_err().to_string();
        assert!(error.contains(named) && error.contains(why), "{error}");
    }
}

/// Writes a certificate valid in `years`, issued by an authority or self-signed, and its key.
fn write(dir: &Path, name: &str, years: [i32; 2], by: Option<&rcgen::Issuer<'_, rcgen::KeyPair>>) -> String {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut parameters = rcgen::CertificateParams::new([format!("{name}.example.com")]).unwrap();
    parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
    parameters.not_before = rcgen::date_time_ymd(years[0], 1, 1);
    parameters.not_after = rcgen::date_time_ymd(years[1], 1, 1);
    let made = match by {
        Some(issuer) => parameters.signed_by(&key, issuer).unwrap(),
        None => parameters.self_signed(&key).unwrap(),
    };
    std::fs::write(dir.join(format!("{name}.pem")), made.pem()).unwrap();
    std::fs::write(dir.join(format!("{name}-key.pem")), key.serialize_pem()).unwrap();
    made.pem()
}

#[test]
fn an_invalid_replacement_is_named_and_the_old_certificate_stays_in_use() {
    // The year 2020.
    const NOW: i64 = 1_590_000_000;
    let dir = tempfile::tempdir().unwrap();
    let files = |name: &str| Files {
        cert: dir.path().join(format!("{name}.pem")),
        key: dir.path().join(format!("{name}-key.pem")),
        client_ca: None,
        client_names: Vec::new(),
    };
    let authority = Authority::new();
    write(dir.path(), "good", [2019, 2030], None);
    write(dir.path(), "new", [2019, 2031], Some(authority.issuer()));
    write(dir.path(), "old", [2010, 2019], None);
    write(dir.path(), "early", [2025, 2030], None);
    let own = write(dir.path(), "chain", [2019, 2030], Some(authority.issuer()));
    let certificates = Certificates::load(files("good"), NOW).unwrap();
    let end = certificates.not_after();
    std::fs::write(dir.path().join("chain.pem"), own.clone() + &own).unwrap();
    let mut other_key = files("new");
    other_key.key = files("good").key;
    for (bad, why) in [
        (files("old"), "expired on 2019-01-01"),
        (files("early"), "not valid before 2025-01-01"),
        (files("chain"), "certificate 2 in it does not come from the issuer of certificate 1"),
        (files("missing"), "No such file"),
        (other_key, "the key belongs to another certificate"),
        (Files { client_ca: Some(files("old").key), ..files("new") }, "as the authority of clients"),
    ] {
        let error = certificates.replace(bad, NOW).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
        assert_eq!((certificates.not_after(), &certificates.current.read().files), (end, &files("good")));
    }
    std::fs::write(dir.path().join("chain.pem"), own + &std::fs::read_to_string(authority.ca()).unwrap())
        .unwrap();
    certificates.replace(files("chain"), NOW).unwrap();
    certificates.replace(files("new"), NOW).unwrap();
    assert_ne!(certificates.not_after(), end);
    assert!(!certificates.follow(NOW).unwrap());
    write(dir.path(), "new", [2019, 2032], None);
    assert!(certificates.follow(NOW).unwrap());
    assert!(!certificates.follow(NOW).unwrap());
    // `follow` reports an invalid certificate once, `replace` each time.
    let served = certificates.not_after();
    std::fs::write(dir.path().join("new.pem"), "").unwrap();
    assert!(certificates.follow(NOW).is_err());
    assert!(!certificates.follow(NOW).unwrap());
    assert!(certificates.replace(files("new"), NOW).is_err());
    assert_eq!(certificates.not_after(), served);
    write(dir.path(), "new", [2019, 2033], None);
    assert!(certificates.follow(NOW).unwrap());
}

#[test]
fn an_expired_certificate_already_in_use_does_not_prevent_a_reload() {
    // The year 2020.
    const NOW: i64 = 1_590_000_000;
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "old", [2010, 2019], None);
    let path = |name: &str| dir.path().join(name);
    let old =
        Files { cert: path("old.pem"), key: path("old-key.pem"), client_ca: None, client_names: Vec::new() };
    // At the start even an expired certificate is used.
    let certificates = Certificates::load(old.clone(), NOW).unwrap();
    certificates.replace(old.clone(), NOW).unwrap();
    write(dir.path(), "old", [2010, 2018], None);
    assert!(certificates.replace(old, NOW).is_err());
}

#[test]
fn a_change_while_invalid_files_are_read_is_seen_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    write(dir.path(), "one", [2019, 2030], None);
    write(dir.path(), "two", [2019, 2031], None);
    let files =
        Files { cert: path("one.pem"), key: path("one-key.pem"), client_ca: None, client_names: Vec::new() };
    let certificates = Certificates::load(files, 1_590_000_000).unwrap();
    let end = certificates.not_after();
    // Half of a renewal; the other half happens while the first one is read.
    std::fs::rename(path("two.pem"), path("one.pem")).unwrap();
    let former = std::fs::read(path("one-key.pem")).unwrap();
    std::fs::remove_file(path("one-key.pem")).unwrap();
    // Not by a program: while that starts, it holds the locks of all open files, which other tests take.
    rustix::fs::mknodat(rustix::fs::CWD, path("one-key.pem"), rustix::fs::FileType::Fifo, 0o600.into(), 0)
        .unwrap();
    std::thread::scope(|scope| {
        let followed = scope.spawn(|| certificates.follow(1_590_000_000));
        // Blocks until the pipe is opened for reading.
        let mut half = std::fs::File::options().write(true).open(path("one-key.pem")).unwrap();
        std::fs::rename(path("two-key.pem"), path("one-key.pem")).unwrap();
        std::io::Write::write_all(&mut half, &former).unwrap();
        drop(half);
        assert!(followed.join().unwrap().is_err());
    });
    assert!(certificates.follow(1_590_000_000).unwrap());
    assert_ne!(certificates.not_after(), end);
}

#[test]
fn the_expiry_of_a_chain_is_the_earliest_one() {
    let dir = tempfile::tempdir().unwrap();
    let own = write(dir.path(), "leaf", [2019, 2030], None);
    let other = write(dir.path(), "intermediate", [2019, 2021], None);
    std::fs::write(dir.path().join("leaf.pem"), own + &other).unwrap();
    let path = |name: &str| dir.path().join(name);
    let files = Files {
        cert: path("leaf.pem"),
        key: path("leaf-key.pem"),
        client_ca: None,
        client_names: Vec::new(),
    };
    let end = rcgen::date_time_ymd(2021, 1, 1).unix_timestamp();
    assert_eq!(Certificates::load(files, 1_590_000_000).unwrap().not_after(), Some(end));
}

#[test]
fn a_change_of_rights_is_a_change() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let files = Files { cert: path("cert"), key: path("key"), client_ca: None, client_names: Vec::new() };
    for name in ["cert", "key"] {
        std::fs::write(path(name), name).unwrap();
    }
    let before = stamps(&files);
    let began = std::time::Instant::now();
    // The file system's clock may stand still for some milliseconds.
    while stamps(&files) == before {
        assert!(began.elapsed().as_secs() < 10, "the stamps stay {before:?}");
        std::fs::set_permissions(path("key"), std::fs::Permissions::from_mode(0o600)).unwrap();
    }
}
