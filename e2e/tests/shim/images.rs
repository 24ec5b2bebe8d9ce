//! How an image of the root filesystem is made from files that a tenant chose: right, in a jail, and bounded (A2, A6).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bailey_e2e::images::{Image, base, busybox, layered, unprivileged};
use bailey_e2e::machine::{Machine, test_with};
use bailey_e2e::process::{Output, text_of};
use bailey_e2e::settings::only_ours;
use bailey_e2e::wait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SOON: Duration = Duration::from_secs(60);
const BLOCK: usize = 4096;
/// The part of an image that says when it was made, with its checksum.
const SUPERBLOCK: std::ops::Range<usize> = 1024..1152;

/// Files of the shim's that keep images of the machine's namespace.
fn kept(machine: &Machine, extension: &str) -> Result<Vec<PathBuf>> {
    let folder = machine.containerd.shim_cache_dir().join("images").join(machine.containerd.namespace());
    let files = fs::read_dir(&folder).with_context(|| format!("listing {}", folder.display()))?.flatten();
    Ok(files
        .map(|file| file.path())
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect())
}

fn ours(body: impl FnOnce(&mut Machine, &Image) -> Result<()>) -> Result<()> {
    if !only_ours("its images") {
        return Ok(());
    }
    test_with(&busybox(), body)
}

/// A folder in memory with a tree that a script made.
fn tree(machine: &Machine, script: &str) -> Result<PathBuf> {
    let root = machine.containerd.folder().join("hostile");
    fs::create_dir_all(&root)?;
    let mut mount = machine.containerd.command("mount");
    text_of(mount.args(["-t", "tmpfs", "-o", "mode=755", "tmpfs"]).arg(&root), SOON)?;
    let mut shell = machine.containerd.command("bash");
    text_of(shell.args(["-euc", &format!("cd '{}'; {script}", root.display())]), SOON)?;
    Ok(root)
}

/// Runs a container with that tree as its root filesystem.
fn run(machine: &Machine, image: &Image, root: &Path) -> Result<Output> {
    machine.run(image).args(&["/bin/true"]).with_spec(root, |_| Ok(()))?.output()
}

/// Runs what cannot become an image; the error has these words, and nothing is kept of it.
fn refused(machine: &Machine, image: &Image, script: &str, words: &[&str]) -> Result<()> {
    let root = tree(machine, script)?;
    let output = run(machine, image, &root)?;
    text_of(machine.containerd.command("umount").arg(&root), SOON)?;
    let said = output.errors();
    for word in words {
        ensure!(output.code != 0 && said.contains(word), "it does not say {word:?}: {output:?}");
    }
    ensure!(said.len() < 2000 && !said.contains('\u{1b}'), "it says too much: {said}");
    ensure!(kept(machine, "img")?.is_empty(), "an image was kept");
    Ok(())
}

#[test]
fn an_image_is_what_its_tool_makes_outside_of_the_jail() -> Result<()> {
    if !only_ours("its images") {
        return Ok(());
    }
    test_with(&base(), |machine, image| {
        machine.run(image).args(&["true"]).output()?.success()?;
        let [path] = &kept(machine, "img")?[..] else { anyhow::bail!("not one image") };
        let bytes = fs::read(path)?;
        let label: serde_json::Value = serde_json::from_slice(&fs::read(path.with_extension("json"))?)?;
        let blocks = label["data_blocks"].as_u64().context("the label says no size")?;
        let mounted = machine.containerd.folder().join("mounted");
        fs::create_dir(&mounted)?;
        let at = mounted.to_string_lossy();
        let mount = ["images", "mount", "--snapshotter", "overlayfs", &image.reference, &at];
        machine.ctr(&mount)?.success()?;
        let expected = machine.containerd.folder().join("expected.erofs");
        let mut mkfs = machine.containerd.command("mkfs.erofs");
        mkfs.args(["-U", "00000000-0000-0000-0000-000000000000", "--"]).arg(&expected).arg(&mounted);
        text_of(&mut mkfs, SOON)?;
        let unmount = ["images", "unmount", "--rm", "--snapshotter", "overlayfs", &at];
        machine.ctr(&unmount)?.success()?;
        let mut expected = fs::read(expected)?;
        let data = usize::try_from(blocks)? * BLOCK;
        ensure!(expected.len() == data && data > 1 << 20, "{} bytes instead of {data}", expected.len());
        // What only root may read is in it, and what belongs to others.
        expected[SUPERBLOCK].copy_from_slice(&bytes[SUPERBLOCK]);
        ensure!(expected == bytes[..data], "the jail changes what becomes of the files");
        Ok(())
    })
}

