use super::*;

fn names(path: &Path) -> Vec<String> {
    let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    rotated(path).unwrap().iter().map(name).collect()
}

#[test]
fn names_continue_in_order_and_never_change() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.log");
    for moment in [1000, 1999, 999, 5000] {
        let name = rotated_name(&path, moment).unwrap();
        fs::write(&name, "x").unwrap();
    }
    for other in
        ["a.log", "a.log.1", "a.log.19700101T000001Z-0001.zst.unfinished", "ab.log.19700101T000001Z-0001"]
    {
        fs::write(dir.path().join(other), "x").unwrap();
    }
    let wanted = ["0001Z-0001", "0001Z-0002", "0001Z-0003", "0005Z-0001"];
    assert_eq!(names(&path), wanted.map(|end| format!("a.log.19700101T00{end}")));
    maintain(&path, &Rotation { compress: Some(Compression::Zstd), ..Rotation::default() }, 0).unwrap();
    assert_eq!(rotated_name(&path, 1000).unwrap().extension().unwrap(), "19700101T000005Z-0002");
}

#[test]
fn a_name_has_the_time_of_the_rotation() {
    let wanted = Some(("20260102T030405Z", "0017"));
    for name in ["a.log.20260102T030405Z-0017", "a.20260102T030405Z-0017.zst", "b.c.20260102T030405Z-0017.gz"]
    {
        assert_eq!(rotated_at(name), wanted, "{name}");
    }
    for name in ["a.log", "a.log.1.gz", "a.log.20260102T030405Z-0017.xz", "a.log.20260102T030405-0017"] {
        assert_eq!(rotated_at(name), None, "{name}");
    }
}

#[test]
fn the_oldest_files_are_removed_and_the_others_compressed() {
    for (compression, magic) in [(Compression::Zstd, &[0x28, 0xb5][..]), (Compression::Gzip, &[0x1f, 0x8b])] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.log");
        let files: Vec<_> = (0..5)
            .map(|n| {
                let name = rotated_name(&path, n * 1000).unwrap();
                fs::write(&name, format!("file {n}\n")).unwrap();
                name
            })
            .collect();
        let busy = fs::metadata(&files[4]).unwrap().ino();
        let rotation = Rotation { keep: Some(3), compress: Some(compression), ..Rotation::default() };
        maintain(&path, &rotation, busy).unwrap();
        maintain(&path, &rotation, busy).unwrap();
        let found = rotated(&path).unwrap();
        assert_eq!(found.len(), 3);
        assert!(fs::read(&found[0]).unwrap().starts_with(magic));
        assert_eq!(fs::read_to_string(&found[2]).unwrap(), "file 4\n", "still being written");
        maintain(&path, &rotation, 0).unwrap();
        assert!(fs::read(&rotated(&path).unwrap()[2]).unwrap().starts_with(magic));
    }
}

/// Writes the file that a rotation at that time leaves.
fn rotate(path: &Path, moment: i64) -> PathBuf {
    let name = rotated_name(path, moment).unwrap();
    fs::write(&name, moment.to_string()).unwrap();
    name
}

#[test]
fn a_clock_that_was_ahead_does_not_make_new_files_look_old() {
    const DAY: i64 = 86_400_000;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.log");
    let keep = |keep| Rotation { keep: Some(keep), ..Rotation::default() };
    for moment in [30 * DAY, 30 * DAY + 999, 0, 2_000, DAY, 31 * DAY] {
        rotate(&path, moment);
    }
    assert!(maintain(&path, &keep(3), 0).unwrap().is_empty());
    assert_eq!(
        names(&path),
        ["a.log.19700131T000000Z-0004", "a.log.19700131T000000Z-0005", "a.log.19700201T000000Z-0001"]
    );
    let read = |file: &PathBuf| fs::read_to_string(file).unwrap();
    assert_eq!(
        rotated(&path).unwrap().iter().map(read).collect::<Vec<_>>(),
        ["2000".to_owned(), DAY.to_string(), (31 * DAY).to_string()]
    );
}

