//! Device-mapper's control device: makes one mapped device of one target.
//!
//! The structures are those of the kernel's `include/uapi/linux/dm-ioctl.h`, version 4.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::path::PathBuf;

use crate::error::{Context, Error, Result};
use crate::sys;

const HEADER: usize = 312;
const NAME_AT: usize = 48;
const NAME_MAX: usize = 127;
const SPEC: usize = 40;

const READONLY: u32 = 1 << 0;
/// The kernel wipes the ioctl's buffer after use: it holds a key.
const SECURE_DATA: u32 = 1 << 15;

const DEV_CREATE: u32 = 0xc138_fd03;
const DEV_REMOVE: u32 = 0xc138_fd04;
const DEV_SUSPEND: u32 = 0xc138_fd06;
const TABLE_LOAD: u32 = 0xc138_fd09;
const TABLE_CLEAR: u32 = 0xc138_fd0a;

/// One target that fills a whole mapped device.
pub(super) struct Target {
    pub kind: &'static str,
    pub sectors: u64,
    pub parameters: String,
}

/// A mapped device.
pub(super) struct Device {
    name: &'static str,
    /// Its node.
    pub(super) path: PathBuf,
}

pub(super) struct Control(File);

impl Control {
    /// Opens device-mapper's control device.
    pub(super) fn open() -> Result<Control> {
        let path = "/dev/mapper/control";
        let file = OpenOptions::new().read(true).write(true).open(path);
        file.map(Control).context(|| format!("opening {path}"))
    }

    /// Makes the mapped device `name`, of which nothing can be read or written yet.
    pub(crate) fn create(&self, name: &'static str) -> Result<Device> {
        let answer = self.call(DEV_CREATE, "creating", name, 0, None)?;
        let path = PathBuf::from(format!("/dev/dm-{}", device_minor(&answer)));
        Ok(Device { name, path })
    }

    /// Makes the device what `target` says.
    pub(crate) fn start(&self, device: &Device, target: &Target, readonly: bool) -> Result<()> {
        let flags = if readonly { READONLY } else { 0 };
        self.call(TABLE_LOAD, "loading the table of", device.name, flags | SECURE_DATA, Some(target))?;
        // Resuming (suspending, with the flag off) is what makes the loaded table live.
        self.call(DEV_SUSPEND, "starting", device.name, flags, None).map(drop)
    }

    /// Loads a table and throws it away, so that whatever the kernel sets up for the first of its kind is there.
    pub(crate) fn rehearse(&self, device: &Device, target: &Target, readonly: bool) -> Result<()> {
        let flags = if readonly { READONLY } else { 0 };
        self.call(TABLE_LOAD, "rehearsing the table of", device.name, flags | SECURE_DATA, Some(target))?;
        self.call(TABLE_CLEAR, "clearing the table of", device.name, 0, None).map(drop)
    }

    /// Removes a device that nobody has open, with all that was kept of what it showed.
    pub(crate) fn remove(&self, device: &Device) -> Result<()> {
        self.call(DEV_REMOVE, "removing", device.name, 0, None).map(drop)
    }

    fn call(
        &self,
        request: u32,
        doing: &str,
        name: &str,
        flags: u32,
        target: Option<&Target>,
    ) -> Result<Vec<u8>> {
        let mut buffer = request_buffer(name, flags, target).ok_or_else(|| {
            Error::invalid(format!("{doing} the mapped device {name}"), "the name is too long")
        })?;
        sys::dm_ioctl(self.0.as_fd(), request, &mut buffer)
            .context(|| format!("{doing} the mapped device {name}"))?;
        Ok(buffer)
    }
}

fn request_buffer(name: &str, flags: u32, target: Option<&Target>) -> Option<Vec<u8>> {
    if name.len() > NAME_MAX {
        return None;
    }
    let mut buffer = vec![0; HEADER];
    let put = |buffer: &mut Vec<u8>, at: usize, value: u32| {
        buffer[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    };
    put(&mut buffer, 0, 4);
    put(&mut buffer, 16, u32::try_from(HEADER).ok()?);
    put(&mut buffer, 20, u32::from(target.is_some()));
    put(&mut buffer, 28, flags);
    buffer[NAME_AT..NAME_AT + name.len()].copy_from_slice(name.as_bytes());
    if let Some(target) = target {
        let mut spec = vec![0; SPEC];
        spec[8..16].copy_from_slice(&target.sectors.to_ne_bytes());
        spec[24..24 + target.kind.len()].copy_from_slice(target.kind.as_bytes());
        buffer.extend_from_slice(&spec);
        buffer.extend_from_slice(target.parameters.as_bytes());
        buffer.push(0);
        while !buffer.len().is_multiple_of(8) {
            buffer.push(0);
        }
    }
    let length = u32::try_from(buffer.len()).ok()?;
    put(&mut buffer, 12, length);
    Some(buffer)
}

/// The minor number of the device that the kernel answered with (its `dev` field, as `huge_encode_dev` packs it).
fn device_minor(answer: &[u8]) -> u64 {
    let dev = u64::from_ne_bytes(answer[40..48].try_into().unwrap_or_default());
    (dev & 0xff) | ((dev >> 12) & 0xfff_ff00)
}