#[test]
fn files_that_nobody_may_read_are_there() -> Result<()> {
    ours(|machine, image| {
        let root = machine.containerd.folder().join("root");
        busybox().unpack_lowest(&root)?;
        let script = "mkdir -m 700 dir; echo inside >dir/file; chmod 0 dir/file; chown -R 4000000:77 dir; \
            ln dir/file dir/hard; \
            python3 -c 'import os; os.setxattr(\"dir/file\", \"user.note\", b\"hello\")'; mknod dir/null c 1 3; mkfifo dir/pipe";
        let mut shell = machine.containerd.command("bash");
        text_of(shell.args(["-euc", &format!("cd '{}'; {script}", root.display())]), SOON)?;
        let script = "cat /dir/hard; stat -c '%u:%g %a %h %F' /dir /dir/file /dir/null /dir/pipe";
        let text = machine.run(image).sh(script).with_spec(&root, |_| Ok(()))?.output()?.success()?.text();
        let expected = "inside\n4000000:77 700 2 directory\n4000000:77 0 2 regular file\n\
            0:0 644 1 character special file\n0:0 644 1 fifo\n";
        assert_eq!(text, expected);
        Ok(())
    })
}

#[test]
fn a_file_of_holes_is_not_written_out() -> Result<()> {
    ours(|machine, image| {
        machine.containerd.set_shim(&[("image_max", "\"64MiB\"")])?;
        let words = ["larger than 67108864 bytes (64 MiB)", "raise image_max"];
        refused(machine, image, "truncate -s 1T big", &words)?;
        // One of more blocks than the format can count becomes what its tool makes of it, but never much.
        let root = tree(machine, "truncate -s 1E big")?;
        let output = run(machine, image, &root)?;
        text_of(machine.containerd.command("umount").arg(&root), SOON)?;
        ensure!(output.code != 0 && kept(machine, "img")?.is_empty(), "{output:?}");
        // And one that would fit takes its time.
        machine.containerd.set_shim(&[("image_max", "\"8TiB\""), ("image_timeout_seconds", "1")])?;
        refused(machine, image, "truncate -s 1T big", &["longer than 1 s", "raise image_timeout_seconds"])
    })
}

#[test]
fn folders_without_end_are_refused() -> Result<()> {
    ours(|machine, image| {
        let script = "python3 -c 'import os\nfor _ in range(1500): os.mkdir(\"d\"); os.chdir(\"d\")'";
        refused(machine, image, script, &["making the image of the root filesystem", "mkfs.erofs"])
    })
}

#[test]
fn many_long_names_and_attributes_are_bounded() -> Result<()> {
    ours(|machine, image| {
        // Names as long as they can be, with what terminals obey; attributes of different names and values.
        let script = r#"python3 - <<'END'
import os
for i in range(3000):
    name = ("\x1b[2J%05d" % i).ljust(255, "x")
    open(name, "w").close()
    if hasattr(os, "setxattr"):
        for j in range(40):
            try:
                os.setxattr(name, "user.%d-%d" % (i, j), os.urandom(32))
            except OSError:
                break
END"#;
        let root = tree(machine, script)?;
        let output = run(machine, image, &root)?;
        text_of(machine.containerd.command("umount").arg(&root), SOON)?;
        // There is no program in it: it becomes an image, or it is refused, but in words.
        let said = output.errors();
        ensure!(output.code != 0 && !said.contains('\u{1b}'), "{output:?}");
        ensure!(said.contains("/bin/true") || said.contains("making the image"), "{said}");
        ensure!(kept(machine, "img")?.is_empty(), "an image was kept");
        Ok(())
    })
}

