//! ARCHITECTURE.md's map of the code: it names what is there, and nothing else.

use std::collections::BTreeSet;

use super::Finding;
use super::tree::{Tree, prose};

const PAGE: &str = "ARCHITECTURE.md";

/// Finds paths on the map that are not there, and crates and folders of sources that are not on the map.
pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let Some(text) = tree.text(PAGE) else {
        return vec![Finding::new(PAGE, 1, "is not there", "write it: the code map of this repository")];
    };
    let mut findings = Vec::new();
    let mut named = BTreeSet::new();
    for (number, line) in prose(text) {
        for path in line.split('`').skip(1).step_by(2).filter(|token| is_plain(token)) {
            let path = path.trim_end_matches('/');
            if path.contains('/') && !tree.exists(path) {
                let what = format!("names {path}, which does not exist");
                findings.push(Finding::new(
                    PAGE,
                    number,
                    what,
                    "correct the path, or remove what is said of it",
                ));
            }
            named.insert(path);
        }
    }
    let packages = tree.packages().map(|(folder, _)| folder);
    for folder in packages.chain(tree.folders().filter(|folder| is_subject(folder))) {
        if !named.contains(folder) {
            let what = format!("does not name {folder}");
            let remedy = "add it to the code map, in backticks: what it owns, what it must never do";
            findings.push(Finding::new(PAGE, 1, what, remedy));
        }
    }
    findings
}

/// Whether what stands in backticks can be a path of the repository: relative, with nothing odd in it. A single word
/// may be anything; with more than one part it is taken for a path.
fn is_plain(token: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    !token.starts_with('/') && token.chars().all(plain)
}

/// Whether a folder is one subject of a crate: `crates/*/src/*`.
fn is_subject(folder: &str) -> bool {
    let parts: Vec<&str> = folder.split('/').collect();
    matches!(parts.as_slice(), ["crates", _, "src", _])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::tree::of;

    fn findings(page: &str) -> Vec<String> {
        let tree = of(&[
            (PAGE, page),
            ("crates/x/Cargo.toml", "[package]\nname = \"x\"\n"),
            ("crates/x/src/a/mod.rs", ""),
            ("crates/x/src/a/deep/mod.rs", ""),
            ("top/Cargo.toml", "[package]\nname = \"top\"\n"),
        ]);
        check(&tree).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_whole_map_is_well() {
        let page = "`crates/x` and `crates/x/src/a/`, `top`; `/dev/kvm`, `a b/c` and `word` are no paths\n```\n`no/path`\n```\n";
        assert_eq!(findings(page), Vec::<String>::new());
    }

    #[test]
    fn a_path_that_is_gone_is_found() {
        let found = findings("`top` `crates/x`\n`crates/x/src/a` `crates/x/src/b.rs`");
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("ARCHITECTURE.md:2: names crates/x/src/b.rs"), "{found:?}");
    }

    #[test]
    fn a_crate_and_a_folder_that_are_not_named_are_found() {
        let found = findings("nothing");
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found.iter().any(|text| text.contains("does not name crates/x/src/a;")), "{found:?}");
    }

    #[test]
    fn a_missing_page_is_found() {
        assert_eq!(check(&of(&[("a.md", "")])).len(), 1);
    }
}
