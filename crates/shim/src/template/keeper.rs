//! A template's keeper: boots the VM, saves it, ends it, and hands out what was saved.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bailey_host::cgroup::{Cgroup, Limits};
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Instant, sleep_until, timeout};

use super::pool::Pool;
use super::{END, READY, SPARE, folder, hand_over, shape_of, socket};
use crate::args::Args;
use crate::config::Config;
use crate::error::{Context, Result};
use crate::vm::{self, Place, Vm};
use crate::vmm::{self, Driver, Origin, Saved, Shape};

/// Longest wait for a request on a connection.
const ASKED: Duration = Duration::from_secs(5);

/// Makes one template and serves it until its time is over.
pub(crate) fn keep(args: &Args) -> Result<()> {
    crate::log::to_stderr();
    // Not a child of the sandbox that happened to be the first.
    nix::unistd::setsid().context(|| "leaving the session".into())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context(|| "starting the runtime".into())?.block_on(async {
        let config = Config::load(None)?;
        let shape = shape_of(&config, &args.id)?;
        let driver = vm::driver(&config).await?;
        let path = socket(&config, &args.namespace, &driver.describe(), &shape)?;
        let saved = make(&config, &args.namespace, &*driver, &shape).await?;
        let pool = Pool::new(&config, &args.namespace, &args.id, driver.describe().late_disks);
        drop(driver);
        let listener = listen(&path)?;
        let mut out = std::io::stdout();
        out.write_all(READY)
            .and_then(|()| out.flush())
            .context(|| "telling that the template is there".into())?;
        let null = File::options().write(true).open("/dev/null").context(|| "opening /dev/null".into())?;
        nix::unistd::dup2_stdout(&null).context(|| "closing the output".into())?;
        let served = serve(&config, &listener, &saved, pool).await;
        fs::remove_file(&path).context(|| format!("removing {}", path.display()))?;
        // Others may be there still, or another may have removed it.
        let _shared = fs::remove_dir(folder(&config.state_dir, &args.namespace));
        served
    })
}

/// Boots a VM up to its guest's greeting, and saves it.
async fn make(config: &Config, namespace: &str, driver: &dyn Driver, shape: &Shape) -> Result<Saved> {
    let name = format!("template-{}m-{}c", shape.memory_bytes >> 20, shape.vcpus);
    let cgroup =
        Cgroup::at(&Path::new(vm::CGROUP_TOP).join(namespace).join(format!("{name}-{}", std::process::id())));
    let cgroup = cgroup.context(|| "naming the template's cgroup".into())?;
    let _removed_at_the_end = vm::OwnedCgroup::create(
        cgroup.clone(),
        &Limits {
            memory_bytes: Some(shape.memory_bytes + driver.describe().overhead_bytes),
            pids: Some(vmm::threads(shape.vcpus)),
            ..Limits::default()
        },
    )?;
    let place = Place { name: &name, shape, cgroup: &cgroup };
    let vm = Vm::launch(config, driver, place, Origin::Template, None).await?;
    vm.machine.save().await
}

fn listen(path: &PathBuf) -> Result<UnixListener> {
    let doing = || format!("listening on {}", path.display());
    // One that was killed leaves its name.
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).context(doing),
        _ => {}
    }
    UnixListener::bind(path).context(doing)
}

/// Hands the template out until it is too old, used up, unused for too long, or asked to end.
async fn serve(config: &Config, listener: &UnixListener, saved: &Saved, mut pool: Pool) -> Result<()> {
    let old = Instant::now() + config.template_max_age;
    let mut idle = Instant::now() + config.template_max_idle;
    let mut given = 0;
    while given < config.template_max_clones {
        let stream = tokio::select! {
            accepted = listener.accept() => accepted.context(|| "accepting a connection".into())?.0,
            () = pool.advance(saved) => continue,
            () = sleep_until(old) => break,
            () = sleep_until(idle) => break,
        };
        let Some((asked, stream)) = question(stream).await? else { continue };
        let is_given = match asked {
            END => break,
            SPARE => pool.give(&stream),
            _ => hand_over::give(&stream, saved).is_ok(),
        };
        if is_given {
            given += 1;
            idle = Instant::now() + config.template_max_idle;
            pool.wanted();
        }
    }
    pool.end().await;
    Ok(())
}

/// What is asked on a connection; none if nothing is.
async fn question(mut stream: UnixStream) -> Result<Option<(u8, StdStream)>> {
    // The folder is root's alone; this holds even if it were not.
    if stream.peer_cred().is_ok_and(|peer| peer.uid() != 0) {
        return Ok(None);
    }
    let mut asked = [0];
    match timeout(ASKED, stream.read_exact(&mut asked)).await {
        Ok(Ok(_)) => {}
        // It went away, or says nothing: the next one.
        Ok(Err(_)) | Err(_) => return Ok(None),
    }
    Ok(Some((asked[0], stream.into_std().context(|| "answering".into())?)))
}
