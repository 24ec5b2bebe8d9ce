//! Links and loose directories in front of the paths that a jail is made of (the fault behind CVE-2026-1386).

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

use bailey_host::jail::path::{PathError, open, open_root_owned_dir};
use bailey_host::jail::{self, FileMount, JailError};

use super::host::{Host, NEIGHBOUR, folder};

#[test]
fn a_link_anywhere_in_a_path_is_refused() {
    let folder = folder();
    let real = folder.path().join("real");
    fs::create_dir(&real).unwrap();
    fs::write(real.join("file"), "").unwrap();
    symlink(&real, folder.path().join("dir-link")).unwrap();
    symlink(real.join("file"), folder.path().join("file-link")).unwrap();
    open(&real.join("file"), true).unwrap();
    for path in ["dir-link/file", "file-link", "dir-link"] {
        let error = open(&folder.path().join(path), false).unwrap_err();
        let is_loop =
            matches!(&error, PathError::Open { source, .. } if source.raw_os_error() == Some(libc::ELOOP));
        assert!(is_loop, "{path}: {error:?}");
    }
    for path in ["/proc/self/root/etc/passwd", "/proc/self/fd/0"] {
        assert!(open(Path::new(path), false).is_err(), "{path}");
    }
}

#[test]
fn a_second_name_is_refused_for_what_is_written_to() {
    let folder = folder();
    let (file, second) = (folder.path().join("file"), folder.path().join("second"));
    fs::write(&file, "").unwrap();
    fs::hard_link(&file, &second).unwrap();
    assert!(matches!(open(&second, true), Err(PathError::HardLinks { links: 2, .. })));
    open(&second, false).unwrap();
}

#[test]
fn a_directory_that_others_can_change_is_refused() {
    let folder = folder();
    let loose = folder.path().join("loose");
    fs::create_dir(&loose).unwrap();
    fs::write(loose.join("file"), "").unwrap();
    for (mode, owner) in [(0o775, 0), (0o757, 0), (0o1777, 0), (0o755, NEIGHBOUR)] {
        fs::set_permissions(&loose, Permissions::from_mode(mode)).unwrap();
        chown(&loose, Some(owner), None).unwrap();
        assert!(
            matches!(open(&loose.join("file"), false), Err(PathError::Untrusted { .. })),
            "{mode:o} {owner}"
        );
        assert!(open_root_owned_dir(&loose).is_err(), "{mode:o} {owner}");
    }
}

#[test]
fn odd_paths_and_kinds_are_refused() {
    let folder = folder();
    assert!(matches!(open(Path::new("relative"), false), Err(PathError::NotPlain(_))));
    assert!(matches!(open(&folder.path().join("../x"), false), Err(PathError::NotPlain(_))));
    let _socket = std::os::unix::net::UnixListener::bind(folder.path().join("socket")).unwrap();
    assert!(matches!(open(&folder.path().join("socket"), false), Err(PathError::Kind(_))));
}

#[test]
fn a_jail_is_not_made_from_links() {
    let host = Host::new();
    let link = host.folder.path().join("link");
    symlink(&host.base, &link).unwrap();
    let mut spec = host.spec("nothing", "");
    spec.base.clone_from(&link);
    assert!(matches!(jail::spawn(&spec, Vec::new(), |_| Ok(())), Err(JailError::Step { .. })));

    let shadow = host.folder.path().join("disk");
    symlink("/etc/shadow", &shadow).unwrap();
    let mut spec = host.spec("read-file", "/run/disk");
    spec.files = vec![FileMount { source: shadow, target: "/run/disk".into(), writable: false }];
    let error = jail::spawn(&spec, Vec::new(), |_| Ok(())).unwrap_err();
    assert!(matches!(error, JailError::Step { source, .. } if source.raw_os_error() == Some(libc::ELOOP)));
}

#[test]
fn a_mount_goes_nowhere_but_below_run() {
    let host = Host::new();
    let source = host.folder.path().join("file");
    fs::write(&source, "").unwrap();
    for target in ["/run", "/etc/x", "run/x", "/run/../etc/x", "/proc/self"] {
        let mut spec = host.spec("nothing", "");
        spec.files = vec![FileMount { source: source.clone(), target: target.into(), writable: false }];
        let refused = jail::spawn(&spec, Vec::new(), |_| Ok(()));
        assert!(matches!(refused, Err(JailError::Spec(_))), "{target}");
    }
}
