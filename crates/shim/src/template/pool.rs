//! The spares of one keeper: made one after the other, a moment after they were last needed, and ended for want of use.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use super::{hand_over, rehearsal, spare};
use crate::config::{Config, FILE_VARIABLE};
use crate::error::{Context, Error, Result};
use crate::image::Image;
use crate::vm::CGROUP_TOP;
use crate::vmm::Saved;

/// How long after a sandbox has started the next spare is begun: that start is to have the processors to itself.
const PAUSE: Duration = Duration::from_millis(300);

/// How long spares are given to end.
const END: Duration = Duration::from_secs(5);

/// How often in a row a spare may fail before no more are made.
const FAILURES_MAX: u32 = 3;

/// A process that has a VM ready.
struct Waiting {
    pid: u32,
    control: UnixStream,
}

enum Making {
    Nothing,
    Later(Instant),
    Now(JoinHandle<Result<Waiting>>),
}

pub(super) struct Pool {
    config: Config,
    namespace: String,
    /// The template's shape, as its spares are told.
    shape: String,
    image: Option<Image>,
    waiting: Vec<Waiting>,
    making: Making,
    /// When nobody will have wanted one for too long.
    unused: Instant,
    failures: u32,
    /// Tells of each spare that has ended, whoever has it.
    ends: (mpsc::UnboundedSender<u32>, mpsc::UnboundedReceiver<u32>),
}

impl Pool {
    /// A pool that is still empty. Where the VMM cannot have spares it stays so.
    pub(super) fn new(config: &Config, namespace: &str, shape: &str, possible: bool) -> Pool {
        let mut config = config.clone();
        if !possible {
            config.spares = 0;
        }
        let (now, shape) = (Instant::now(), shape.to_owned());
        let namespace = namespace.to_owned();
        let (waiting, making) = (Vec::new(), Making::Nothing);
        Pool {
            config,
            namespace,
            shape,
            image: None,
            waiting,
            making,
            unused: now,
            failures: 0,
            ends: mpsc::unbounded_channel(),
        }
    }

    /// A sandbox starts: more may follow.
    pub(super) fn wanted(&mut self) {
        self.unused = Instant::now() + self.config.spare_max_idle;
        self.plan();
    }

    fn plan(&mut self) {
        let room = (self.waiting.len() as u64) < self.config.spares;
        if room && self.failures < FAILURES_MAX && matches!(self.making, Making::Nothing) {
            self.making = Making::Later(Instant::now() + PAUSE);
        }
    }

    /// Hands a spare to whoever asks, if there is one.
    pub(super) fn give(&mut self, stream: &UnixStream) -> bool {
        let Some(spare) = self.waiting.pop() else {
            // Whoever asks and has gone needs no answer.
            let _gone = hand_over::refuse(stream);
            return false;
        };
        hand_over::send(stream.as_fd(), b"!", &[spare.control.as_raw_fd()]).is_ok()
    }

    /// Does what is next to do, when it is time: cancelled at any point, it goes on when called again.
    pub(super) async fn advance(&mut self, saved: &Saved) {
        let unused = self.unused;
        match &mut self.making {
            Making::Nothing if self.waiting.is_empty() => std::future::pending().await,
            Making::Nothing => {
                tokio::select! {
                    () = sleep_until(unused) => self.waiting.clear(),
                    Some(pid) = self.ends.1.recv() => self.ended(pid),
                }
            }
            Making::Later(at) => {
                sleep_until(*at).await;
                self.making = Making::Nothing;
                match self.begin(saved) {
                    Ok(making) => self.making = Making::Now(making),
                    Err(error) => self.failed(&error),
                }
            }
            Making::Now(making) => {
                let made = making.await;
                self.making = Making::Nothing;
                match made
                    .map_err(|error| Error::internal("making a spare").because(error))
                    .and_then(|made| made)
                {
                    Ok(spare) => {
                        self.failures = 0;
                        self.waiting.push(spare);
                    }
                    Err(error) => self.failed(&error),
                }
                self.plan();
            }
        }
    }

