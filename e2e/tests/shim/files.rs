//! The root filesystem: layers, users, folders, what can be written and how much (A3, A6).

use anyhow::Result;
use bailey_e2e::images::{Recipe, busybox, layered, unprivileged};
use bailey_e2e::machine::test_with;
use bailey_e2e::settings::{is_ours, only_ours};

#[test]
fn layers_add_replace_and_delete() -> Result<()> {
    test_with(&layered(), |machine, image| {
        let script = "cd /data; for f in *; do echo \"$f $(cat $f)\"; done; ls /opaque; cat /link; echo; \
            test -e /gone || echo no gone; stat -c '%a %u:%g' /sticky /data/added";
        let text = machine.run(image).sh(script).output()?.success()?.text();
        let expected = "added third\nkept first\nreplaced second\nabove\n";
        assert!(text.starts_with(expected), "{text}");
        assert!(text.ends_with("\nno gone\n1777 1000:1000\n4711 0:0\n"), "{text}");
        Ok(())
    })
}

#[test]
fn what_one_container_writes_no_other_sees() -> Result<()> {
    test_with(&layered(), |machine, image| {
        let script = "rm -r /opaque && echo changed > /data/kept && mkdir /new && ls / > /dev/null";
        machine.run(image).sh(script).output()?.success()?;
        let text = machine.run(image).sh("cat /data/kept /opaque/above; ls -d /new").output()?.text();
        assert_eq!(text, "firstsecond");
        Ok(())
    })
}

#[test]
fn the_images_user_folder_and_environment() -> Result<()> {
    test_with(&unprivileged(), |machine, image| {
        let text = machine.run(image).output()?.success()?.text();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("uid=1000(app) gid=2000(extra)"), "{text}");
        // A missing working folder is made, as docker does.
        assert_eq!(lines[1], "/srv/no/such", "{text}");
        assert!(lines.contains(&"FROM_IMAGE=a b=c"), "{text}");
        Ok(())
    })
}

#[test]
fn a_user_without_rights_has_none() -> Result<()> {
    test_with(&unprivileged(), |machine, image| {
        let script = "touch /etc/x 2>&1; grep CapEff /proc/self/status; touch /tmp/mine && echo mine";
        let text = machine.run(image).sh(script).output()?.success()?.text();
        assert!(text.contains("Permission denied"), "{text}");
        assert!(text.contains("CapEff:\t0000000000000000"), "{text}");
        assert!(text.ends_with("mine\n"), "{text}");
        Ok(())
    })
}

#[test]
fn read_only_root_and_tmpfs() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let run = machine.run(image).flag("--read-only");
        let run = run.option("--mount", "type=tmpfs,src=tmpfs,dst=/data,options=size=2m:mode=700");
        let script =
            "touch /x 2>&1; touch /data/x && stat -c %a /data; dd if=/dev/zero of=/data/y bs=1M count=4 2>&1";
        let output = run.sh(script).output()?;
        let text = output.text();
        assert!(text.contains("Read-only file system"), "{text}");
        assert!(text.contains("700\n"), "{text}");
        assert!(text.contains("No space left on device"), "{text}");
        Ok(())
    })
}

#[test]
fn a_full_scratch_disk_is_an_error_like_any_other() -> Result<()> {
    if !only_ours("the size of the writable layer") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        let script = "dd if=/dev/zero of=/big bs=1M count=128; rm /big; echo still; dd if=/dev/zero of=/small bs=1M count=8";
        let run = machine.run(image).annotation("dev.bailey.scratch", "64MiB");
        let output = run.sh(script).output()?.success()?;
        assert!(output.errors().contains("No space left on device"), "{}", output.errors());
        assert_eq!(output.text(), "still\n");
        Ok(())
    })
}

#[test]
fn the_size_of_the_scratch_disk_is_the_asked_one() -> Result<()> {
    if !only_ours("the size of the writable layer") {
        return Ok(());
    }
    test_with(&busybox(), |machine, image| {
        for (size, least, most) in [("64MiB", 40, 64), ("1GiB", 900, 1024)] {
            let run = machine.run(image).annotation("dev.bailey.scratch", size);
            let text = run.sh("df -m / | tail -n 1 | awk '{print $2}'").output()?.success()?.text();
            let mib: u64 = text.trim().parse()?;
            assert!((least..=most).contains(&mib), "{size}: {mib} MiB");
        }
        Ok(())
    })
}

#[test]
fn host_name_limits_and_user_of_the_specification() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let script = "hostname; ulimit -n; ulimit -c; id -u; id -G; umask";
        let output = with_spec(machine, image, &busybox(), script, |spec| {
            spec["hostname"] = "a-name".into();
            spec["process"]["rlimits"] = serde_json::json!([
                {"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]);
            spec["process"]["user"] = serde_json::json!({"uid": 12, "gid": 34, "additionalGids": [34, 56]});
        })?;
        assert_eq!(output.success()?.text(), "a-name\n77\n0\n12\n34 56\n0022\n");
        Ok(())
    })
}

#[test]
fn names_of_devices_are_the_usual_ones() -> Result<()> {
    test_with(&busybox(), |machine, image| {
        let text = machine.run(image).sh("ls /dev").output()?.success()?.text();
        let found: Vec<&str> = text.lines().collect();
        for device in
            ["fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "tty", "urandom", "zero"]
        {
            assert!(found.contains(&device), "no {device} in {text}");
        }
        let known = ["console", "core", "stderr", "stdin", "stdout"];
        let odd = found.iter().filter(|name| name.starts_with("vd") || name.starts_with("vport"));
        assert_eq!(odd.count(), 0, "devices of the machine: {text}");
        assert!(found.len() <= 11 + known.len(), "more than the usual ones: {text}");
        machine.run(image).sh("echo x > /dev/null; head -c 4 /dev/urandom | wc -c").output()?.success()?;
        Ok(())
    })
}

/// Runs a script with a specification of its own, for what `ctr run` has no flag for.
pub(crate) fn with_spec(
    machine: &bailey_e2e::machine::Machine,
    image: &bailey_e2e::images::Image,
    recipe: &Recipe,
    script: &str,
    change: impl FnOnce(&mut serde_json::Value),
) -> Result<bailey_e2e::process::Output> {
    let root = machine.containerd.folder().join("rootfs");
    if !root.exists() {
        recipe.unpack_lowest(&root)?;
    }
    let run = machine.run(image).sh(script).with_spec(&root, |spec| {
        change(spec);
        if is_ours() {
            // What a sandbox never shares with the host, and ctr's own default does not ask for either.
            spec["process"]["noNewPrivileges"] = true.into();
        }
        Ok(())
    })?;
    run.output()
}
