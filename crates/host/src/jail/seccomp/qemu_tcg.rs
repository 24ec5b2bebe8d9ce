//! What QEMU needs besides when it emulates the processor: nothing. Its translated code is ordinary memory.

use super::Call;

pub(super) const CALLS: &[Call] = &[];
