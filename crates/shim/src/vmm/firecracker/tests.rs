//! The driver against the false Firecracker and jailer, and, where they are, against the real ones.

mod real;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use bailey_types::guest::ProcessId;
use bailey_types::guest::message::{Request as ToGuest, Response};
use tempfile::TempDir;

use super::fake::{Mode, Programs, TRAP};
use super::*;
use crate::config::{AccelChoice, VmmChoice};
use crate::guest::Guest;
use crate::scratch;
use crate::vmm::{Digests, Disks, GuestImage, Manifest};

const MEMORY_BYTES: u64 = 2 << 20;
const SCRATCH_BYTES: u64 = 1 << 20;

/// Users of no one else's, and names of cgroups.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A host with nothing on it but the false programs.
struct World {
    folder: TempDir,
    programs: Programs,
    driver: Firecracker,
    shape: Shape,
    cgroup: Cgroup,
    uid: u32,
}

impl World {
    fn new(mode: Mode) -> World {
        // Not in /tmp, which everybody may write to.
        World::at(tempfile::tempdir_in("/var/lib").unwrap(), mode)
    }

    fn at(folder: TempDir, mode: Mode) -> World {
        let programs = Programs::make(folder.path(), mode);
        for (name, text) in [("vmlinux.elf", "a kernel"), ("initramfs.cpio", "an initramfs")] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let manifest = Manifest {
            flavour: "bailey".into(),
            cmdline: "cryptomgr.notests".into(),
            acpi: true,
            sha256: Digests { vmlinux: String::new(), initramfs: String::new() },
        };
        let kernel = folder.path().join("vmlinux.elf");
        let guest = GuestImage { kernel, initramfs: folder.path().join("initramfs.cpio"), manifest };
        let driver = Firecracker {
            program: programs.firecracker.clone(),
            jailer: programs.jailer.clone(),
            place: folder.path().join("state/firecracker"),
            names: folder.path().join("cache/firecracker"),
            boot_timeout: Duration::from_secs(20),
            answer_timeout: Duration::from_secs(20),
            entry: parent_entry(),
        };
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let cgroup =
            Cgroup::at(Path::new(&format!("/bailey-test-fc-{}-{number}", std::process::id()))).unwrap();
        cgroup.create().unwrap();
        let uid = 2_100_000_000 + std::process::id() % 100_000 * 100 + number;
        let shape = Shape { guest, memory_bytes: MEMORY_BYTES, vcpus: 2 };
        World { folder, programs, driver, shape, cgroup, uid }
    }

    async fn launch(&self, origin: Origin, disks: Option<Disks>) -> Result<Box<dyn Machine>> {
        let launch = Launch {
            name: "test",
            shape: &self.shape,
            origin,
            disks,
            uid: self.uid,
            cgroup: &self.cgroup,
            taps: Vec::new(),
        };
        self.driver.launch(launch).await
    }

    /// An image with a name, and a scratch disk that never had one.
    fn disks(&self, text: &str, io: IoLimits) -> Disks {
        let image = self.folder.path().join("image");
        fs::write(&image, text).unwrap();
        let cache = self.folder.path().join("cache");
        fs::create_dir_all(&cache).unwrap();
        let scratch = scratch::create(&cache, SCRATCH_BYTES, 1).unwrap();
        Disks { root: File::open(image).unwrap(), scratch, io }
    }

    /// What the false programs wrote down, less what is not the API's.
    fn requests(&self) -> Vec<String> {
        let api = ["GET ", "PUT ", "PATCH "];
        self.programs
            .log()
            .into_iter()
            .filter(|line| api.iter().any(|method| line.starts_with(method)))
            .collect()
    }

    fn logged(&self, start: &str) -> Vec<String> {
        self.programs.log().into_iter().filter(|line| line.starts_with(start)).collect()
    }

    /// No name is left on the host, no mount, and no process.
    fn assert_nothing_is_left(&self) {
        for folder in [&self.driver.place, &self.driver.names] {
            let left = fs::read_dir(folder).into_iter().flatten().flatten();
            assert_eq!(left.map(|entry| entry.path()).collect::<Vec<_>>(), Vec::<PathBuf>::new());
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&self.folder.path().display().to_string()), "{mounts}");
        assert_eq!(self.cgroup.usage().pids, 0);
    }

    /// What a launch that must fail says.
    async fn failure(&self, origin: Origin) -> String {
        let disks = self.disks("an image", IoLimits::default());
        let error = self.launch(origin, Some(disks)).await.err().expect("it must fail").chain();
        self.assert_nothing_is_left();
        error
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.cgroup.remove().unwrap();
    }
}

