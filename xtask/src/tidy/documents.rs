//! Pages: the changelog, the links between pages, and that every page can be found.

use std::collections::BTreeSet;

use super::Finding;
use super::tree::{Tree, numbered, prose};

const CHANGELOG: &str = "CHANGELOG.md";

/// Pages that lead to all others.
const INDEXES: [&str; 2] = ["README.md", "docs/README.md"];

/// Finds a changelog without what has changed since the last release.
pub(super) fn changelog(tree: &Tree) -> Vec<Finding> {
    let Some(text) = tree.text(CHANGELOG) else {
        return vec![Finding::new(CHANGELOG, 1, "is not there", "write it, as keepachangelog.com has it")];
    };
    let mut lines = numbered(text).skip_while(|(_, line)| !is_unreleased(line));
    let Some((number, _)) = lines.next() else {
        return vec![Finding::new(
            CHANGELOG,
            1,
            "has no Unreleased heading",
            "add ## [Unreleased] at the top",
        )];
    };
    let mut section = lines.take_while(|(_, line)| !line.starts_with("## "));
    if section.any(|(_, line)| line.starts_with("- ")) {
        return Vec::new();
    }
    let remedy = "say who is affected by what has changed, and what they must do";
    vec![Finding::new(CHANGELOG, number, "has no entry under Unreleased", remedy)]
}

fn is_unreleased(line: &str) -> bool {
    line.strip_prefix("## ").is_some_and(|title| title.trim_matches(['[', ']', ' ']) == "Unreleased")
}

/// Finds relative links that lead nowhere.
pub(super) fn links(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree.files_with(".md") {
        for (number, target) in targets(path, text) {
            if target.as_deref().is_none_or(|target| !target.is_empty() && !tree.exists(target)) {
                let shown = target.unwrap_or_else(|| "a place outside of the repository".to_owned());
                let what = format!("links to {shown}, which is not there");
                findings.push(Finding::new(path, number, what, "correct the link"));
            }
        }
    }
    findings
}

/// Finds pages of docs that no index leads to.
pub(super) fn index(tree: &Tree) -> Vec<Finding> {
    let indexes = INDEXES.iter().filter_map(|path| Some((*path, tree.text(path)?)));
    let linked: BTreeSet<String> =
        indexes.flat_map(|(path, text)| targets(path, text)).filter_map(|(_, target)| target).collect();
    let pages = tree.files_with(".md").map(|(path, _)| path);
    pages
        .filter(|path| path.starts_with("docs/") && !INDEXES.contains(path) && !linked.contains(*path))
        .map(|path| {
            let what = format!("no link leads to it from {}", INDEXES.join(" or "));
            Finding::new(path, 1, what, "add one, or remove the page")
        })
        .collect()
}

/// Where the relative links of a page lead, from the repository's root; none for one that leads out of it.
fn targets(page: &str, text: &str) -> Vec<(usize, Option<String>)> {
    let mut found = Vec::new();
    for (number, line) in prose(text) {
        for part in line.split("](").skip(1) {
            let link = part.split([')', ' ', '#']).next().unwrap_or_default();
            if link.is_empty() || link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            found.push((number, resolve(page, link)));
        }
    }
    found
}

fn resolve(page: &str, link: &str) -> Option<String> {
    let mut parts: Vec<&str> = page.split('/').collect();
    parts.pop();
    if link.starts_with('/') {
        return None;
    }
    for part in link.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            name => parts.push(name),
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::tree::of;

    fn changelog_of(text: &str) -> Vec<String> {
        changelog(&of(&[(CHANGELOG, text)])).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_changelog_without_news_is_found() {
        assert!(changelog_of("# C\n\n## [Unreleased]\n\n### Added\n- x\n\n## [1.0.0]\n").is_empty());
        assert!(changelog_of("## Unreleased\n- x\n").is_empty());
        let found = changelog_of("# C\n\n## [Unreleased]\n\n## [1.0.0]\n- x\n");
        assert!(found[0].starts_with("CHANGELOG.md:3: has no entry"), "{found:?}");
        assert!(changelog_of("## [1.0.0]\n- x\n")[0].contains("no Unreleased heading"));
        assert_eq!(changelog(&of(&[("a.md", "")])).len(), 1);
    }

    #[test]
    fn a_link_that_leads_nowhere_is_found() {
        let page = "[a](b.md) [c](../d.md#e)\n[f](gone.md)\n[g](https://h/i.md) [j](#k)\n```\n[l](m)\n```\n[n](../../o)";
        let found = links(&of(&[("docs/a.md", page), ("docs/b.md", ""), ("d.md", "")]));
        let found: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].starts_with("docs/a.md:2: links to docs/gone.md"), "{found:?}");
        assert!(found[1].starts_with("docs/a.md:7: "), "{found:?}");
    }

    #[test]
    fn a_page_that_nothing_leads_to_is_found() {
        let tree = of(&[
            ("README.md", "[a](docs/a.md)"),
            ("docs/README.md", "[b](decisions/b.md)"),
            ("docs/a.md", ""),
            ("docs/decisions/b.md", ""),
            ("docs/c.md", ""),
        ]);
        let found: Vec<String> = index(&tree).iter().map(ToString::to_string).collect();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("docs/c.md:1: no link"), "{found:?}");
    }
}
