//! The project's own chores. `cargo xtask --help` lists them.
#![forbid(unsafe_code)]

mod bench;
mod guest_image;
mod guest_kernel;
mod tidy;
mod tool;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "the project's own chores")]
struct Args {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Run a benchmark of the folder bench, built for release
    Bench {
        /// Which: a program of bench/src/bin, or a script in bench
        name: String,
        /// What it is given
        #[arg(last = true)]
        args: Vec<OsString>,
    },
    /// Make what a microVM boots: a kernel, and an initramfs with bailey-guest as its init
    GuestImage {
        /// Where to put it [default: $BAILEY_GUEST_DIR, or bailey/guest in the user's cache folder]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Do nothing when there is a guest already, however old
        #[arg(long)]
        if_missing: bool,
    },
    /// Build our own minimal kernel for microVMs from the distribution's sources, and the image with it
    GuestKernel {
        /// Where to put it [default: as for guest-image]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Build it twice, in two folders, and fail unless both came out the same
        #[arg(long)]
        check_reproducible: bool,
    },
    /// Check the rules of this repository that neither the compiler nor clippy knows
    Tidy,
}

fn main() -> anyhow::Result<()> {
    match Args::parse().chore {
        Chore::Bench { name, args } => bench::run(&name, &args),
        Chore::GuestImage { out, if_missing } => guest_image::make(&tool::guest_dir(out)?, if_missing),
        Chore::GuestKernel { out, check_reproducible } => {
            guest_kernel::make(&tool::guest_dir(out)?, check_reproducible)
        }
        Chore::Tidy => tidy::run(tool::repository()),
    }
}
