//! Taking the uncompressed kernel out of a bzImage: QEMU and Firecracker boot it directly, which spares the guest
//! the decompression.

use anyhow::{Context as _, Result, anyhow, bail};

use crate::tool::{command, filter, text_of};

/// Offsets in the setup header of a bzImage (the x86 boot protocol, in the kernel's documentation).
const SETUP_SECTORS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const PROTOCOL: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// The first version of the protocol that tells where the payload is.
const PROTOCOL_WITH_PAYLOAD: u64 = 0x0208;

/// How a payload begins, and what unpacks it.
const COMPRESSIONS: [(&[u8], &str, &[&str]); 5] = [
    (b"\x02\x21\x4c\x18", "lz4", &["-dc"]),
    (b"\x28\xb5\x2f\xfd", "zstd", &["-dc", "--quiet"]),
    (b"\xfd7zXZ\x00", "xz", &["-dc", "--single-stream"]),
    (b"\x1f\x8b", "gzip", &["-dc"]),
    (b"BZh", "bzip2", &["-dc"]),
];

/// The ELF file inside a bzImage.
pub(crate) fn extract(image: &[u8]) -> Result<Vec<u8>> {
    if image.get(MAGIC..MAGIC + 4) != Some(b"HdrS") || number(image, PROTOCOL, 2)? < PROTOCOL_WITH_PAYLOAD {
        bail!("looking for a kernel: this is no bzImage");
    }
    let sectors = match number(image, SETUP_SECTORS, 1)? {
        0 => 4, // what zero means for old loaders
        sectors => sectors,
    };
    let start = usize::try_from((sectors + 1) * 512 + number(image, PAYLOAD_OFFSET, 4)?)?;
    let length = usize::try_from(number(image, PAYLOAD_LENGTH, 4)?)?;
    let payload = start
        .checked_add(length)
        .and_then(|end| image.get(start..end))
        .ok_or_else(|| anyhow!("looking for a kernel: the bzImage ends before its payload does"))?;
    let (_, program, args) =
        COMPRESSIONS.iter().find(|(magic, _, _)| payload.starts_with(magic)).ok_or_else(|| {
            anyhow!("looking for a kernel: its payload is compressed in a way that is not known")
        })?;
    // The last four bytes are the size; gzip counts them as its own, the other formats do not know them.
    let known = if *program == "gzip" { payload.len() } else { payload.len().saturating_sub(4) };
    let size = number(payload, payload.len().saturating_sub(4), 4)?;
    let elf = filter(command(program).args(*args), payload.get(..known).unwrap_or_default().to_vec())
        .context("unpacking a kernel")?;
    if elf.len() as u64 != size || !elf.starts_with(b"\x7fELF") {
        bail!(
            "unpacking a kernel: {} bytes came out of {program} where an ELF file of {size} should",
            elf.len()
        );
    }
    Ok(elf)
}

/// Whether a kernel has the note that lets QEMU start it without firmware's help (PVH).
pub(crate) fn has_pvh_note(elf: &std::path::Path) -> Result<bool> {
    let notes = text_of(command("readelf").arg("--notes").arg("--wide").arg(elf))?;
    // A kernel has many Xen notes; only type 18 (XEN_ELFNOTE_PHYS32_ENTRY) is the entry point.
    Ok(notes.lines().any(|line| line.trim_start().starts_with("Xen") && line.contains("0x00000012")))
}

/// A little-endian number.
fn number(bytes: &[u8], at: usize, length: usize) -> Result<u64> {
    let field = at.checked_add(length).and_then(|end| bytes.get(at..end));
    let field = field.ok_or_else(|| anyhow!("looking for a kernel: the file is too short"))?;
    Ok(field.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024 + 16];
        image[SETUP_SECTORS] = 1;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[PROTOCOL..PROTOCOL + 2].copy_from_slice(&[0x0f, 0x02]);
        image[PAYLOAD_OFFSET] = 16;
        image[PAYLOAD_LENGTH] = u8::try_from(payload.len()).unwrap();
        image.extend_from_slice(payload);
        image.extend_from_slice(b"what follows");
        image
    }

    #[test]
    fn kernel_comes_out_of_image() {
        let elf = b"\x7fELF and so on".to_vec();
        for (program, args) in [("xz", vec!["-c"]), ("zstd", vec!["-c"]), ("lz4", vec!["-lc"])] {
            let mut payload = filter(command(program).args(args), elf.clone()).unwrap();
            payload.extend_from_slice(&[u8::try_from(elf.len()).unwrap(), 0, 0, 0]);
            assert_eq!(extract(&image(&payload)).unwrap(), elf, "{program}");
        }
    }

    #[test]
    fn other_files_are_refused() {
        for bad in [b"".to_vec(), vec![0; 4096], image(b"not compressed")] {
            assert!(extract(&bad).is_err());
        }
        let mut cut = image(b"\x28\xb5\x2f\xfd");
        cut.truncate(1030);
        assert!(extract(&cut).unwrap_err().to_string().contains("ends before"));
    }
}
