//! Kernel packages of the distribution: found with apt, fetched and unpacked without installing, and without root.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::tool::{self, command, text_of};

/// How a distribution packs the kernel that suits a virtual machine.
struct Distribution {
    /// `ID` in /etc/os-release.
    id: &'static str,
    /// The package that depends on the newest kernel.
    meta: &'static str,
    /// What the names of the packages with the kernel and its modules begin with.
    prefixes: &'static [&'static str],
}

/// Debian 12 is what this is tested on. Debian 13 differs in compressed modules under /usr; Ubuntu is written down
/// from its package lists (a kernel package that depends on one with the modules) and has not been run.
const DISTRIBUTIONS: [Distribution; 2] = [
    Distribution { id: "debian", meta: "linux-image-cloud-amd64", prefixes: &["linux-image-"] },
    Distribution { id: "ubuntu", meta: "linux-image-virtual", prefixes: &["linux-image-", "linux-modules-"] },
];

/// One package at one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
}

impl Package {
    /// The two joined, in a form that is safe as a file name.
    pub(crate) fn id(&self) -> String {
        format!("{}_{}", self.name, self.version).replace([':', '/'], "-")
    }
}

/// apt, with the system's package lists or, when those are missing or too old to download from, with lists of our own.
pub(crate) struct Apt {
    work: PathBuf,
    own_lists: bool,
}

impl Apt {
    pub(crate) fn new(work: &Path) -> Self {
        Self { work: work.to_path_buf(), own_lists: false }
    }

    fn command(&self, program: &str) -> std::process::Command {
        let mut apt = command(program);
        // Else apt, run by root, warns that its own user may not write to our folder.
        apt.args(["-o", "APT::Sandbox::User=root"]);
        if self.own_lists {
            apt.arg("-o").arg(option("Dir::State::Lists", &self.work.join("apt/lists")));
            apt.arg("-o").arg(option("Dir::Cache", &self.work.join("apt/cache")));
        }
        apt
    }

    /// Does something with apt; if it fails, does it again with fresh lists in our own folder.
    pub(crate) fn with_fresh_lists<T>(&mut self, work: impl Fn(&Self) -> Result<T>) -> Result<T> {
        let first = match work(self) {
            Err(error) if !self.own_lists => error,
            done => return done,
        };
        self.own_lists = true;
        for folder in ["apt/lists/partial", "apt/cache/archives/partial"] {
            let folder = self.work.join(folder);
            fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        }
        tool::say("fetching package lists of our own: the system's do not serve");
        let fresh = text_of(self.command("apt-get").args(["update", "--quiet"])).and_then(|_| work(self));
        fresh.map_err(|second| second.context(format!("with the system's package lists: {first:#}")))
    }

    /// The packages with the newest kernel of this distribution and its modules.
    pub(crate) fn newest_kernel(&mut self) -> Result<Vec<Package>> {
        let distribution = this_distribution()?;
        self.with_fresh_lists(|apt| apt.chain(distribution.meta, distribution.prefixes))
    }

    /// The package that a meta package stands for, e.g. linux-source-6.1 for linux-source.
    pub(crate) fn newest(&mut self, meta: &str, prefix: &str) -> Result<Package> {
        let packages = self.with_fresh_lists(|apt| apt.chain(meta, &[prefix]))?;
        packages.into_iter().next().ok_or_else(|| anyhow!("resolving {meta}: apt names no package"))
    }

    /// Follows dependencies from a meta package: one package for each prefix, each found from the one before.
    fn chain(&self, meta: &str, prefixes: &[&str]) -> Result<Vec<Package>> {
        let mut packages: Vec<Package> = Vec::new();
        for prefix in prefixes {
            let from = packages.last().map_or(meta, |package| package.name.as_str());
            let depends = text_of(self.command("apt-cache").args(["depends", "--important", from]))
                .with_context(|| format!("resolving {from}"))?;
            let name = dependency(&depends, prefix)
                .ok_or_else(|| anyhow!("resolving {from}: it depends on no package {prefix}…"))?;
            packages.push(Package { version: self.version(name)?, name: name.to_owned() });
        }
        Ok(packages)
    }

    /// The version that apt would install.
    fn version(&self, name: &str) -> Result<String> {
        let policy = text_of(self.command("apt-cache").args(["policy", name]))?;
        let candidate = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
        match candidate {
            Some(version) if version != "(none)" => Ok(version.to_owned()),
            _ => bail!("resolving {name}: apt has no version of it; is its source in /etc/apt?"),
        }
    }

