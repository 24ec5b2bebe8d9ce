//! Fresh randomness of the host's kernel.

use std::fs::File;
use std::io::Read;

use crate::error::{Context, Result};

/// Fills all of it.
pub(crate) fn fill(bytes: &mut [u8]) -> Result<()> {
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(bytes))
        .context(|| "reading /dev/urandom".into())
}
