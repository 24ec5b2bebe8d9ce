//! Tries system calls inside a sandbox, and says of each what came of it: `name: ok` or `name: ERROR`.

mod sys;

use std::io::Write as _;

fn main() -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for (name, attempt) in sys::ATTEMPTS {
        match attempt() {
            Ok(()) => writeln!(out, "{name}: ok")?,
            Err(errno) => writeln!(out, "{name}: {errno:?}")?,
        }
    }
    Ok(())
}
