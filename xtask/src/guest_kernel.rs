//! `cargo xtask guest-kernel`: our own kernel for microVMs, built reproducibly from the distribution's patched
//! sources, the patches in guest/kernel/patches and the fragment in guest/kernel/config.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, anyhow, bail};

use crate::guest_image::packages::{Apt, Package};
use crate::guest_image::{self, KERNEL_JSON, Kernel, Staged, vmlinux};
use crate::tool::{self, command, say, text_of};

/// Raise when the way of building changes, so that kernels built before are built again.
const RECIPE: u32 = 1;
const SOURCE_PACKAGE: &str = "linux-source-";

/// A program or header that the build needs, and the package that brings it.
const NEEDED: [(&str, &str); 11] = [
    ("/usr/bin/make", "make"),
    ("/usr/bin/gcc", "gcc"),
    ("/usr/bin/ld", "binutils"),
    ("/usr/bin/flex", "flex"),
    ("/usr/bin/bison", "bison"),
    ("/usr/bin/bc", "bc"),
    ("/usr/bin/pahole", "pahole"),
    ("/usr/bin/xz", "xz-utils"),
    ("/usr/bin/patch", "patch"),
    ("/usr/bin/perl", "perl"),
    ("/usr/include/gelf.h", "libelf-dev"),
];

/// pahole with threads writes types in the order in which they finish; without, in the order of the source.
const SINGLE_THREADED_PAHOLE: &str = "#!/bin/sh\n\
    for arg; do\n  shift\n  case $arg in -j*) ;; *) set -- \"$@\" \"$arg\" ;; esac\ndone\n\
    exec /usr/bin/pahole \"$@\"\n";

/// A source package, unpacked.
struct Source {
    tarball: PathBuf,
    /// The configuration that we ask for.
    fragment: String,
    /// When the package was made: the only time that the kernel knows.
    epoch: String,
}

/// What a build gives.
struct Built {
    vmlinux: Vec<u8>,
    release: String,
}

/// Builds the kernel, unless it was built from the same things before, and makes the image with it.
pub(crate) fn make(guest_dir: &Path, check_reproducible: bool) -> Result<()> {
    check_needed()?;
    let work = tool::work_dir(guest_dir)?;
    {
        let _lock = tool::lock(&work, "kernel.lock")?;
        let mut apt = Apt::new(&work);
        let package = apt.newest("linux-source", SOURCE_PACKAGE)?;
        let made_from = made_from(&package)?;
        let out = guest_dir.join("bailey");
        let folder = work.join("kernel");
        tool::remove_dir(&folder)?;
        if is_made_from(&out, &made_from) {
            say(format_args!("guest kernel: {} is up to date", out.display()));
        } else {
            let source = unpack(&package, &mut apt, &folder.join("package"))?;
            install(&build(&source, &folder.join("build"))?, &out, &made_from)?;
        }
        if check_reproducible {
            // Deeper in the tree, so that the length of the path differs, too.
            let source = unpack(&package, &mut apt, &folder.join("package"))?;
            let again = build(&source, &folder.join("once/more/build"))?;
            compare(&tool::read(&out.join("vmlinux"))?, &again.vmlinux, &folder)?;
        }
        tool::remove_dir(&folder)?;
    }
    guest_image::make_bailey(guest_dir)
}

