//! The short-lived ways to call the shim: `start`, `delete`, `-version`.

mod container_class;

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bailey_host::cgroup::Cgroup;
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use sha2::{Digest, Sha256};

use crate::args::Args;
use crate::bundle::{self, Class};
use crate::clock;
use crate::config::{Config, FromContainerd};
use crate::error::{Context, Error, Kind, Result};
use crate::image::{self, cache::Collected};
use crate::template;

/// The descriptor on which the serving process finds its socket: standard input.
pub(crate) const SOCKET_FD: i32 = 0;

/// Where containerd looks for a shim's address after its own restart, in the bundle.
pub(crate) const ADDRESS_FILE: &str = "address";

/// The task API that containerd 2 speaks.
const NEWEST_API: u32 = 3;

/// What a task counts as whose shim is gone: as if it was killed.
const LOST: u32 = 128 + libc::SIGKILL.cast_unsigned();

/// Starts the process that serves the sandbox, in the bundle's folder, and prints where.
pub(crate) fn start(args: &Args) -> Result<()> {
    let config = Config::load(None)?;
    let spec = bundle::load_spec(Path::new("."))?;
    if bundle::class(&spec)? == Class::Container {
        return Err(container_class::become_runc(&config, args, spec));
    }
    let socket = socket_path(&config, args);
    let listener = listen(&socket)?;
    let address = format!("unix://{}", socket.display());
    fs::write(ADDRESS_FILE, &address).context(|| format!("writing {ADDRESS_FILE} in the bundle"))?;
    // What a spare cannot do, or fails at, a shim of its own does, or tells why not.
    let adopted = template::adopt(&config, args, &spec, &listener).ok().flatten();
    let pid = adopted.map_or_else(|| serve(args, &listener), Ok)?;
    fs::write("shim.pid", pid.to_string()).context(|| "writing shim.pid in the bundle".into())?;
    let mut out = io::stdout();
    let reply = reply(FromContainerd::read().newest_api, &address);
    out.write_all(reply.as_bytes()).and_then(|()| out.flush()).context(|| "telling the address".into())
}

/// What containerd expects to read: the bare address up to 1.6, more after that.
fn reply(newest_api: Option<u32>, address: &str) -> String {
    match newest_api {
        None => address.to_owned(),
        Some(newest) => {
            let version = newest.min(NEWEST_API);
            serde_json::json!({"version": version, "address": address, "protocol": "ttrpc"}).to_string()
        }
    }
}

/// One socket for each sandbox; its name is short, whatever the names that it stands for.
fn socket_path(config: &Config, args: &Args) -> PathBuf {
    let mut hash = Sha256::new();
    for part in [&args.address, &args.namespace, &args.id] {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    let name: String = hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    config.state_dir.join("s").join(name)
}

fn listen(socket: &Path) -> Result<UnixListener> {
    let doing = || format!("listening on {}", socket.display());
    if let Some(folder) = socket.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o711).create(folder).context(doing)?;
    }
    match UnixListener::bind(socket) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(socket).is_ok() {
                return Err(Error::new(Kind::AlreadyExists, "this sandbox has a shim already"));
            }
            // Its shim was killed.
            fs::remove_file(socket).context(doing)?;
            UnixListener::bind(socket).context(doing)
        }
        other => other.context(doing),
    }
}

fn serve(args: &Args, listener: &UnixListener) -> Result<u32> {
    let socket = listener.try_clone().context(|| "copying the socket".into())?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("containerd-shim-bailey-v1")
        .args(["-namespace", &args.namespace, "-id", &args.id, "-address", &args.address])
        .args(args.debug.then_some("-debug"))
        .arg("serve")
        .stdin(OwnedFd::from(socket))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    let child = command.spawn().context(|| "starting the shim's serving process".into())?;
    Ok(child.id())
}

/// Cleans up after a sandbox whose shim is gone. Its VMM went with it; what has a name is removed here.
pub(crate) fn delete(args: &Args) -> Result<()> {
    if let Some(bundle) = &args.bundle {
        std::env::set_current_dir(bundle).context(|| format!("entering the bundle {bundle}"))?;
    }
    let config = Config::load(None)?;
    if let Ok(spec) = bundle::load_spec(Path::new(".")) {
        if bundle::class(&spec)? == Class::Container {
            return Err(container_class::exec_runc_shim());
        }
        let plan = bundle::plan(&spec, &args.namespace, &args.id, false);
        if let Some(cgroup) = plan.ok().and_then(|plan| Cgroup::at(&plan.cgroup).ok()) {
            cgroup.remove().context(|| "removing the sandbox's cgroup".into())?;
        }
    }
    match fs::remove_file(socket_path(&config, args)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).context(|| "removing the sandbox's socket".into());
        }
        _ => {}
    }
    let response = DeleteResponse {
        exit_status: LOST,
        exited_at: MessageField::some(clock::timestamp(clock::since_epoch())),
        ..DeleteResponse::default()
    };
    let bytes = response.write_to_bytes().context(|| "writing the answer".into())?;
    io::stdout().write_all(&bytes).context(|| "answering".into())
}

/// Tells containerd 2 what this runtime is, in its own encoding. It hands options over, none of which matter here.
pub(crate) fn info() -> Result<()> {
    let version =
        RuntimeVersion { version: env!("CARGO_PKG_VERSION").to_owned(), ..RuntimeVersion::default() };
    let info = RuntimeInfo {
        name: "io.containerd.bailey.v1".to_owned(),
        version: MessageField::some(version),
        ..RuntimeInfo::default()
    };
    let bytes = info.write_to_bytes().context(|| "writing what this runtime is".into())?;
    io::stdout().write_all(&bytes).context(|| "telling what this runtime is".into())
}

/// Removes from the cache what is of no more use, and says what.
pub(crate) fn collect() -> Result<()> {
    tell(image::cache::collect_all(&Config::load(None)?, true)?)
}

/// Removes the images of a namespace that are not in use, and says how many.
pub(crate) fn drop_images(args: &Args) -> Result<()> {
    tell(image::cache::drop_images(&Config::load(None)?, &args.namespace)?)
}

fn tell(collected: Collected) -> Result<()> {
    let Collected { removed, removed_bytes, kept, kept_bytes } = collected;
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let line = format!(
        "removed {removed} images ({} MiB), kept {kept} ({} MiB)\n",
        mib(removed_bytes),
        mib(kept_bytes)
    );
    io::stdout().write_all(line.as_bytes()).context(|| "printing".into())
}

/// Prints the version.
pub(crate) fn version() -> Result<()> {
    let line = format!("containerd-shim-bailey-v1 {}\n", env!("CARGO_PKG_VERSION"));
    io::stdout().write_all(line.as_bytes()).context(|| "printing".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_containerd_is_answered_in_its_own_way() {
        // 1.6 reads the bare address; 1.7 asks for at most version 2, and 2.x for 3.
        assert_eq!(reply(None, "unix:///s"), "unix:///s");
        for (newest, version) in [(2, 2), (3, 3), (9, 3)] {
            let reply: serde_json::Value = serde_json::from_str(&reply(Some(newest), "unix:///s")).unwrap();
            let wanted = serde_json::json!({"version": version, "address": "unix:///s", "protocol": "ttrpc"});
            assert_eq!(reply, wanted);
        }
    }
}