#[test]
fn a_name_is_found_until_the_year_9999() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.log");
    fs::write(with_suffix(&path, ".20261231T235959Z-9999.gz"), "x").unwrap();
    assert_eq!(rotate(&path, 0).extension().unwrap(), "20270101T000000Z-0001");
    // A directory has the next name.
    fs::create_dir(with_suffix(&path, ".20270101T000000Z-0002")).unwrap();
    assert_eq!(rotate(&path, 0).extension().unwrap(), "20270101T000000Z-0003");
    assert_eq!(rotate(&path, i64::MAX).extension().unwrap(), "99991231T235959Z-0001");
    fs::write(with_suffix(&path, ".99991231T235959Z-9999"), "x").unwrap();
    assert!(rotated_name(&path, 0).is_err(), "any other name would be the oldest");
}

#[test]
fn a_file_that_cannot_be_removed_or_compressed_does_not_stop_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.log");
    fs::create_dir_all(with_suffix(&path, ".19690101T000000Z-0001/inside")).unwrap();
    let files: Vec<_> = (0..5).map(|n| rotate(&path, n * 1000)).collect();
    // The name of the compressed file is taken by a directory.
    fs::create_dir(with_suffix(&files[3], ".gz.unfinished")).unwrap();
    let rotation = Rotation { keep: Some(3), compress: Some(Compression::Gzip), ..Rotation::default() };
    let failures = maintain(&path, &rotation, 0).unwrap();
    assert_eq!(failures.iter().map(|(file, _)| file).collect::<Vec<_>>(), [&files[3]]);
    let left = rotated(&path).unwrap();
    assert_eq!(left, [with_suffix(&files[2], ".gz"), files[3].clone(), with_suffix(&files[4], ".gz")]);
}

#[test]
fn an_interrupted_compression_is_completed_and_counts_as_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.log");
    let files: Vec<_> = (0..4).map(|n| rotate(&path, n * 1000)).collect();
    // Killed between the rename of the compressed file and the removal of the plain one, and within
    // another file.
    let rotation = Rotation { keep: Some(4), compress: Some(Compression::Gzip), ..Rotation::default() };
    fs::write(with_suffix(&files[3], ".gz"), "whole").unwrap();
    fs::write(with_suffix(&path, ".19690101T000000Z-0001.gz.unfinished"), "half").unwrap();
    assert!(maintain(&path, &rotation, 0).unwrap().is_empty());
    assert_eq!(
        rotated(&path).unwrap(),
        files.iter().map(|file| with_suffix(file, ".gz")).collect::<Vec<_>>()
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4);
}

#[test]
fn a_file_that_is_gone_is_no_failure() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.log");
    for n in 0..2 {
        std::os::unix::fs::symlink("gone", rotated_name(&path, n * 1000).unwrap()).unwrap();
    }
    let rotation = Rotation { keep: Some(1), compress: Some(Compression::Gzip), ..Rotation::default() };
    assert!(maintain(&path, &rotation, 0).unwrap().is_empty());
    assert_eq!(names(&path), ["a.log.19700101T000001Z-0001"]);
}

#[test]
fn a_compressed_file_has_the_same_mode_and_owner() {
    for mode in [0o600, 0o640, 0o664] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.log");
        let name = rotate(&path, 0);
        let plain = File::open(&name).unwrap();
        // Only root may change the owner.
        let is_changed = set_access(&plain, mode, (Some(1), Some(2))).is_ok();
        if !is_changed {
            set_access(&plain, mode, (None, None)).unwrap();
        }
        let before = plain.metadata().unwrap();
        compress(&name, Compression::Zstd).unwrap();
        let after = fs::metadata(with_suffix(&name, ".zst")).unwrap();
        assert_eq!(after.permissions().mode() & 0o7777, mode);
        assert_eq!((after.uid(), after.gid()), (before.uid(), before.gid()));
    }
}
