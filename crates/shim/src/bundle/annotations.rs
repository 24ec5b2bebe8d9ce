//! What a caller may ask of a sandbox beyond the OCI specification: annotations below `dev.bailey.`.

use oci_spec::runtime::Spec;

use crate::config::Start;
use crate::error::{Error, Result};
use crate::size::parse_size;

const PREFIX: &str = "dev.bailey.";

/// Bytes in a block of the scratch disk.
const BLOCK: u64 = 4096;

/// The smallest scratch disk that an ext4 filesystem fits on with room to spare, in bytes.
const SCRATCH_MIN: u64 = 4 << 20;

/// Which kind of sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Class {
    #[default]
    MicroVm,
    Container,
}

/// Limits of disk I/O, on both disks together. None is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct IoLimits {
    pub(crate) read_bytes_per_second: Option<u64>,
    pub(crate) write_bytes_per_second: Option<u64>,
    pub(crate) reads_per_second: Option<u64>,
    pub(crate) writes_per_second: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Annotations {
    pub(crate) class: Class,
    pub(crate) start: Option<Start>,
    /// A small init as the first process.
    pub(crate) init: bool,
    /// Size of the scratch disk, in bytes.
    pub(crate) scratch_bytes: Option<u64>,
    pub(crate) io: IoLimits,
    /// Bytes per second that standard output and error together may bring.
    pub(crate) log_bytes_per_second: Option<u64>,
}

impl Annotations {
    /// Reads the annotations of a specification.
    pub(crate) fn read(spec: &Spec) -> Result<Annotations> {
        let mut read = Annotations::default();
        for (key, value) in spec.annotations().iter().flatten() {
            if let Some(name) = key.strip_prefix(PREFIX) {
                read.take(name, value).map_err(|error| {
                    Error::invalid(format!("the annotation {key} = \"{value}\"")).because(error)
                })?;
            }
        }
        Ok(read)
    }

    fn take(&mut self, name: &str, value: &str) -> Result<()> {
        let rate = || parse_size(value).and_then(at_least_one).map(Some);
        match name {
            "class" => {
                self.class = match value {
                    "microvm" => Class::MicroVm,
                    "container" => Class::Container,
                    _ => return Err(Error::invalid("is neither microvm nor container")),
                }
            }
            "start" => {
                self.start = match value {
                    "warm" => Some(Start::Warm),
                    "cold" => Some(Start::Cold),
                    _ => return Err(Error::invalid("is neither warm nor cold")),
                }
            }
            "init" => self.init = value.parse().map_err(|_| Error::invalid("is neither true nor false"))?,
            "scratch" => {
                let bytes = parse_size(value)?;
                if bytes < SCRATCH_MIN || !bytes.is_multiple_of(BLOCK) {
                    let text = format!("is less than {SCRATCH_MIN} bytes, or no multiple of {BLOCK}");
                    return Err(Error::invalid(text));
                }
                self.scratch_bytes = Some(bytes);
            }
            "io.read-bps" => self.io.read_bytes_per_second = rate()?,
            "io.write-bps" => self.io.write_bytes_per_second = rate()?,
            "io.read-iops" => self.io.reads_per_second = rate()?,
            "io.write-iops" => self.io.writes_per_second = rate()?,
            "log-rate" => self.log_bytes_per_second = rate()?,
            _ => return Err(Error::invalid("is not known")),
        }
        Ok(())
    }
}

fn at_least_one(value: u64) -> Result<u64> {
    if value == 0 { Err(Error::invalid("must not be zero")) } else { Ok(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_refused() {
        let mut annotations = Annotations::default();
        assert!(annotations.take("sratch", "1GiB").is_err());
        assert!(annotations.take("scratch", "4097KiB1").is_err());
        assert!(annotations.take("scratch", "1MiB").is_err());
        assert!(annotations.take("io.read-bps", "0").is_err());
        annotations.take("scratch", "64MiB").unwrap();
        assert_eq!(annotations.scratch_bytes, Some(64 << 20));
    }
}