/// The process that makes an image for this machine: its id, and what the kernel says of it.
fn maker(machine: &Machine) -> Result<(Pid, String)> {
    wait::until("the making of an image", SOON, || {
        for entry in fs::read_dir("/proc")?.flatten() {
            let path = entry.path();
            let read = |name: &str| fs::read_to_string(path.join(name)).unwrap_or_default();
            let ours = || read("cgroup").contains(machine.containerd.namespace());
            if read("comm").trim() == "mkfs.erofs" && ours() {
                let pid: i32 = entry.file_name().to_string_lossy().parse()?;
                return Ok(Some((Pid::from_raw(pid), read("status"))));
            }
        }
        Ok(None)
    })
}

/// Whether a process runs: one that nobody has reaped yet does not.
fn runs(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

#[test]
fn an_image_is_made_in_a_jail_that_leaves_nothing_when_its_shim_is_killed() -> Result<()> {
    ours(|machine, image| {
        machine.containerd.set_shim(&[("image_max", "\"8TiB\"")])?;
        let root = tree(machine, "truncate -s 1T big")?;
        let making = std::thread::scope(|scope| -> Result<Output> {
            let running = scope.spawn(|| run(machine, image, &root));
            let (pid, status) = maker(machine)?;
            let field = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
                line.map(str::trim).unwrap_or_default().to_owned()
            };
            assert!(
                field("Uid").split_whitespace().all(|uid| uid.parse::<u32>().is_ok_and(|uid| uid >= 1000))
            );
            // CAP_DAC_READ_SEARCH, and no other.
            for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                assert_eq!(field(set), "0000000000000004", "{set}");
            }
            assert_eq!((field("NoNewPrivs").as_str(), field("Seccomp").as_str()), ("1", "2"));
            for space in ["net", "mnt", "pid", "ipc", "uts", "cgroup"] {
                let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{space}"));
                assert_ne!(of(&pid.to_string())?, of("self")?, "{space}");
            }
            let parent: i32 = field("PPid").parse()?;
            kill(Pid::from_raw(parent), Signal::SIGKILL).context("killing the shim")?;
            wait::until_true("the end of the maker", SOON, || Ok(!runs(pid)))?;
            running.join().unwrap_or_else(|_| anyhow::bail!("running ended in a panic"))
        });
        ensure!(making?.code != 0, "it ran");
        text_of(machine.containerd.command("umount").arg(&root), SOON)?;
        for extension in ["img", "json", "new"] {
            ensure!(kept(machine, extension)?.is_empty(), "a {extension} was left");
        }
        Ok(())
    })
}

/// Runs a container of an image, which must work.
fn runs_once(machine: &Machine, image: &Image) -> Result<()> {
    let text = machine.run(image).args(&["echo", "ran"]).output()?.success()?.text();
    ensure!(text == "ran\n", "it said {text:?}");
    Ok(())
}

#[test]
fn what_is_not_used_makes_room_for_what_is_new() -> Result<()> {
    ours(|machine, image| {
        machine.containerd.set_shim(&[("cache_limit", "\"1\"")])?;
        let mut task = machine.run(image).sh("echo up; exec sleep 1000").start()?;
        task.wait_for("up\n")?;
        let first = kept(machine, "img")?;
        ensure!(first.len() == 1, "{first:?}");
        let second = layered().image()?;
        machine.import(&second)?;
        runs_once(machine, &second)?;
        ensure!(kept(machine, "img")?.len() == 2, "one that is used has gone, or the new one");
        task.end()?;
        let third = unprivileged().image()?;
        machine.import(&third)?;
        // It has the first one's layers: that one is found, and nothing is made.
        machine.run(&third).output()?;
        ensure!(kept(machine, "img")?.len() == 2);
        let said = machine.shim(&["collect"])?;
        ensure!(said.starts_with("removed 2 images (") && said.contains("kept 0"), "{said}");
        ensure!(kept(machine, "img")?.is_empty() && kept(machine, "json")?.is_empty());
        runs_once(machine, image)
    })
}

