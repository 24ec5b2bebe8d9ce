//! Randomness, handed in from above; and ids and secrets made of it.

use std::io;

use data_encoding::{Encoding, Specification};

/// Gives bytes that nobody can guess.
pub trait Entropy: Send + Sync {
    /// # Errors
    /// When the system has none to give.
    fn fill(&self, bytes: &mut [u8]) -> io::Result<()>;
}

/// The system's randomness.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemEntropy;

impl Entropy for SystemEntropy {
    fn fill(&self, bytes: &mut [u8]) -> io::Result<()> {
        getrandom::fill(bytes).map_err(io::Error::other)
    }
}

/// RFC 4648's base 32, in lower case and without padding: what ids and secrets are written in.
pub(crate) fn base32() -> Encoding {
    static ENCODING: std::sync::LazyLock<Encoding> = std::sync::LazyLock::new(|| {
        let mut specification = Specification::new();
        specification.symbols.push_str("abcdefghijklmnopqrstuvwxyz234567");
        specification.encoding().unwrap_or(data_encoding::BASE32_NOPAD)
    });
    ENCODING.clone()
}

/// Random characters of [`base32`].
pub(crate) fn characters(entropy: &dyn Entropy, count: usize) -> io::Result<String> {
    // Five bytes are eight characters.
    let mut bytes = vec![0; count.div_ceil(8) * 5];
    entropy.fill(&mut bytes)?;
    let mut text = base32().encode(&bytes);
    text.truncate(count);
    Ok(text)
}