/// As [`parent::entry`], in this test program.
fn parent_entry() -> Entry {
    let this = std::env::current_exe().unwrap().into_os_string();
    let arguments = ["--exact", "--nocapture", "vmm::firecracker::parent::tests::entry", "--"];
    std::iter::once(this).chain(arguments.map(OsString::from)).collect()
}

async fn connect(machine: &mut Box<dyn Machine>) -> Guest {
    let (guest, _no_events) = Guest::connect(machine.channel().await.unwrap());
    guest.ready().await.unwrap();
    guest
}

fn limits() -> IoLimits {
    IoLimits { read_bytes_per_second: Some(1 << 20), writes_per_second: Some(100), ..IoLimits::default() }
}

#[tokio::test]
async fn a_kernel_boots_and_its_guest_is_spoken_to() {
    let world = World::new(Mode::Good);
    let disks = world.disks("an image", limits());
    let mut machine = world.launch(Origin::Boot, Some(disks)).await.unwrap();
    let guest = connect(&mut machine).await;
    guest.command(ToGuest::Start).await.unwrap();
    assert_eq!(guest.request(ToGuest::Pids).await.unwrap(), Response::Pids(vec![42]));
    guest.command(ToGuest::Signal { id: ProcessId::INIT, signal: 15, all: false }).await.unwrap();
    assert!(machine.channel().await.is_err(), "the channel is given once");

    let expected = [
        "GET /version ",
        r#"PUT /machine-config {"mem_size_mib":2,"smt":false,"vcpu_count":2}"#,
        r#"PUT /boot-source {"boot_args":"console=ttyS0 quiet reboot=k panic=-1 pci=off i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd cryptomgr.notests","initrd_path":"initramfs","kernel_image_path":"vmlinux"}"#,
        r#"PUT /drives/root {"cache_type":"Unsafe","drive_id":"root","io_engine":"Sync","is_read_only":true,"is_root_device":false,"path_on_host":"root.img","rate_limiter":{"bandwidth":{"refill_time":1000,"size":524288}}}"#,
        r#"PUT /drives/scratch {"cache_type":"Unsafe","drive_id":"scratch","io_engine":"Sync","is_read_only":false,"is_root_device":false,"path_on_host":"scratch.img","rate_limiter":{"bandwidth":{"refill_time":1000,"size":524288},"ops":{"refill_time":1000,"size":100}}}"#,
        r#"PUT /vsock {"guest_cid":3,"uds_path":"v.sock"}"#,
        r#"PUT /actions {"action_type":"InstanceStart"}"#,
    ];
    assert_eq!(world.requests(), expected);
    assert_eq!(
        world.logged("open"),
        [
            r#"open vmlinux length 8 writable false starts "a kernel""#,
            r#"open initramfs length 12 writable false starts "an initr""#,
            r#"open root.img length 8 writable false starts "an image""#,
            r#"open scratch.img length 1048576 writable true starts """#,
        ]
    );
    assert!(machine.last_words().contains("the false guest boots"));
    drop(machine);
    world.assert_nothing_is_left();
}

#[tokio::test]
async fn the_jail_is_fresh_and_the_jailer_gets_documented_flags() {
    let world = World::new(Mode::Good);
    let machine = world.launch(Origin::Boot, None).await.unwrap();
    let version =
        world.cgroup.unified().map_or("1".to_owned(), |path| format!("2 --parent-cgroup {}", path.display()));
    let (uid, folder) = (world.uid, world.folder.path().display());
    let expected = format!(
        "jailer --id vm-{uid} --exec-file {folder}/firecracker --uid {uid} --gid {uid} \
         --chroot-base-dir {folder}/state/firecracker --cgroup-version {version} -- --api-sock api.sock --level Warning"
    );
    assert_eq!(world.logged("jailer"), [expected]);
    let found = "jail owner 0 mode 755 files initramfs root.img scratch.img vmlinux";
    assert_eq!(world.logged("jail "), [found], "root's alone, and nothing in it that we have not put there");
    // Next in its process namespace after the two threads of this test program, and in an empty network.
    assert_eq!(world.logged("pid"), ["pid 3 interfaces lo"]);
    assert!(world.cgroup.usage().pids >= 2, "the parent and Firecracker are in the sandbox's cgroup");
    drop(machine);
    world.assert_nothing_is_left();
}