    /// Downloads a package, if it was not before, and unpacks it into a folder.
    pub(crate) fn unpack(&mut self, package: &Package, into: &Path) -> Result<()> {
        let deb = self.download(package)?;
        fs::create_dir_all(into).with_context(|| format!("creating {}", into.display()))?;
        text_of(command("dpkg-deb").arg("-x").arg(&deb).arg(into))
            .with_context(|| format!("unpacking {}", deb.display()))?;
        Ok(())
    }

    /// Downloads a package, if it was not before. apt checks it against the signed package lists.
    fn download(&mut self, package: &Package) -> Result<PathBuf> {
        let folder = self.work.join("packages");
        let deb = folder.join(format!("{}.deb", package.id()));
        if deb.exists() {
            return Ok(deb);
        }
        forget_older(&folder, package)?;
        let partial = folder.join("partial");
        fs::create_dir_all(&partial).with_context(|| format!("creating {}", partial.display()))?;
        tool::say(format_args!("downloading {} {}", package.name, package.version));
        self.with_fresh_lists(|apt| {
            let wanted = format!("{}={}", package.name, package.version);
            let mut download = apt.command("apt-get");
            text_of(download.current_dir(&partial).args(["download", "--quiet", &wanted]))
        })
        .with_context(|| format!("downloading {}", package.name))?;
        let mut files = fs::read_dir(&partial).with_context(|| format!("listing {}", partial.display()))?;
        let file = files.next().ok_or_else(|| anyhow!("downloading {}: apt left no file", package.name))?;
        let file = file.with_context(|| format!("listing {}", partial.display()))?.path();
        fs::rename(&file, &deb).with_context(|| format!("moving {} into place", deb.display()))?;
        tool::remove_dir(&partial)?;
        Ok(deb)
    }
}

/// Removes what was downloaded before of the same kind (linux-image-…, linux-source-…), and what was half downloaded.
fn forget_older(folder: &Path, package: &Package) -> Result<()> {
    let kind = package.name.split(|c: char| c.is_ascii_digit()).next().unwrap_or(&package.name);
    tool::remove_dir(&folder.join("partial"))?;
    let Ok(entries) = fs::read_dir(folder) else { return Ok(()) };
    for entry in entries {
        let path = entry.with_context(|| format!("listing {}", folder.display()))?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(kind)) {
            fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

fn option(name: &str, folder: &Path) -> std::ffi::OsString {
    let mut option = std::ffi::OsString::from(name);
    option.push("=");
    option.push(folder);
    option
}

/// The first dependency in apt-cache's answer whose name begins so.
fn dependency<'a>(depends: &'a str, prefix: &str) -> Option<&'a str> {
    let names =
        depends.lines().filter_map(|line| line.trim_start_matches([' ', '|']).strip_prefix("Depends: "));
    names.map(str::trim).find(|name| name.starts_with(prefix))
}

/// The row of the table for this machine; a distribution made from Debian counts as its parent.
fn this_distribution() -> Result<&'static Distribution> {
    let release = tool::read(Path::new("/etc/os-release"))?;
    let release = String::from_utf8_lossy(&release);
    let value = |key| {
        let line = release.lines().find_map(|line: &str| line.strip_prefix(key));
        line.unwrap_or_default().trim_matches('"').to_owned()
    };
    let ids = format!("{} {}", value("ID="), value("ID_LIKE="));
    let known = ids.split_whitespace().find_map(|id| DISTRIBUTIONS.iter().find(|known| known.id == id));
    known.ok_or_else(|| anyhow!("choosing a kernel package: this is neither Debian nor Ubuntu (ids: {ids})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependency_is_found_among_others() {
        let depends =
            "linux-image-virtual\n  Depends: wireless-regdb\n |Depends: linux-image-6.8.0-1-generic\n";
        assert_eq!(dependency(depends, "linux-image-"), Some("linux-image-6.8.0-1-generic"));
        assert_eq!(dependency(depends, "linux-modules-"), None);
    }

    #[test]
    fn older_downloads_of_the_same_kind_go() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["linux-image-6.1.0-1_1.deb", "linux-source-6.1_1.deb"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let package = Package { name: "linux-image-6.1.0-2".into(), version: "2".into() };
        forget_older(folder.path(), &package).unwrap();
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["linux-source-6.1_1.deb"]);
    }

    #[test]
    fn package_id_is_a_file_name() {
        let package = Package { name: "linux-image".into(), version: "1:6.1/2".into() };
        assert_eq!(package.id(), "linux-image_1-6.1-2");
    }
}