#[test]
fn images_go_with_their_layers_or_their_namespace() -> Result<()> {
    ours(|machine, image| {
        let second = layered().image()?;
        machine.import(&second)?;
        runs_once(machine, image)?;
        runs_once(machine, &second)?;
        ensure!(kept(machine, "img")?.len() == 2);
        let said = machine.shim(&["collect"])?;
        ensure!(said.starts_with("removed 0 images") && said.contains("kept 2"), "{said}");
        machine.ctr(&["images", "rm", "--sync", &second.reference])?.success()?;
        let said = machine.shim(&["collect"])?;
        ensure!(said.starts_with("removed 1 images") && said.contains("kept 1"), "{said}");
        runs_once(machine, image)?;
        // One that is used outlives its name.
        let mut task = machine.run(image).sh("echo up; exec sleep 1000").start()?;
        task.wait_for("up\n")?;
        let drop_images = ["-namespace", machine.containerd.namespace(), "drop-images"];
        ensure!(machine.shim(&drop_images)?.contains("kept 1"));
        ensure!(task.sh("md5sum /bin/* | tail -n 1")?.code == 0, "its image is gone");
        task.end()?;
        ensure!(machine.shim(&drop_images)?.starts_with("removed 1 images"));
        let images = machine.containerd.shim_cache_dir().join("images");
        ensure!(!images.join(machine.containerd.namespace()).exists(), "its folder is left");
        runs_once(machine, image)
    })
}

#[test]
fn collecting_disturbs_no_start() -> Result<()> {
    ours(|machine, image| {
        machine.containerd.set_shim(&[("cache_limit", "\"1\"")])?;
        let machine = &*machine;
        let done = std::sync::atomic::AtomicBool::new(false);
        let rounds = std::thread::scope(|scope| -> Result<usize> {
            let collecting = scope.spawn(|| -> Result<usize> {
                let mut removed = 0;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    removed += usize::from(!machine.shim(&["collect"])?.starts_with("removed 0"));
                }
                Ok(removed)
            });
            let started = (0..6).try_for_each(|_| runs_once(machine, image));
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            started?;
            collecting.join().unwrap_or_else(|_| anyhow::bail!("collecting ended in a panic"))
        })?;
        ensure!(rounds >= 2, "nothing was collected meanwhile");
        Ok(())
    })
}

#[test]
fn a_killed_collector_is_no_harm() -> Result<()> {
    ours(|machine, image| {
        runs_once(machine, image)?;
        let [path] = &kept(machine, "img")?[..] else { anyhow::bail!("not one image") };
        // Killed after the image, before label and lock; and before that, one that makes images.
        fs::remove_file(path)?;
        runs_once(machine, image)?;
        ensure!(kept(machine, "img")?.len() == 1);
        fs::remove_file(path.with_extension("json"))?;
        runs_once(machine, image)?;
        let abandoned = path.with_file_name("once-1");
        fs::write(&abandoned, "")?;
        let old = std::time::SystemTime::now() - Duration::from_secs(7200);
        fs::File::options().write(true).open(&abandoned)?.set_modified(old)?;
        let old_root = machine.containerd.shim_cache_dir().join("jail/qemu-of-last-year");
        fs::create_dir(&old_root)?;
        fs::File::open(&old_root)?.set_modified(old)?;
        let said = machine.shim(&["collect"])?;
        ensure!(said.contains("kept 1"), "{said}");
        ensure!(!abandoned.exists() && !old_root.exists(), "what was abandoned is there");
        runs_once(machine, image)
    })
}
