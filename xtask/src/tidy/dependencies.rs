//! Which crate may depend on which: walls that the compiler holds once Cargo.toml keeps to them.

use std::collections::BTreeSet;

use super::Finding;
use super::tree::{Tree, numbered};

/// What a package must not depend on, and why.
struct Rule {
    package: &'static str,
    never: &'static [&'static str],
    why: &'static str,
}

const RULES: [Rule; 2] = [
    Rule {
        package: "bailey-types",
        never: &["tokio", "nix", "libc"],
        why: "bailey-types is pure values, so that every parser in it can be fuzzed alone",
    },
    Rule {
        package: "bailey-guest",
        never: &["tokio", "bailey-host"],
        why: "bailey-guest is pid 1 in every VM: one thread, little memory, none of the host's code",
    },
];

/// Programs: they are started, not linked.
const PROGRAMS: [&str; 2] = ["bailey-shim", "bailey-guest"];

/// Finds dependencies that the rules forbid.
pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (folder, manifest) in tree.packages() {
        let file = format!("{folder}/Cargo.toml");
        let package = name(manifest);
        for (line, dependency) in dependencies(manifest) {
            if PROGRAMS.contains(&dependency) {
                let what = format!("{package} depends on {dependency}, which is a program");
                findings.push(Finding::new(
                    &file,
                    line,
                    what,
                    "start it as a process, or move what is shared to a library",
                ));
            }
            for rule in
                RULES.iter().filter(|rule| rule.package == package && rule.never.contains(&dependency))
            {
                let what = format!("{package} depends on {dependency}");
                let remedy = format!("remove it, or move the code that needs it: {}", rule.why);
                findings.push(Finding::new(&file, line, what, remedy));
            }
        }
    }
    findings
}

/// The versions of our programs, and those that the fuzzed parsers are built with.
const LOCK: &str = "Cargo.lock";
const FUZZ_LOCK: &str = "fuzz/Cargo.lock";

/// Finds crates that fuzzing takes in another version than the programs do: then it would test other code.
pub(super) fn locks(tree: &Tree) -> Vec<Finding> {
    let ours: BTreeSet<_> = locked(tree.text(LOCK).unwrap_or_default()).map(|(_, locked)| locked).collect();
    let shared = |name: &str| ours.iter().any(|(ours, _)| *ours == name);
    locked(tree.text(FUZZ_LOCK).unwrap_or_default())
        .filter(|(_, locked)| shared(locked.0) && !ours.contains(locked))
        .map(|(line, (name, version))| {
            let what = format!("has {name} {version}, which {LOCK} has not");
            let remedy = "cargo update --manifest-path fuzz/Cargo.toml --precise VERSION CRATE";
            Finding::new(FUZZ_LOCK, line, what, remedy)
        })
        .collect()
}

/// The crates of a lock file, with their versions.
fn locked(text: &str) -> impl Iterator<Item = (usize, (&str, &str))> {
    let lines = numbered(text).zip(text.lines().skip(1));
    lines.filter_map(|((number, name), version)| {
        Some((number, (quoted(name, "name")?, quoted(version, "version")?)))
    })
}

fn quoted<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.strip_prefix(key)?.strip_prefix(" = \"")?.strip_suffix('"')
}

/// The package's name.
fn name(manifest: &str) -> &str {
    let value = manifest.lines().find_map(|line| line.strip_prefix("name")?.trim_start().strip_prefix('='));
    value.unwrap_or_default().trim().trim_matches('"')
}

/// The names of all dependencies: for building, for tests, for one target or all.
fn dependencies(manifest: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let mut inside = false;
    for (number, line) in numbered(manifest) {
        let line = line.split('#').next().unwrap_or_default().trim();
        if let Some(section) = line.strip_prefix('[') {
            let section = section.trim_end_matches(']');
            inside = section.ends_with("dependencies");
            // [dependencies.name]
            if let Some((before, named)) = section.rsplit_once('.')
                && before.ends_with("dependencies")
            {
                found.push((number, named.trim_matches('"')));
            }
        } else if let Some((key, value)) = line.split_once('=').filter(|_| inside) {
            let key = key.split('.').next().unwrap_or_default();
            found.push((number, key.trim().trim_matches('"')));
            found.extend(renamed(value).map(|name| (number, name)));
        }
    }
    found
}

/// The true name of a dependency that has another one here.
fn renamed(value: &str) -> Option<&str> {
    let (_, after) = value.split_once("package")?;
    after.trim_start().strip_prefix('=')?.split('"').nth(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::tree::of;

    fn findings(package: &str, dependencies: &str) -> Vec<String> {
        let manifest = format!("[package]\nname = \"{package}\"\n\n{dependencies}");
        check(&of(&[("crates/x/Cargo.toml", &manifest)])).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn types_must_stay_pure() {
        for section in ["dependencies", "dev-dependencies", "target.'cfg(unix)'.dependencies"] {
            let found =
                findings("bailey-types", &format!("[{section}]\nserde = \"1\"\nlibc.workspace = true\n"));
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].starts_with("crates/x/Cargo.toml:6: bailey-types depends on libc"), "{found:?}");
        }
        assert_eq!(findings("bailey-types", "[dependencies.tokio]\nworkspace = true\n").len(), 1);
        assert_eq!(
            findings("bailey-types", "[dependencies]\nsys = { package = \"nix\", version = \"1\" }\n").len(),
            1
        );
    }

    #[test]
    fn the_guest_has_no_runtime_and_nothing_of_the_host() {
        let found =
            findings("bailey-guest", "[dependencies]\ntokio = \"1\"\nbailey-host = \"1\"\nlibc = \"0\"\n");
        assert_eq!(found.len(), 2, "{found:?}");
    }

    #[test]
    fn nobody_links_a_program() {
        let found = findings("bailey-e2e", "[dependencies]\nbailey-shim.workspace = true\n");
        assert!(found[0].contains("which is a program"), "{found:?}");
    }

    #[test]
    fn fuzzing_takes_the_versions_of_the_programs() {
        let lock = |name: &str, version: &str| {
            format!("[[package]]\nname = \"{name}\"\nversion = \"{version}\"\nsource = \"x\"\n")
        };
        let ours = lock("a", "1.0.0") + &lock("a", "2.0.0") + &lock("b", "1.0.0");
        let fuzz = lock("a", "2.0.0") + &lock("b", "1.0.1") + &lock("only-here", "3.0.0");
        let found = locks(&of(&[(LOCK, &ours), (FUZZ_LOCK, &fuzz)]));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].to_string().starts_with("fuzz/Cargo.lock:6: has b 1.0.1"), "{found:?}");
    }

    #[test]
    fn what_is_allowed_is_not_found() {
        assert!(findings("bailey-host", "[dependencies]\nlibc.workspace = true # not tokio\n").is_empty());
        assert!(
            findings("bailey-shim", "[features]\ntokio = []\n[dependencies]\ntokio = \"1\"\n").is_empty()
        );
    }
}
