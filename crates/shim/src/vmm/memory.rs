//! Files in memory, without names, that can be sealed.

use std::fs::File;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::error::{Context, Result};

/// Makes a file of so many zero bytes.
pub(crate) fn create(name: &str, bytes: u64) -> Result<File> {
    let doing = || format!("making a file in memory of {bytes} bytes");
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file: File = memfd_create(name, flags).context(doing)?.into();
    file.set_len(bytes).context(doing)?;
    Ok(file)
}

/// Nobody writes to it ever again, by any descriptor. (A VMM maps it copy-on-write, which sealing allows.)
pub(crate) fn seal(file: &File) -> Result<()> {
    let seals =
        SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(file, FcntlArg::F_ADD_SEALS(seals)).map(drop).context(|| "sealing a file in memory".into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_sealed_file_is_never_written_again() {
        let file = create("test", 4096).unwrap();
        file.write_all_at(b"before", 0).unwrap();
        seal(&file).unwrap();
        assert!(file.write_all_at(b"after", 0).is_err());
        assert!(file.set_len(0).is_err());
        let again = File::options()
            .write(true)
            .open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)));
        assert!(again.unwrap().write_all_at(b"after", 0).is_err());
    }
}
