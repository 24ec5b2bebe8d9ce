//! A VM on this host: started by a driver, in a cgroup, under a user of its own, and watched while it is asked.
//!
//! What it is for, a sandbox, a template or a trial, is not known here.

mod choice;
mod place;
mod shape;

use std::time::Duration;

use bailey_host::cgroup::Cgroup;
use bailey_host::jail::uid::UidLease;
use bailey_types::guest::spec::{RootDisk, Scratch, Setup};
use tokio::sync::mpsc;
use tokio::time::timeout;

pub(crate) use self::choice::{driver, known_driver};
pub(crate) use self::place::{CGROUP_TOP, OwnedCgroup, lease_uid};
pub(crate) use self::shape::{class_of, shape};
use crate::clock;
use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::guest::{Event, Guest};
use crate::random;
use crate::vmm::{Disks, Driver, Launch, Machine, Origin, Shape};

/// How long a guest that has failed is given to end.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A VM, and what came with its start.
pub(crate) struct Vm {
    pub(crate) machine: Box<dyn Machine>,
    pub(crate) guest: Guest,
    pub(crate) events: mpsc::Receiver<Event>,
    pub(crate) uid: UidLease,
}

/// What a VM is on the host.
pub(crate) struct Place<'a> {
    pub(crate) name: &'a str,
    pub(crate) shape: &'a Shape,
    pub(crate) cgroup: &'a Cgroup,
}

impl Vm {
    /// Starts a VM, of which nothing is asked yet.
    pub(crate) async fn launch(
        config: &Config,
        driver: &dyn Driver,
        place: Place<'_>,
        origin: Origin,
        disks: Option<Disks>,
    ) -> Result<Vm> {
        let boots = !matches!(origin, Origin::Clone(_));
        let uid = lease_uid(config)?;
        let Place { name, shape, cgroup } = place;
        let launch = Launch { name, shape, origin, disks, uid: uid.uid(), cgroup, taps: Vec::new() };
        let mut machine = driver.launch(launch).await?;
        let (guest, events) = Guest::connect(machine.channel().await?);
        if boots {
            until_ready(config, &guest, &*machine).await?;
        }
        Ok(Vm { machine, guest, events, uid })
    }
}

/// What makes a VM a sandbox of its own now.
pub(crate) fn setup(root: RootDisk, scratch: Scratch) -> Result<Setup> {
    let mut entropy = [0; 32];
    random::fill(&mut entropy)?;
    Ok(Setup { entropy, realtime_ns: clock::realtime_ns(), hostname: "localhost".to_owned(), root, scratch })
}

/// Waits for the guest's greeting, for its end, or for too long.
async fn until_ready(config: &Config, guest: &Guest, machine: &dyn Machine) -> Result<()> {
    let waited = timeout(config.boot_timeout, with_machine(machine, guest.ready()));
    waited.await.unwrap_or_else(|_| {
        let seconds = config.boot_timeout.as_secs();
        let text = format!("the guest has not booted within {seconds} s; {}", last_words(machine));
        Err(Error::new(Kind::Unavailable, text))
    })
}

/// Does something with the guest; if that fails, or its VMM ends first, says what both said last.
pub(crate) async fn with_machine<T>(
    machine: &dyn Machine,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::select! {
        result = work => {
            let Err(error) = result else { return result };
            // A guest that fails mostly ends, and the reason is what it says last.
            let _goes_on = timeout(LAST_WORDS, machine.ended()).await;
            Err(match machine.last_words() {
                words if words.is_empty() => error,
                words => Error::new(error.kind(), format!("the guest failed; its last words: {words}")).because(error),
            })
        }
        end = machine.ended() => Err(Error::internal(format!("{end}; {}", last_words(machine)))),
    }
}

pub(crate) fn last_words(machine: &dyn Machine) -> String {
    match machine.last_words() {
        words if words.is_empty() => "its console has shown nothing".to_owned(),
        words => format!("its last words: {words}"),
    }
}
