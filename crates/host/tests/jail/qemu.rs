//! A real QEMU in the jail: the calls that it makes are those that its profile allows.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, IoSlice, Lines, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bailey_host::jail::{self, JailSpec, Jailed, Profile, Reopen, base};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::wait::WaitStatus;
use tempfile::TempDir;

use super::host;

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const MODULE: &str = "/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so";
const FIRMWARE: [&str; 2] = ["/usr/share/qemu/bios-microvm.bin", "/usr/share/seabios"];
const MEMORY_BYTES: u64 = 64 << 20;

/// With the firmware alone, no kernel: everything but the guest's own requests. Descriptor 3 is the monitor, 4 the
/// memory, 5 a disk, 6 the guest's channel.
const MACHINE: &str = "-M microvm,memory-backend=mem -accel tcg -cpu max -m 64 -smp 2 -nodefaults -no-user-config \
    -display none -name vm,debug-threads=on -chardev socket,id=q,fd=3 -mon chardev=q,mode=control \
    -add-fd fd=5,set=1 -object throttle-group,id=t,x-iops-total=100 \
    -blockdev driver=file,filename=/dev/fdset/1,node-name=f,discard=unmap \
    -blockdev driver=raw,file=f,node-name=r \
    -blockdev driver=throttle,throttle-group=t,file=r,node-name=d -device virtio-blk-device,drive=d \
    -chardev socket,id=c,fd=6 -device virtio-serial-device -device virtserialport,chardev=c,name=bailey \
    -device virtio-rng-device";

/// A QEMU, its monitor and what it complains about.
struct Vm {
    jailed: Jailed,
    monitor: UnixStream,
    answers: Lines<BufReader<UnixStream>>,
    complaints: PathBuf,
    _channel: UnixStream,
}

impl Vm {
    fn start(folder: &TempDir, memory: &OwnedFd, more: &[&str]) -> Self {
        let extra: Vec<PathBuf> =
            [MODULE].iter().chain(&FIRMWARE).map(PathBuf::from).filter(|path| path.exists()).collect();
        let root = base::prepare(Path::new(QEMU), &extra, folder.path()).unwrap();
        let mut spec = JailSpec::new(host::user(), root, QEMU.into(), Profile::QemuTcg);
        spec.entry = host::entry();
        spec.reopen = vec![Reopen { fd: 4, writable: true }];
        spec.argv.extend(MACHINE.split_whitespace().chain(more.iter().copied()).map(str::to_owned));
        let (monitor, theirs) = UnixStream::pair().unwrap();
        let (channel, its_channel) = UnixStream::pair().unwrap();
        monitor.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let disk = folder.path().join("disk");
        let disk = File::options().read(true).write(true).create(true).truncate(false).open(disk).unwrap();
        disk.set_len(1 << 20).unwrap();
        let complaints = folder.path().join("stderr");
        let fds = vec![
            (File::create(&complaints).unwrap().into(), 2),
            (OwnedFd::from(theirs), 3),
            (memory.try_clone().unwrap(), 4),
            (disk.into(), 5),
            (its_channel.into(), 6),
        ];
        let jailed = jail::spawn(&spec, fds, |_| Ok(())).unwrap();
        let answers = BufReader::new(monitor.try_clone().unwrap()).lines();
        let mut vm = Self { jailed, monitor, answers, complaints, _channel: channel };
        assert!(vm.answer().contains("QMP"));
        vm.ask("{'execute':'qmp_capabilities'}");
        vm
    }

    fn answer(&mut self) -> String {
        loop {
            match self.answers.next() {
                Some(Ok(line)) if line.contains("\"event\"") => {}
                Some(line) => return line.unwrap(),
                None => {
                    let complaints = fs::read_to_string(&self.complaints).unwrap();
                    panic!("{:?}: {complaints}", self.jailed.wait());
                }
            }
        }
    }

    fn ask(&mut self, command: &str) -> String {
        let _the_answer_tells = self.monitor.write_all(command.replace('\'', "\"").as_bytes());
        let answer = self.answer();
        assert!(answer.contains("\"return\""), "{command}: {answer}");
        answer
    }

    /// Passes a descriptor over the monitor, under a name.
    fn give(&mut self, fd: &OwnedFd, name: &str) {
        let command = format!("{{\"execute\":\"getfd\",\"arguments\":{{\"fdname\":\"{name}\"}}}}");
        let fds = [fd.as_raw_fd()];
        let parts = [IoSlice::new(command.as_bytes())];
        let control = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(self.monitor.as_raw_fd(), &parts, &control, MsgFlags::empty(), None).unwrap();
        let answer = self.answer();
        assert!(answer.contains("return"), "{answer}");
    }

    /// Asks again until the answer has this in it.
    fn wait_for(&mut self, command: &str, wanted: &str) {
        for _ in 0..600 {
            let answer = self.ask(command);
            if answer.contains(wanted) {
                return;
            }
            assert!(!answer.contains("failed"), "{answer}");
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("{command} never told {wanted}");
    }

    fn quit(mut self) {
        self.ask("{'execute':'quit'}");
        assert!(matches!(self.jailed.wait().unwrap(), WaitStatus::Exited(_, 0)));
    }
}

const IGNORE_SHARED: &str = "{'execute':'migrate-set-capabilities','arguments':{'capabilities':\
    [{'capability':'x-ignore-shared','state':true}]}}";

#[test]
fn runs_is_saved_and_is_cloned() {
    let folder = host::folder();
    let memory = memfd_create("memory", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    nix::unistd::ftruncate(&memory, i64::try_from(MEMORY_BYTES).unwrap()).unwrap();
    fcntl(&memory, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    let backend =
        |share: &str| format!("memory-backend-file,id=mem,size=64M,mem-path=/proc/self/fd/4,share={share}");
    let state =
        File::options().read(true).write(true).create_new(true).open(folder.path().join("state")).unwrap();

    let mut vm = Vm::start(&folder, &memory, &["-object", &backend("on")]);
    assert!(vm.ask("{'execute':'query-status'}").contains("running"));
    vm.ask("{'execute':'query-blockstats'}");
    vm.ask("{'execute':'block_resize','arguments':{'node-name':'r','size':2097152}}");
    vm.ask("{'execute':'stop'}");
    vm.ask(IGNORE_SHARED);
    vm.give(&state.try_clone().unwrap().into(), "state");
    vm.ask("{'execute':'migrate','arguments':{'uri':'fd:state'}}");
    vm.wait_for("{'execute':'query-migrate'}", "completed");
    vm.ask("{'execute':'cont'}");
    vm.quit();

    let mut clone = Vm::start(&folder, &memory, &["-object", &backend("off"), "-incoming", "defer"]);
    clone.ask(IGNORE_SHARED);
    std::io::Seek::rewind(&mut &state).unwrap();
    clone.give(&state.into(), "state");
    clone.ask("{'execute':'migrate-incoming','arguments':{'uri':'fd:state'}}");
    clone.wait_for("{'execute':'query-status'}", "paused");
    clone.ask("{'execute':'cont'}");
    assert!(clone.ask("{'execute':'query-status'}").contains("running"));
    clone.quit();
}