    /// One that waited may have ended: its VM was killed, or it was.
    fn ended(&mut self, pid: u32) {
        let before = self.waiting.len();
        self.waiting.retain(|spare| spare.pid != pid);
        if self.waiting.len() < before {
            self.failed(&Error::internal("a spare ended while it waited"));
            self.plan();
        }
    }

    /// Without spares, sandboxes start a little slower.
    fn failed(&mut self, error: &Error) {
        self.failures += 1;
        tracing::warn!("there is no spare: {}", error.chain());
    }

    fn begin(&mut self, saved: &Saved) -> Result<JoinHandle<Result<Waiting>>> {
        if self.image.is_none() {
            self.image = Some(rehearsal::image(&self.config, &self.namespace)?);
        }
        let image =
            self.image.as_ref().ok_or_else(|| Error::internal("there is no image to rehearse with"))?;
        let (ours, theirs) = UnixStream::pair().context(|| "making a socket pair".into())?;
        let mut process = Command::new("/proc/self/exe")
            .arg0("containerd-shim-bailey-v1")
            .envs(self.config.file.as_ref().map(|file| (FILE_VARIABLE, file)))
            .args(["-namespace", &self.namespace, "-id", &self.shape, "spare"])
            .current_dir("/")
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context(|| "starting a spare".into())?;
        spare::offer(&ours, saved, &image.file, &image.root)?;
        let pid = process.id().ok_or_else(|| Error::internal("a spare ended at once"))?;
        let ends = self.ends.0.clone();
        let cgroup = spare::cgroup(&self.namespace, pid)?;
        tokio::spawn(async move {
            // However it ends, it has ended.
            let _how = process.wait().await;
            // One that was killed leaves its cgroup. It is gone in all other cases, which is no error.
            let removed = tokio::task::spawn_blocking(move || cgroup.remove_up_to(CGROUP_TOP.as_ref())).await;
            if let Ok(Err(error)) = removed {
                tracing::warn!("removing the cgroup of a spare: {error}");
            }
            // Nobody listens once the keeper ends.
            let _nobody = ends.send(pid);
        });
        let longest = self.config.boot_timeout * 2;
        Ok(tokio::spawn(async move {
            let waits = timeout(longest, until_waiting(ours)).await;
            let control = waits.context(|| "making a spare".into())??;
            Ok(Waiting { pid, control })
        }))
    }

    /// Ends those that wait, and the one that is being made.
    pub(super) async fn end(mut self) {
        if let Making::Now(making) = self.making {
            // Ending it in between would leave its VM to the kernel, which is slower than to wait.
            if let Ok(Ok(Ok(spare))) = timeout(END, making).await {
                self.waiting.push(spare);
            }
        }
        // Letting go of the sockets is what ends them.
        let mut left: Vec<u32> = self.waiting.into_iter().map(|spare| spare.pid).collect();
        let ended = timeout(END, async {
            while !left.is_empty() {
                let Some(pid) = self.ends.1.recv().await else { break };
                left.retain(|left| *left != pid);
            }
        });
        if ended.await.is_err() {
            for pid in left {
                // Not reaped yet, so the number is still its own. Its VM ends with it.
                let _just_ended = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
            }
        }
    }
}

/// Reads a spare's first word.
async fn until_waiting(control: UnixStream) -> Result<UnixStream> {
    let doing = || "watching a spare".to_owned();
    control.set_nonblocking(true).context(doing)?;
    let control = tokio::net::UnixStream::from_std(control).context(doing)?;
    let message = hand_over::next(&control).await?;
    match message.bytes.as_slice() {
        spare::WAITS => control.into_std().context(doing),
        [] => Err(Error::internal("a spare ended without a word")),
        text => Err(Error::internal(String::from_utf8_lossy(text).into_owned())),
    }
}
