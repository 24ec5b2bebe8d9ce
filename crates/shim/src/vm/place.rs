//! What a VM needs of the host before it can be: a cgroup, and a user.

use bailey_host::cgroup::{Cgroup, Limits};
use bailey_host::jail::uid::{self, UidLease};

use crate::config::Config;
use crate::error::{Context, Kind, Result};

/// A cgroup that is removed with this value.
#[derive(Debug)]
pub(crate) struct OwnedCgroup(pub(crate) Cgroup);

/// The cgroup above those that have no place of their own: templates and trials. It stays.
pub(crate) const CGROUP_TOP: &str = "/bailey";

impl OwnedCgroup {
    pub(crate) fn create(cgroup: Cgroup, limits: &Limits) -> Result<OwnedCgroup> {
        let owned = OwnedCgroup(cgroup);
        owned.0.create().context(|| "making the sandbox's cgroup".into())?;
        owned.0.set(limits).context(|| "limiting the sandbox's cgroup".into())?;
        Ok(owned)
    }
}

impl Drop for OwnedCgroup {
    fn drop(&mut self) {
        if let Err(error) = self.0.remove_up_to(CGROUP_TOP.as_ref()) {
            tracing::warn!(
                "{}: {}",
                error,
                std::error::Error::source(&error).map_or(String::new(), ToString::to_string)
            );
        }
    }
}

/// Leases a user for a VMM.
pub(crate) fn lease_uid(config: &Config) -> Result<UidLease> {
    uid::lease(config.uids.clone(), &config.state_dir.join("uids"))
        .context_as(Kind::Unavailable, || "taking a user for the VMM".into())
}
