//! The false Firecracker's API: HTTP by hand, the states of a VM, and what each request does.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::guest::{self, Processors};
use super::table::{self, Phase};
use super::{Log, Mode};

const NOT_AFTER: &str = "The requested operation is not supported after starting the microVM.";
const NOT_BEFORE: &str = "The requested operation is not supported before starting the microVM.";
const NO_LOAD: &str = "Load snapshot error: Loading a microVM snapshot not allowed after configuring \
                       boot-specific resources.";
const RUNNING: &str = "Create snapshot error: Cannot save the microVM state: Operation not allowed: \
                       save/restore unavailable while running";

/// How long a guest takes to boot.
const BOOT: Duration = Duration::from_millis(20);
const SLOW: Duration = Duration::from_millis(500);

/// The files that stay open, as a VM's disks do.
#[derive(Default)]
struct Vm {
    started: bool,
    /// Bodies of what was configured, which is what is saved.
    configured: serde_json::Map<String, Value>,
    open: Vec<File>,
    processors: Processors,
}

struct Server<'a> {
    mode: Mode,
    log: Log,
    trap: &'a Path,
    vm: Vm,
}

/// Serves until it is killed.
pub(super) fn run(mode: Mode, arguments: &[String], log: Log, trap: &Path) -> ! {
    let known = ["--api-sock", "--level"];
    if arguments.chunks(2).any(|pair| pair.len() != 2 || !known.contains(&pair[0].as_str())) {
        log.add(&format!("unknown arguments {arguments:?}"));
        std::process::abort();
    }
    match mode {
        Mode::Dies => std::process::abort(),
        Mode::Deaf => thread::sleep(Duration::from_secs(3600)),
        _ => {}
    }
    let socket = arguments.chunks(2).find(|pair| pair[0] == "--api-sock").map(|pair| pair[1].clone());
    let listener = UnixListener::bind(socket.unwrap_or_else(|| "/run/firecracker.socket".into())).unwrap();
    let mut server = Server { mode, log, trap, vm: Vm::default() };
    loop {
        let (stream, _) = listener.accept().unwrap();
        // The other end going away is no failure.
        let _gone = server.connection(stream);
    }
}

/// One request, as far as it matters.
struct Request {
    method: String,
    path: String,
    body: Option<Vec<u8>>,
}

fn read(stream: &mut UnixStream) -> io::Result<Request> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let mut words = head.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")?.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    stream.read_exact(&mut body)?;
    Ok(Request { method, path, body: length.map(|_| body) })
}

fn answer(stream: &mut UnixStream, outcome: Result<Value, String>) -> io::Result<()> {
    let (status, body) = match outcome {
        Ok(Value::Null) => return stream.write_all(b"HTTP/1.1 204 \r\nServer: Firecracker API\r\n\r\n"),
        Ok(body) => (200, body),
        Err(fault) => (400, json!({ "fault_message": fault })),
    };
    let body = body.to_string();
    let head = "Server: Firecracker API\r\nConnection: keep-alive\r\nContent-Type: application/json";
    let length = body.len();
    stream.write_all(
        format!("HTTP/1.1 {status} \r\n{head}\r\nContent-Length: {length}\r\n\r\n{body}").as_bytes(),
    )
}