#[tokio::test]
async fn a_pause_holds_the_guest_until_it_is_resumed() {
    let world = World::new(Mode::Good);
    let mut machine = world.launch(Origin::Boot, None).await.unwrap();
    let guest = connect(&mut machine).await;
    machine.pause().await.unwrap();
    let asking = guest.clone();
    let mut asked = tokio::spawn(async move { asking.request(ToGuest::Pids).await });
    assert!(timeout(Duration::from_millis(100), &mut asked).await.is_err(), "a paused guest answers nothing");
    machine.resume().await.unwrap();
    assert_eq!(asked.await.unwrap().unwrap(), Response::Pids(vec![42]));
    let expected = [r#"PATCH /vm {"state":"Paused"}"#, r#"PATCH /vm {"state":"Resumed"}"#];
    assert_eq!(world.logged("PATCH"), expected);
}

async fn template() -> (World, Saved) {
    let world = World::new(Mode::Good);
    let mut machine = world.launch(Origin::Template, None).await.unwrap();
    let _guest = connect(&mut machine).await;
    let saved = machine.save().await.unwrap();
    assert!(machine.ended().await.contains("killed"), "a template's VM is gone");
    (world, saved)
}

#[tokio::test]
async fn a_template_is_saved_and_leaves_no_name() {
    let (world, _saved) = template().await;
    let stand_in = crate::vmm::DISK_MAX;
    assert_eq!(
        world.logged("open")[2..],
        [
            format!(r#"open root.img length {stand_in} writable false starts """#),
            format!(r#"open scratch.img length {stand_in} writable true starts """#),
        ]
    );
    assert_eq!(
        world.requests()[7..],
        [
            r#"PATCH /vm {"state":"Paused"}"#,
            r#"PUT /snapshot/create {"mem_file_path":"memory","snapshot_path":"devices","snapshot_type":"Full"}"#,
        ]
    );
    world.assert_nothing_is_left();
}

#[tokio::test]
async fn clones_wake_with_their_own_disks_and_limits_and_cannot_write_to_the_template() {
    let (maker, saved) = template().await;
    for (text, io, patches) in [("first", IoLimits::default(), 0), ("second", limits(), 3)] {
        let mut world = World::new(Mode::Good);
        // What is in the saved state is the name of the place that it was made in.
        world.driver.place.clone_from(&maker.driver.place);
        let copy = |file: &File| file.try_clone().unwrap();
        let origin = Origin::Clone(Saved { memory: copy(&saved.memory), devices: copy(&saved.devices) });
        let disks = world.disks(text, io);
        let mut machine = world.launch(origin, Some(disks)).await.unwrap();
        let guest = connect(&mut machine).await;
        assert_eq!(guest.request(ToGuest::Pids).await.unwrap(), Response::Pids(vec![42]));
        let load = format!(
            r#"PUT /snapshot/load {{"mem_backend":{{"backend_path":"memory","backend_type":"File"}},"resume_vm":{},"snapshot_path":"devices"}}"#,
            patches == 0
        );
        assert_eq!(world.logged("PUT"), [load]);
        let patched = [
            r#"PATCH /drives/root {"drive_id":"root","rate_limiter":{"bandwidth":{"refill_time":1000,"size":524288}}}"#,
            r#"PATCH /drives/scratch {"drive_id":"scratch","rate_limiter":{"bandwidth":{"refill_time":1000,"size":524288},"ops":{"refill_time":1000,"size":100}}}"#,
            r#"PATCH /vm {"state":"Resumed"}"#,
        ];
        assert_eq!(world.logged("PATCH"), patched[..patches]);
        let length = text.len();
        assert_eq!(
            world.logged("open"),
            [
                r#"open memory length 2097152 writable false starts "guest's""#.to_owned() + " ",
                format!(r#"open root.img length {length} writable false starts "{text}""#),
                format!(r#"open scratch.img length {SCRATCH_BYTES} writable true starts """#),
            ]
            .map(|line| line.replace("guest's\" ", "guest's \""))
        );
        drop(machine);
        world.assert_nothing_is_left();
    }
    maker.assert_nothing_is_left();
}

#[tokio::test]
async fn an_image_that_has_lost_its_name_is_copied() {
    let world = World::new(Mode::Good);
    let disks = world.disks("an image", IoLimits::default());
    fs::remove_file(world.folder.path().join("image")).unwrap();
    let machine = world.launch(Origin::Boot, Some(disks)).await.unwrap();
    assert!(world.logged("open")[2].contains(r#"starts "an image""#));
    drop(machine);
    world.assert_nothing_is_left();
}

#[tokio::test]
async fn what_the_guest_writes_to_scratch_is_in_the_file_that_was_given() {
    let world = World::new(Mode::Good);
    let disks = world.disks("an image", IoLimits::default());
    let scratch = disks.scratch.try_clone().unwrap();
    scratch.write_all_at(b"the same", 0).unwrap();
    let _machine = world.launch(Origin::Boot, Some(disks)).await.unwrap();
    assert!(world.logged("open")[3].ends_with(r#"starts "the same""#), "{:?}", world.logged("open"));
}

#[tokio::test]
async fn a_failed_launch_says_why_and_leaves_nothing() {
    for (mode, words) in [
        (Mode::Jailer, ["exit status: 1", "mknod /dev/kvm"]),
        (Mode::Dies, ["killed by SIGABRT", "starting Firecracker"]),
        (Mode::Old, ["1.6.0", "install version 1.7"]),
        (Mode::NoKvm, ["PUT /actions with status 400", "vmm = \"qemu\""]),
        (Mode::Refuses, ["refused PUT /drives/scratch", "Unable to create the virtio block device"]),
        (Mode::Crashes, ["PUT /boot-source", "intercepting a bad syscall"]),
        (Mode::Closes, ["PUT /boot-source", "closed the connection"]),
        (Mode::Garbage, ["PUT /boot-source", "makes no sense"]),
        (Mode::Huge, ["PUT /boot-source", "head of more than"]),
    ] {
        let error = World::new(mode).failure(Origin::Boot).await;
        assert!(words.iter().all(|word| error.contains(word)), "{mode:?}: {error}");
    }
}

#[tokio::test]
async fn one_that_says_nothing_is_not_waited_for() {
    for (mode, words) in [(Mode::Deaf, "starting Firecracker"), (Mode::Silent, "PUT /boot-source")] {
        let mut world = World::new(mode);
        world.driver.answer_timeout = Duration::from_secs(2);
        let started = Instant::now();
        let error = world.failure(Origin::Boot).await;
        assert!(error.contains(words) && error.contains("for 2 s"), "{mode:?}: {error}");
        assert!(started.elapsed() < Duration::from_secs(15));
    }
}

#[tokio::test]
async fn the_channel_waits_for_a_slow_guest_and_gives_up_on_one_that_never_listens() {
    let world = World::new(Mode::Slow);
    let mut machine = world.launch(Origin::Boot, None).await.unwrap();
    connect(&mut machine).await;

    let mut world = World::new(Mode::Never);
    world.driver.boot_timeout = Duration::from_millis(500);
    let mut machine = world.launch(Origin::Boot, None).await.unwrap();
    let error = machine.channel().await.unwrap_err().chain();
    assert!(error.contains("waiting for the guest to listen"), "{error}");
    assert!(error.contains("the false guest boots"), "its console is shown: {error}");
}

#[tokio::test]
async fn a_vsock_that_is_not_one_is_refused() {
    let world = World::new(Mode::BadVsock);
    let mut machine = world.launch(Origin::Boot, None).await.unwrap();
    let error = machine.channel().await.unwrap_err().chain();
    assert!(error.contains("something other than OK"), "{error}");
}

/// A Firecracker that was taken over puts a link where its socket was: root must not connect to where that leads.
#[tokio::test]
async fn no_link_leads_out_of_the_jail() {
    let world = World::new(Mode::Link);
    let trap = UnixListener::bind(world.folder.path().join(TRAP)).unwrap();
    trap.set_nonblocking(true).unwrap();
    let mut machine = world.launch(Origin::Boot, None).await.unwrap();
    let error = machine.channel().await.unwrap_err().chain();
    assert!(error.contains("connecting to Firecracker's v.sock"), "{error}");
    assert!(trap.accept().is_err(), "nobody came");
}

#[tokio::test]
async fn what_firecracker_cannot_do_is_said_before_anything_is_started() {
    let mut world = World::new(Mode::Good);
    let tap = File::open("/dev/null").unwrap().into();
    let launch = Launch {
        name: "test",
        shape: &world.shape,
        origin: Origin::Boot,
        disks: None,
        uid: world.uid,
        cgroup: &world.cgroup,
        taps: vec![tap],
    };
    let error = world.driver.launch(launch).await.err().unwrap().chain();
    assert!(error.contains("taps by name") && error.contains("vmm = \"qemu\""), "{error}");
    world.shape.vcpus = 33;
    let error = world.failure(Origin::Boot).await;
    assert!(error.contains("1 to 32 processors, not 33"), "{error}");
    assert!(world.programs.log().is_empty());
}

#[tokio::test]
async fn settings_that_firecracker_cannot_meet_are_refused_with_the_remedy() {
    let mut config = Config::load(None).unwrap();
    config.firecracker = Some("/nowhere/firecracker".into());
    let error = Firecracker::new(&config).err().unwrap().chain();
    assert!(error.contains("no firecracker at /nowhere") && error.contains("set firecracker"), "{error}");
    config.vmm = VmmChoice::Firecracker;
    config.accel = AccelChoice::Tcg;
    let error = crate::vm::driver(&config).await.err().unwrap().chain();
    assert!(error.contains("needs KVM") && error.contains("vmm = \"qemu\""), "{error}");
}

#[tokio::test]
async fn a_killed_vm_is_told_by_its_end() {
    let world = World::new(Mode::Good);
    let machine = world.launch(Origin::Boot, None).await.unwrap();
    assert!(Path::new(&format!("/proc/{}", machine.pid())).exists());
    machine.kill();
    assert_eq!(machine.ended().await, "Firecracker ended: killed by SIGKILL");
    machine.kill();
    let error = machine.pause().await.unwrap_err().chain();
    assert!(error.contains("PATCH /vm"), "{error}");
    assert!(machine.save().await.unwrap_err().chain().contains("only a template"));
}

/// What stands after `--` makes this test a shim with one VM, to be killed.
#[tokio::test]
async fn doomed_shim() {
    let mut words = std::env::args_os().skip_while(|word| word != "--").skip(1);
    let Some(folder) = words.next() else { return };
    let world = World::at(tempfile::tempdir_in(folder).unwrap(), Mode::Good);
    let disks = world.disks("an image", IoLimits::default());
    let machine = world.launch(Origin::Boot, Some(disks)).await.unwrap();
    let path = format!("vm {} {}\n", machine.pid(), world.folder.path().display());
    std::io::stdout().write_all(path.as_bytes()).unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
}

/// Killed, the shim runs none of its own code: the kernel must end the VM.
#[test]
fn a_vm_does_not_outlive_its_killed_shim() {
    let folder = tempfile::tempdir_in("/var/lib").unwrap();
    let mut shim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "vmm::firecracker::tests::doomed_shim", "--"])
        .arg(folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(shim.stdout.take().unwrap()).lines();
    let line = lines.map_while(std::io::Result::ok).find(|line| line.contains("vm ")).unwrap();
    let words: Vec<&str> = line.split_once("vm ").unwrap().1.split(' ').collect();
    let (pid, place) = (words[0], Path::new(words[1]));
    let mut family = children(pid);
    family.push(pid.to_owned());
    assert_eq!(family.len(), 2, "the process above Firecracker, and Firecracker");
    shim.kill().unwrap();
    shim.wait().unwrap();
    let started = Instant::now();
    while family.iter().any(|pid| alive(pid)) {
        assert!(started.elapsed() < Duration::from_secs(20), "{family:?} live on");
        std::thread::sleep(Duration::from_millis(10));
    }
    for left in [place.join("state/firecracker"), place.join("cache/firecracker")] {
        assert_eq!(fs::read_dir(left).unwrap().count(), 0);
    }
    let cgroup = format!("/bailey-test-fc-{}-0", shim.id());
    Cgroup::at(Path::new(&cgroup)).unwrap().remove().unwrap();
}

fn children(pid: &str) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let children: String =
        threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok()).collect();
    children.split_whitespace().map(str::to_owned).collect()
}

/// Whether it runs; one that only waits to be reaped does not.
fn alive(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}