fn check_needed() -> Result<()> {
    let missing: Vec<_> = NEEDED.iter().filter(|(file, _)| !Path::new(file).exists()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    bail!("building a kernel: not installed here: {0}; as root: apt-get install {0}", packages.join(" "))
}

/// All that decides what comes out: sources, our files, recipe and tools.
fn made_from(package: &Package) -> Result<String> {
    let mut ours = fragment(package)?.into_bytes();
    for patch in patches()? {
        ours.extend(tool::read(&patch)?);
    }
    let ours = tool::sha256(&ours);
    let mut tools = Vec::new();
    for name in ["gcc", "ld", "pahole"] {
        let version = text_of(command(name).arg("--version"))?;
        tools.push(version.lines().next().unwrap_or_default().to_owned());
    }
    Ok(format!("{}, guest/kernel {ours}, recipe {RECIPE}, {}", package.id(), tools.join(", ")))
}

fn is_made_from(out: &Path, made_from: &str) -> bool {
    let staged = fs::read(out.join(KERNEL_JSON)).ok();
    let staged: Option<Staged> = staged.and_then(|json| serde_json::from_slice(&json).ok());
    out.join("vmlinux").exists() && staged.is_some_and(|staged| staged.made_from == made_from)
}

fn our_files() -> PathBuf {
    tool::repository().join("guest/kernel")
}

/// The fragment for all versions of the kernel with the one for the version of a package.
fn fragment(package: &Package) -> Result<String> {
    let version = package.name.strip_prefix(SOURCE_PACKAGE).unwrap_or_default();
    let common = tool::read(&our_files().join("config"))?;
    let own = tool::read(&our_files().join(format!("config-{version}"))).with_context(|| {
        format!("this Linux ({version}) is new to us; start from the file of the version before")
    })?;
    String::from_utf8([common, own].concat()).context("reading guest/kernel/config")
}

/// Our patches, in the order of their names.
fn patches() -> Result<Vec<PathBuf>> {
    let folder = our_files().join("patches");
    let mut patches = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("listing {}", folder.display()))? {
        let path = entry.with_context(|| format!("listing {}", folder.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "patch") {
            patches.push(path);
        }
    }
    patches.sort_unstable();
    Ok(patches)
}

/// Puts a kernel in its place, with its description.
fn install(built: &Built, out: &Path, made_from: &str) -> Result<()> {
    let kernel = Kernel {
        kernel: built.release.clone(),
        flavour: "bailey".into(),
        format: "elf".into(),
        cmdline: format!("lapic_timer_hz=1000000000 {}", guest_image::QUICK_BOOT),
        acpi: false,
        virtio_mmio_cmdline: true,
        modules: Vec::new(),
    };
    // A description that does not fit the kernel must never be seen: without one there is no guest.
    let description = out.join(KERNEL_JSON);
    if description.exists() {
        fs::remove_file(&description).with_context(|| format!("removing {}", description.display()))?;
    }
    tool::write(&out.join("vmlinux"), &built.vmlinux)?;
    guest_image::describe(out, kernel, &built.vmlinux, made_from)
}

fn compare(one: &[u8], other: &[u8], folder: &Path) -> Result<()> {
    if one == other {
        say(format_args!("guest kernel: two builds in two folders gave the same {} bytes", one.len()));
        return Ok(());
    }
    let (first, second) = (folder.join("vmlinux.1"), folder.join("vmlinux.2"));
    tool::write(&first, one)?;
    tool::write(&second, other)?;
    bail!("building twice: {} and {} differ; diffoscope shows where", first.display(), second.display())
}

fn unpack(package: &Package, apt: &mut Apt, into: &Path) -> Result<Source> {
    apt.unpack(package, into)?;
    let tarball = into.join("usr/src").join(format!("{}.tar.xz", package.name));
    let changelog = into.join("usr/share/doc").join(&package.name).join("changelog.Debian.gz");
    let changelog = text_of(command("gzip").arg("-dc").arg(&changelog)).context("reading the changelog")?;
    // " -- Name <address>  Mon, 16 Nov 2026 11:17:40 +0100", for the newest version first
    let date = changelog.lines().find_map(|line| line.strip_prefix(" -- ")?.split_once(">  "));
    let (_, date) =
        date.ok_or_else(|| anyhow!("reading the changelog of {}: it has no date", package.name))?;
    let epoch = text_of(command("date").args(["--utc", "+%s", "--date", date]))?.trim().to_owned();
    Ok(Source { tarball, fragment: fragment(package)?, epoch })
}

/// Builds in `folder`, from nothing.
fn build(source: &Source, folder: &Path) -> Result<Built> {
    let tree = folder.join("linux");
    fs::create_dir_all(&tree).with_context(|| format!("creating {}", tree.display()))?;
    say(format_args!(
        "guest kernel: building in {}; about a quarter of an hour of two cores",
        tree.display()
    ));
    text_of(command("tar").args(["--strip-components=1", "-xf"]).arg(&source.tarball).arg("-C").arg(&tree))
        .context("unpacking the sources")?;
    for patch in patches()? {
        text_of(command("patch").current_dir(&tree).args(["-p1", "--fuzz=0", "--silent", "-i"]).arg(&patch))
            .with_context(|| format!("applying {}", patch.display()))?;
    }
    let pahole = folder.join("pahole");
    tool::write(&pahole, SINGLE_THREADED_PAHOLE.as_bytes())?;
    fs::set_permissions(&pahole, fs::Permissions::from_mode(0o755)).context("making pahole executable")?;

    let fragment = folder.join("fragment");
    tool::write(&fragment, source.fragment.as_bytes())?;
    let mut configure = make_command(source, folder, &tree)?;
    configure.env("KCONFIG_ALLCONFIG", &fragment).arg("allnoconfig");
    text_of(&mut configure).context("configuring the kernel")?;
    let config = tool::read(&tree.join(".config"))?;
    let unmet = unmet(&source.fragment, &String::from_utf8_lossy(&config));
    if !unmet.is_empty() {
        bail!(
            "configuring the kernel: guest/kernel/config asks for what did not come:\n{}",
            unmet.join("\n")
        );
    }

    make_logged(make_command(source, folder, &tree)?.arg("vmlinux"), &folder.join("log"))?;
    let release = text_of(make_command(source, folder, &tree)?.arg("kernelrelease"))?.trim().to_owned();
    let stripped = folder.join("vmlinux");
    let mut strip = command("objcopy");
    text_of(
        strip.args(["--strip-all", "--remove-section=.comment"]).arg(tree.join("vmlinux")).arg(&stripped),
    )
    .context("stripping the kernel")?;
    if !vmlinux::has_pvh_note(&stripped)? {
        bail!("looking at the kernel: it has no PVH note, so QEMU cannot boot it; is CONFIG_PVH set?");
    }
    Ok(Built { vmlinux: tool::read(&stripped)?, release })
}

/// `make` in a tree, with nothing of this machine, this moment or this folder in its environment.
fn make_command(source: &Source, folder: &Path, tree: &Path) -> Result<Command> {
    let epoch = &source.epoch;
    let date = text_of(command("date").args(["--utc", "--date"]).arg(format!("@{epoch}")))?;
    let prefix_map = format!("-ffile-prefix-map={}=.", tree.display());
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut make = command("nice");
    make.env_clear().current_dir(tree);
    make.envs([("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), ("LC_ALL", "C"), ("TZ", "UTC")]);
    make.env("SOURCE_DATE_EPOCH", epoch).env("KBUILD_BUILD_TIMESTAMP", date.trim());
    make.envs([
        ("KBUILD_BUILD_USER", "bailey"),
        ("KBUILD_BUILD_HOST", "bailey"),
        ("KBUILD_BUILD_VERSION", "1"),
    ]);
    make.env("KCFLAGS", &prefix_map).env("KAFLAGS", &prefix_map);
    make.args(["-n", "19", "make", "--silent", "ARCH=x86_64"]).arg(format!("-j{cores}"));
    make.arg(format!("PAHOLE={}", folder.join("pahole").display()));
    Ok(make)
}

/// Runs make with its output in a file; when it fails, the end of that file says why.
fn make_logged(make: &mut Command, log: &Path) -> Result<()> {
    let file = fs::File::create(log).with_context(|| format!("creating {}", log.display()))?;
    let errors = file.try_clone().with_context(|| format!("writing {}", log.display()))?;
    let status = make.stdout(file).stderr(errors).status().context("starting make")?;
    if status.success() {
        return Ok(());
    }
    let said = tool::read(log)?;
    let said = String::from_utf8_lossy(&said);
    let lines: Vec<&str> = said.lines().collect();
    let end = lines.get(lines.len().saturating_sub(30)..).unwrap_or_default().join("\n");
    bail!("building the kernel: {status}; the end of {}:\n{end}", log.display())
}

/// The lines of a fragment that are not true of a configuration.
fn unmet(fragment: &str, config: &str) -> Vec<String> {
    let settings = |text: &str| -> BTreeMap<String, String> {
        let lines = text.lines().filter(|line| line.starts_with("CONFIG_"));
        let pairs = lines.filter_map(|line| line.split_once('='));
        pairs.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
    };
    let have = settings(config);
    let differs = |(name, wanted): (String, String)| {
        let found = have.get(&name).map_or("n", String::as_str);
        (found != wanted).then(|| format!("{name}={wanted} (it is {found})"))
    };
    settings(fragment).into_iter().filter_map(differs).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unmet_lines_of_a_fragment_are_listed() {
        let fragment = "# why\nCONFIG_A=y\nCONFIG_B=n\nCONFIG_C=\"x\"\nCONFIG_D=n\nCONFIG_E=64\nCONFIG_F=y\n";
        let config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=\"x\"\nCONFIG_D=y\nCONFIG_E=8\n";
        let unmet = unmet(fragment, config);
        assert_eq!(unmet, ["CONFIG_D=n (it is y)", "CONFIG_E=64 (it is 8)", "CONFIG_F=y (it is n)"]);
    }

    #[test]
    fn fragment_names_each_symbol_once() {
        for version in ["6.1", "6.12"] {
            let package = Package { name: format!("{SOURCE_PACKAGE}{version}"), version: String::new() };
            let fragment = fragment(&package).unwrap();
            let mut names: Vec<_> = fragment.lines().filter_map(|line| line.split_once('=')).collect();
            names.retain(|(name, _)| !name.starts_with('#'));
            let all = names.len();
            names.sort_unstable();
            names.dedup_by_key(|(name, _)| *name);
            assert_eq!(names.len(), all);
        }
    }

    #[test]
    fn pahole_loses_its_threads_only() {
        let shown = SINGLE_THREADED_PAHOLE.replace("/usr/bin/pahole", "echo");
        let mut shell = command("sh");
        shell.args(["-c", &shown, "pahole", "-J", "-j", "--btf_gen_floats", "-j4", "a b"]);
        assert_eq!(text_of(&mut shell).unwrap(), "-J --btf_gen_floats a b\n");
    }
}