impl Server<'_> {
    fn connection(&mut self, mut stream: UnixStream) -> io::Result<()> {
        loop {
            let request = read(&mut stream)?;
            if request.path == "/boot-source" && self.misbehave(&mut stream)? {
                return Ok(());
            }
            let body = request.body.as_deref().map(String::from_utf8_lossy).unwrap_or_default();
            self.log.add(&format!("{} {} {body}", request.method, request.path));
            let outcome = table::find(&request.method, &request.path, request.body.as_deref())
                .and_then(|(operation, body)| self.perform(operation, &request.path, body));
            if let Err(fault) = &outcome {
                self.log.add(&format!("fault {fault}"));
            }
            answer(&mut stream, outcome)?;
        }
    }

    fn misbehave(&self, stream: &mut UnixStream) -> io::Result<bool> {
        match self.mode {
            Mode::Crashes => {
                say("Shutting down VM after intercepting a bad syscall");
                std::process::abort();
            }
            Mode::Silent => thread::sleep(Duration::from_secs(3600)),
            Mode::Closes => {}
            Mode::Garbage => stream.write_all(b"\x00\x01\x02 what is HTTP?\r\n\r\n")?,
            Mode::Huge => {
                stream.write_all(b"HTTP/1.1 204 \r\nServer: ")?;
                stream.write_all(&vec![b'x'; 1 << 20])?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn perform(&mut self, operation: &table::Operation, path: &str, body: Value) -> Result<Value, String> {
        match operation.phase {
            Phase::BeforeBoot if self.vm.started => return Err(NOT_AFTER.into()),
            Phase::AfterBoot if !self.vm.started => return Err(NOT_BEFORE.into()),
            _ => {}
        }
        match (operation.method, path) {
            ("GET", "/version") => {
                let version = if self.mode == Mode::Old { "1.6.0" } else { "1.17.0" };
                return Ok(json!({ "firecracker_version": version }));
            }
            ("GET", _) => return Ok(json!({})),
            ("PUT", "/actions") => self.act(&body)?,
            ("PUT", "/snapshot/load") => self.load(&body)?,
            ("PUT", "/snapshot/create") => self.save(&body)?,
            ("PATCH", "/vm") => self.vm.processors.pause(body["state"] == "Paused"),
            ("PUT", _) => self.configure(path, body)?,
            _ => {}
        }
        Ok(Value::Null)
    }

    fn act(&mut self, body: &Value) -> Result<(), String> {
        if body["action_type"] != "InstanceStart" {
            return Ok(());
        }
        if self.vm.started {
            return Err(NOT_AFTER.into());
        }
        if !self.vm.configured.contains_key("/boot-source") {
            return Err("Start microvm error: Cannot start microvm without kernel configuration.".into());
        }
        if self.mode == Mode::NoKvm {
            return Err("Start microvm error: Error creating KVM object: No such file (os error 2)".into());
        }
        say("the false guest boots");
        self.vm.started = true;
        match self.mode {
            Mode::Never => {}
            Mode::Slow => self.vm.processors.boot(SLOW),
            _ => self.vm.processors.boot(BOOT),
        }
        Ok(())
    }

    /// Opens what is named when it is named, as the real one does.
    fn configure(&mut self, path: &str, body: Value) -> Result<(), String> {
        if self.mode == Mode::Refuses && path == "/drives/scratch" {
            return Err("Drive config error: Unable to create the virtio block device".into());
        }
        match path {
            "/boot-source" => {
                self.open("Boot source error: kernel", &body["kernel_image_path"], false)?;
                self.open("Boot source error: initrd", &body["initrd_path"], false)?;
            }
            "/vsock" => self.vsock(&body)?,
            _ if path.starts_with("/drives/") => self.drive(&body)?,
            _ => {}
        }
        self.vm.configured.insert(path.to_owned(), body);
        Ok(())
    }

    fn drive(&mut self, body: &Value) -> Result<(), String> {
        let read_only = body["is_read_only"].as_bool().ok_or("Drive config error: is_read_only is needed")?;
        self.open("Drive config error", &body["path_on_host"], !read_only)
    }

    fn open(&mut self, what: &str, path: &Value, writable: bool) -> Result<(), String> {
        let path = path.as_str().ok_or_else(|| format!("{what}: no path"))?;
        let open = |writable| File::options().read(true).write(writable).open(path);
        let mut file = open(writable).map_err(|error| format!("{what}: {path}: {error}"))?;
        let length = file.metadata().map_err(|error| error.to_string())?.len();
        let mut start = [0; 8];
        let count = file.read(&mut start).map_err(|error| error.to_string())?;
        let start = String::from_utf8_lossy(&start[..count]).trim_matches('\0').to_owned();
        let could_write = open(true).is_ok();
        self.log.add(&format!("open {path} length {length} writable {could_write} starts {start:?}"));
        self.vm.open.push(file);
        Ok(())
    }

    fn vsock(&mut self, body: &Value) -> Result<(), String> {
        let path = body["uds_path"].as_str().unwrap_or_default();
        if self.mode == Mode::Link {
            return symlink(self.trap, path).map_err(|error| error.to_string());
        }
        let listener = UnixListener::bind(path);
        let listener = listener.map_err(|error| format!("Vsock config error: Cannot bind: {error}"))?;
        let answer = if self.mode == Mode::BadVsock { "HTTP/1.1 404\n" } else { "OK 1073741824\n" };
        guest::serve(listener, self.vm.processors.clone(), answer);
        Ok(())
    }

    fn save(&mut self, body: &Value) -> Result<(), String> {
        if !self.vm.processors.paused() {
            return Err(RUNNING.into());
        }
        let create = |key: &str, truncate| {
            let path = body[key].as_str().unwrap_or_default();
            let file = File::options().write(true).create(true).truncate(truncate).open(path);
            file.map_err(|error| format!("Create snapshot error: Cannot perform open on {path}: {error}"))
        };
        let mib = self.vm.configured["/machine-config"]["mem_size_mib"].as_u64().unwrap_or(0);
        let write = |mut file: File, bytes: &[u8]| file.write_all(bytes).map_err(|error| error.to_string());
        let state = Value::Object(self.vm.configured.clone()).to_string();
        write(create("snapshot_path", true)?, state.as_bytes())?;
        let memory = create("mem_file_path", false)?;
        memory.set_len(mib << 20).map_err(|error| error.to_string())?;
        write(memory, b"guest's ")
    }

    fn load(&mut self, body: &Value) -> Result<(), String> {
        if !self.vm.configured.is_empty() {
            return Err(NO_LOAD.into());
        }
        if body.get("mem_backend").is_some() == body.get("mem_file_path").is_some() {
            return Err("either `mem_backend` or `mem_file_path` exclusively is required".into());
        }
        let failed =
            |error: io::Error| format!("Load snapshot error: Failed to restore from snapshot: {error}");
        let state = File::open(body["snapshot_path"].as_str().unwrap_or_default()).map_err(failed)?;
        let state: Value = serde_json::from_reader(state).map_err(|error| failed(error.into()))?;
        self.open("Load snapshot error", &body["mem_backend"]["backend_path"], false)?;
        for (path, device) in state.as_object().into_iter().flatten() {
            match path.as_str() {
                "/vsock" => self.vsock(device)?,
                _ if path.starts_with("/drives/") => self.drive(device)?,
                _ => {}
            }
        }
        self.vm.started = true;
        self.vm.processors.pause(body["resume_vm"] != true);
        self.vm.processors.boot(Duration::ZERO);
        Ok(())
    }
}

/// The guest's serial console is standard output, and so is Firecracker's log.
fn say(line: &str) {
    // Nobody may be listening.
    let _lost = writeln!(io::stdout(), "{line}");
}
