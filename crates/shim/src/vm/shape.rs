//! How large a VM is, by what its workload is to have.

use crate::bundle::Plan;
use crate::config::Config;
use crate::error::Result;
use crate::vmm::{GuestImage, Shape};

/// Memory that the guest kernel and the guest take beside the workload's: a fixed part, and the kernel's own books,
/// one part in so many.
const GUEST_FIXED: u64 = 64 << 20;
const GUEST_PART: u64 = 32;

/// Size classes: powers of two from the smallest to the largest, then steps of the largest.
const CLASS_MIN: u64 = 64 << 20;
const CLASS_STEP: u64 = 512 << 20;

/// The size class of a workload, in bytes: what its VM gives it at most.
fn class(wanted: u64) -> u64 {
    if wanted <= CLASS_STEP {
        wanted.next_power_of_two().max(CLASS_MIN)
    } else {
        wanted.next_multiple_of(CLASS_STEP)
    }
}

/// The most that a plan's workload may ever be given, in bytes.
pub(crate) fn class_of(config: &Config, plan: &Plan) -> u64 {
    class(plan.memory_bytes.unwrap_or(config.memory_bytes))
}

/// The shape of the VM that a plan needs.
pub(crate) fn shape(config: &Config, plan: &Plan) -> Result<Shape> {
    let class = class_of(config, plan);
    let memory_bytes = (class + GUEST_FIXED + class / GUEST_PART).next_multiple_of(1 << 20);
    Ok(Shape { guest: GuestImage::find(&config.guest_dir)?, memory_bytes, vcpus: plan.vcpus })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_holds_what_is_asked_and_little_more() {
        for mib in [1_u64, 64, 65, 128, 200, 512, 513, 1500, 4096] {
            let class = class(mib << 20) >> 20;
            assert!(class >= mib && (class <= 64 || class < 2 * mib), "{mib}: {class}");
        }
        assert_eq!(class(600 << 20), 1 << 30);
    }
}
