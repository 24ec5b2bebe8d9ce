//! Whether the host's AppArmor knows the VMM's profile, found by looking.
//!
//! The profile is `crates/host/apparmor/bailey-vmm`. Loading it is the operator's: it is the host's policy, and stays
//! when no jail is there.

use std::fs;
use std::path::Path;

/// The profile that VMMs are put under.
pub const VMM_PROFILE: &str = "bailey-vmm";

/// Where the kernel lists its profiles, one in a line: `name (mode)`.
const PROFILES: &str = "/sys/kernel/security/apparmor/profiles";
const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";

/// What AppArmor is on this host, as far as one profile goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AppArmor {
    /// The kernel has it not, or has it off.
    Absent,
    /// It is on, and the profile cannot be used; with the reason.
    Unusable(String),
    /// The profile is loaded and enforced.
    Enforced,
    /// The profile is loaded, but in another mode, in which it may refuse nothing.
    Otherwise(String),
}

/// Whether the kernel has AppArmor, and has it on.
pub(super) fn is_on() -> bool {
    fs::read_to_string(ENABLED).is_ok_and(|text| text.trim() == "Y")
}

/// Looks for a profile.
#[must_use]
pub fn look(profile: &str) -> AppArmor {
    if !is_on() {
        return AppArmor::Absent;
    }
    match fs::read_to_string(Path::new(PROFILES)) {
        Ok(listed) => find(&listed, profile),
        Err(error) => AppArmor::Unusable(format!("its profiles cannot be read from {PROFILES}: {error}")),
    }
}

fn find(listed: &str, profile: &str) -> AppArmor {
    let mode =
        listed.lines().find_map(|line| line.strip_prefix(profile)?.strip_prefix(" (")?.strip_suffix(')'));
    match mode {
        Some("enforce") => AppArmor::Enforced,
        Some(mode) => AppArmor::Otherwise(mode.to_owned()),
        None => AppArmor::Unusable(format!("the profile {profile} is not loaded")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_found_by_its_whole_name() {
        let listed =
            "bailey-vmm-old (enforce)\nlsb_release (enforce)\nbailey-vmm (complain)\nother (enforce)\n";
        assert_eq!(find(listed, "other"), AppArmor::Enforced);
        assert_eq!(find(listed, VMM_PROFILE), AppArmor::Otherwise("complain".to_owned()));
        assert!(matches!(find("bailey-vmm-old (enforce)\n", VMM_PROFILE), AppArmor::Unusable(_)));
    }
}
