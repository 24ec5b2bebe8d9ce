//! The files that the checks look at, read once.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

/// Folders that hold what was built.
const BUILT: [&str; 1] = ["target"];

/// Folders whose files are scripts, whatever their names end with.
const SCRIPTS: [&str; 2] = ["scripts/", "bench/"];

/// Kinds of files that are read; of all others only the names are known.
const READ: [&str; 5] = [".rs", ".toml", ".md", ".sh", ".lock"];

/// The repository: paths relative to its root, with `/` between their parts.
#[derive(Debug, Default)]
pub(super) struct Tree {
    /// The text of the files that are read.
    texts: BTreeMap<String, String>,
    /// Every file and folder.
    paths: BTreeSet<String>,
    folders: BTreeSet<String>,
}

impl Tree {
    /// Reads a folder, without what is hidden or was built.
    pub(super) fn read(root: &Path) -> Result<Tree> {
        let mut tree = Tree::default();
        tree.add(root, "")?;
        Ok(tree)
    }

    fn add(&mut self, folder: &Path, prefix: &str) -> Result<()> {
        let listing = || format!("listing {}", folder.display());
        for entry in fs::read_dir(folder).with_context(listing)? {
            let entry = entry.with_context(listing)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with('.') || BUILT.contains(&name.as_str()) {
                continue;
            }
            let path = format!("{prefix}{name}");
            // A link is a name and no more: what it leads to is looked at where it is.
            let kind = entry.file_type().with_context(listing)?;
            if kind.is_dir() {
                self.folders.insert(path.clone());
                self.add(&entry.path(), &format!("{path}/"))?;
            } else if kind.is_file() && is_read(&path) {
                let text = fs::read(entry.path()).with_context(|| format!("reading {path}"))?;
                self.texts.insert(path.clone(), String::from_utf8_lossy(&text).into_owned());
            }
            self.paths.insert(path);
        }
        Ok(())
    }

    /// The files that were read, with their texts.
    pub(super) fn files(&self) -> impl Iterator<Item = (&str, &str)> {
        self.texts.iter().map(|(path, text)| (path.as_str(), text.as_str()))
    }

    /// The files that were read whose names end so.
    pub(super) fn files_with<'a>(&'a self, ending: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.files().filter(move |(path, _)| path.ends_with(ending))
    }

    /// The text of a file, if it is there.
    pub(super) fn text(&self, path: &str) -> Option<&str> {
        self.texts.get(path).map(String::as_str)
    }

    /// Whether there is such a file or folder.
    pub(super) fn exists(&self, path: &str) -> bool {
        self.paths.contains(path)
    }

    /// Every folder.
    pub(super) fn folders(&self) -> impl Iterator<Item = &str> {
        self.folders.iter().map(String::as_str)
    }

    /// The folders of packages, and their manifests.
    pub(super) fn packages(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files_with("/Cargo.toml")
            .filter(|(_, text)| text.lines().any(|line| line.trim() == "[package]"))
            .map(|(path, text)| (path.trim_end_matches("/Cargo.toml"), text))
    }
}

fn is_read(path: &str) -> bool {
    READ.iter().any(|ending| path.ends_with(ending)) || SCRIPTS.iter().any(|folder| path.starts_with(folder))
}

/// The lines of a text with their numbers, from 1.
pub(super) fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(index, line)| (index + 1, line))
}

/// The lines of a page that are prose: not those between fences of code.
pub(super) fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    numbered(text).filter(move |(_, line)| {
        let fence = line.trim_start().starts_with("```");
        if fence {
            fenced = !fenced;
        }
        !fence && !fenced
    })
}

/// Makes a small tree for the test of a check.
#[cfg(test)]
pub(super) fn of(files: &[(&str, &str)]) -> Tree {
    let folder = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    Tree::read(folder.path()).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_hidden_or_built_is_left_out() {
        let tree = of(&[
            ("a/b.rs", "x"),
            ("target/c.rs", "x"),
            (".d/e.rs", "x"),
            ("scripts/f", "x"),
            ("g.png", "x"),
        ]);
        let read: Vec<&str> = tree.files().map(|(path, _)| path).collect();
        assert_eq!(read, ["a/b.rs", "scripts/f"]);
        assert!(tree.exists("g.png") && tree.exists("a") && !tree.exists("target/c.rs"));
    }

    #[test]
    fn prose_leaves_code_out() {
        let lines: Vec<_> = prose("a\n```\nb\n```\nc").collect();
        assert_eq!(lines, [(1, "a"), (5, "c")]);
    }
}
