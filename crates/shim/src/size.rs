//! Sizes as people write them.

use crate::error::{Error, Result};

/// Reads a size: a number of bytes, or with a unit (`KiB`, `MiB`, `GiB`, `TiB`, or `k`, `m`, `g`, `t`, as docker
/// has them, for the same).
pub(crate) fn parse_size(text: &str) -> Result<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(Error::invalid(format!("{text} is no size, such as 512MiB or 10GiB"))),
    };
    let number: Option<u64> = number.parse().ok();
    number
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| Error::invalid(format!("{text} is no size, such as 512MiB or 10GiB")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("4096").unwrap(), 4096);
        assert_eq!(parse_size("64MiB").unwrap(), 64 << 20);
        assert_eq!(parse_size("2g").unwrap(), 2 << 30);
        for wrong in ["", "MiB", "1.5GiB", "99999999999999TiB", "-1", "1 parsec"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
