//! `cargo xtask tidy`: the rules of this repository that neither the compiler nor clippy knows.
//!
//! Each check is a function from a [`Tree`] to [`Finding`]s, and has tests that show it a violation. A rule that is
//! worth writing down in ARCHITECTURE.md is worth a check here.

mod code_map;
mod dependencies;
mod documents;
mod sources;
mod tree;

use std::fmt::{self, Display};
use std::path::Path;

use anyhow::{Result, bail};

use crate::tool::say;
use tree::Tree;

/// One violation: where, what, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Finding {
    file: String,
    line: usize,
    what: String,
    remedy: String,
}

impl Finding {
    fn new(file: &str, line: usize, what: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding { file: file.to_owned(), line, what: what.into(), remedy: remedy.into() }
    }
}

impl Display for Finding {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}:{}: {}; {}", self.file, self.line, self.what, self.remedy)
    }
}

type Check = fn(&Tree) -> Vec<Finding>;

const CHECKS: [Check; 10] = [
    dependencies::check,
    dependencies::locks,
    sources::lengths,
    sources::unsafe_code,
    sources::crate_roots,
    sources::leftovers,
    code_map::check,
    documents::changelog,
    documents::links,
    documents::index,
];

/// Runs every check over the repository, prints what they found, and fails if that is anything.
pub(crate) fn run(root: &Path) -> Result<()> {
    let tree = Tree::read(root)?;
    let mut findings: Vec<Finding> = CHECKS.iter().flat_map(|check| check(&tree)).collect();
    findings.sort();
    findings.dedup();
    for finding in &findings {
        say(finding);
    }
    match findings.len() {
        0 => {
            say(format_args!("tidy: {} checks, {} files, nothing found", CHECKS.len(), tree.files().count()));
            Ok(())
        }
        count => bail!("tidy: violations of the repository's rules: {count}; they are listed above"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_says_where_what_and_the_remedy() {
        let finding = Finding::new("a/b.rs", 7, "is wrong", "make it right");
        assert_eq!(finding.to_string(), "a/b.rs:7: is wrong; make it right");
    }

    #[test]
    fn a_violation_fails_the_whole() {
        let folder = tempfile::tempdir().unwrap();
        let error = run(folder.path()).unwrap_err();
        assert!(error.to_string().contains("violations"), "{error}");
    }
}
