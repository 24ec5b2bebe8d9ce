//! The little of the ELF format that says which loader a program wants.
//!
//! Reads programs that the operator installed; takes nothing from guests. Must never run the program.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MAGIC: &[u8] = b"\x7fELF";
const HEADER: usize = 64;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
/// No loader's path is longer than a path may be.
const LONGEST_PATH: u64 = 4096;

/// What an ELF file needs to be loaded.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    /// The loader that it names.
    pub(super) interpreter: Option<PathBuf>,
    /// Whether it is linked dynamically: a program or a shared object.
    pub(super) dynamic: bool,
}

/// The loader that the program names; none for a static one.
///
/// # Errors
/// The kernel's, or `InvalidData` for a file that is not a 64-bit little-endian ELF file.
pub(in crate::jail) fn interpreter(program: &Path) -> io::Result<Option<PathBuf>> {
    let needs = needs(&File::open(program)?)?;
    needs.map(|needs| needs.interpreter).ok_or_else(|| invalid("not an ELF program"))
}

/// Reads the program headers. `None`: not an ELF file.
pub(super) fn needs(file: &File) -> io::Result<Option<Needs>> {
    let mut header = Vec::with_capacity(HEADER);
    file.take(HEADER as u64).read_to_end(&mut header)?;
    if !header.starts_with(MAGIC) {
        return Ok(None);
    }
    if header.len() < HEADER || header[4] != CLASS_64 || header[5] != LITTLE_ENDIAN {
        return Err(invalid("not a 64-bit little-endian ELF file"));
    }
    let table = u64_at(&header, 32)?;
    let (size, count) = (u64::from(u16_at(&header, 54)?), u64::from(u16_at(&header, 56)?));
    let mut needs = Needs::default();
    for index in 0..count {
        let mut entry = [0_u8; 56];
        let place =
            table.checked_add(index * size).ok_or_else(|| invalid("a program header out of range"))?;
        file.read_exact_at(&mut entry, place)?;
        match u32_at(&entry, 0)? {
            PT_DYNAMIC => needs.dynamic = true,
            PT_INTERP => {
                let (offset, length) = (u64_at(&entry, 8)?, u64_at(&entry, 32)?.min(LONGEST_PATH));
                let mut path = vec![0; usize::try_from(length).unwrap_or(0)];
                file.read_exact_at(&mut path, offset)?;
                path.truncate(path.iter().position(|byte| *byte == 0).unwrap_or(path.len()));
                needs.interpreter = Some(PathBuf::from(std::ffi::OsString::from_vec(path)));
            }
            _ => {}
        }
    }
    Ok(Some(needs))
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why)
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> io::Result<[u8; N]> {
    let slice = from.get(at..at + N).ok_or_else(|| invalid("a truncated ELF header"))?;
    slice.try_into().map_err(io::Error::other)
}

fn u16_at(from: &[u8], at: usize) -> io::Result<u16> {
    Ok(u16::from_le_bytes(bytes(from, at)?))
}

fn u32_at(from: &[u8], at: usize) -> io::Result<u32> {
    Ok(u32::from_le_bytes(bytes(from, at)?))
}

fn u64_at(from: &[u8], at: usize) -> io::Result<u64> {
    Ok(u64::from_le_bytes(bytes(from, at)?))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::needs;

    #[test]
    fn reads_its_own_program() {
        let needs = needs(&File::open("/proc/self/exe").unwrap()).unwrap().unwrap();
        assert!(needs.dynamic);
        assert!(needs.interpreter.unwrap().starts_with("/lib64"));
    }

    #[test]
    fn tells_other_files_and_broken_headers() {
        let check = |bytes: &[u8]| {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(bytes).unwrap();
            needs(&file.reopen().unwrap())
        };
        assert_eq!(check(b"#!/bin/sh\n").unwrap(), None);
        assert_eq!(check(b"").unwrap(), None);
        check(b"\x7fELF").unwrap_err();
        let mut header = [0xff_u8; 64];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        check(&header).unwrap_err();
    }
}
