//! Rust files: how long they are, where `unsafe` may be, and what must not stay in them.

use super::Finding;
use super::tree::{Tree, numbered};

/// The most lines of a Rust file outside of tests.
const LINES_MAX: usize = 500;

/// Files that are longer. This list may only shrink.
const LONG_FILES: [&str; 0] = [];

/// Files outside of `sys` that make system calls of their own. This list may only shrink.
const UNSAFE_FILES: [&str; 1] = [
    // What a taken-over VMM would be: it makes calls that no library offers.
    "crates/host/tests/standin/program.rs",
];

/// Packages with a `sys` module, which therefore cannot forbid `unsafe` as a whole.
const UNSAFE_PACKAGES: [&str; 3] = ["crates/host", "crates/guest", "e2e"];

const FORBID: &str = "#![forbid(unsafe_code)]";

/// Put together here, so that this file does not violate its own rules.
const UNSAFE: &str = concat!("un", "safe");
const ALLOWING: [&str; 2] = [concat!("allow(un", "safe_code"), concat!("expect(un", "safe_code")];
const NOTES: [&str; 3] = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
const UNFINISHED: [&str; 2] = [concat!("to", "do!"), concat!("unimple", "mented!")];
const SKIPPED: &str = concat!("#[ig", "nore");

/// Finds files that are too long.
pub(super) fn lengths(tree: &Tree) -> Vec<Finding> {
    long_files(tree, &LONG_FILES)
}

fn long_files(tree: &Tree, exceptions: &[&str]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree.files_with(".rs").filter(|(path, _)| !is_test(path)) {
        let lines = text.lines().count();
        if lines > LINES_MAX && !exceptions.contains(&path) {
            let what = format!("{lines} lines, the most is {LINES_MAX}");
            findings.push(Finding::new(path, LINES_MAX + 1, what, "split it by subject into modules"));
        }
    }
    for path in exceptions {
        if tree.text(path).is_none_or(|text| text.lines().count() <= LINES_MAX) {
            let what = "is on the list of long files, and is not long";
            findings.push(Finding::new(path, 1, what, "take it off LONG_FILES in xtask/src/tidy/sources.rs"));
        }
    }
    findings
}

fn is_test(path: &str) -> bool {
    path.split('/').any(|part| part == "tests")
}

/// Finds `unsafe`, and leave to use it, outside of modules named `sys`.
pub(super) fn unsafe_code(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree.files_with(".rs") {
        if path.split('/').any(|part| part == "sys" || part == "sys.rs") || UNSAFE_FILES.contains(&path) {
            continue;
        }
        for (number, line) in numbered(text) {
            let code = line.split("//").next().unwrap_or_default();
            if is_unsafe(code) || ALLOWING.iter().any(|allowing| code.contains(allowing)) {
                let what = format!("{UNSAFE} outside of a module named sys");
                let remedy = "use a safe crate, or move the call into the crate's sys module";
                findings.push(Finding::new(path, number, what, remedy));
            }
        }
    }
    findings
}

/// Whether there is the keyword, not a name or a text with the word in it.
fn is_unsafe(code: &str) -> bool {
    code.match_indices(UNSAFE).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = code[at + UNSAFE.len()..].trim_start();
        let keyword =
            ["{", "fn ", "impl", "extern", "trait ", "("].iter().any(|next| after.starts_with(next));
        (keyword || after.is_empty()) && before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != '"')
    })
}

/// Finds crate roots that could forbid `unsafe` and do not.
pub(super) fn crate_roots(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (folder, _) in tree.packages().filter(|(folder, _)| !UNSAFE_PACKAGES.contains(folder)) {
        let bin = format!("{folder}/src/bin/");
        let main = [format!("{folder}/src/lib.rs"), format!("{folder}/src/main.rs")];
        let is_root = |path: &str| {
            let program = path.strip_prefix(&bin);
            main.iter().any(|root| root == path)
                || program.is_some_and(|rest| !rest.contains('/') || rest.ends_with("/main.rs"))
        };
        for (path, text) in tree.files_with(".rs").filter(|(path, _)| is_root(path)) {
            if !text.lines().any(|line| line.trim() == FORBID) {
                findings.push(Finding::new(
                    path,
                    1,
                    format!("lacks {FORBID}"),
                    "add it below the module's text",
                ));
            }
        }
    }
    findings
}

/// Finds notes to oneself, code that is not written yet, and tests that are skipped.
pub(super) fn leftovers(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (path, text) in tree.files().filter(|(path, _)| !path.ends_with(".md")) {
        for (number, line) in numbered(text) {
            for note in NOTES.iter().filter(|note| has_word(line, note)) {
                let remedy = "do it, or write down what is missing in the documentation";
                findings.push(Finding::new(path, number, format!("has a {note}"), remedy));
            }
            if !path.ends_with(".rs") {
                continue;
            }
            for call in UNFINISHED.iter().filter(|call| line.contains(*call)) {
                findings.push(Finding::new(
                    path,
                    number,
                    format!("has {call}"),
                    "write the code, or refuse by name",
                ));
            }
            if line.contains(SKIPPED) {
                let what = "a test is skipped by an attribute";
                findings.push(Finding::new(
                    path,
                    number,
                    what,
                    "make it pass, or remove it with its feature",
                ));
            }
        }
    }
    findings
}

/// Whether the word stands alone: not within a longer one.
fn has_word(line: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        !line[..at].chars().next_back().is_some_and(part)
            && !line[at + word.len()..].chars().next().is_some_and(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::tree::of;

    #[test]
    fn a_long_file_is_found_but_not_in_tests() {
        let long = "x\n".repeat(LINES_MAX + 1);
        let tree = of(&[("a/src/b.rs", &long), ("a/tests/b.rs", &long), ("a/src/c.rs", "x\n")]);
        let found = long_files(&tree, &[]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].to_string().starts_with("a/src/b.rs:501: 501 lines"), "{found:?}");
        assert!(long_files(&tree, &["a/src/b.rs"]).is_empty());
    }

    #[test]
    fn the_list_of_long_files_may_only_shrink() {
        let tree = of(&[("a/src/c.rs", "x\n")]);
        assert_eq!(long_files(&tree, &["a/src/c.rs", "gone.rs"]).len(), 2);
    }

    #[test]
    fn the_keyword_is_found_outside_of_sys() {
        for code in [
            format!("{UNSAFE} {{ f() }}"),
            format!("pub {UNSAFE} fn f() {{}}"),
            format!("let x = {UNSAFE}"),
            format!("#[{UNSAFE}(no_mangle)]"),
            format!("#![{}, reason = \"x\")]", ALLOWING[0]),
        ] {
            let tree = of(&[("a/src/b.rs", &code), ("a/src/sys.rs", &code), ("a/src/sys/c.rs", &code)]);
            let found = unsafe_code(&tree);
            assert_eq!(found.len(), 1, "{code}: {found:?}");
            assert!(found[0].to_string().starts_with("a/src/b.rs:1: "), "{found:?}");
        }
    }

    #[test]
    fn the_word_in_a_text_is_no_keyword() {
        let text = format!("// {UNSAFE} {{\nlet {UNSAFE}_fn = \"{UNSAFE} to use\";\n{FORBID}\n");
        assert!(unsafe_code(&of(&[("a/src/b.rs", &text)])).is_empty());
    }

    #[test]
    fn a_crate_root_that_forbids_nothing_is_found() {
        let manifest = "[package]\nname = \"x\"\n";
        let tree = of(&[
            ("crates/x/Cargo.toml", manifest),
            ("crates/x/src/lib.rs", "mod a;"),
            ("crates/x/src/a.rs", ""),
            ("crates/x/src/bin/b/main.rs", ""),
            ("crates/y/Cargo.toml", manifest),
            ("crates/y/src/main.rs", FORBID),
            ("crates/host/Cargo.toml", manifest),
            ("crates/host/src/lib.rs", ""),
        ]);
        let found: Vec<String> = crate_roots(&tree).iter().map(ToString::to_string).collect();
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found.iter().all(|text| text.starts_with("crates/x/src/")), "{found:?}");
    }

    #[test]
    fn each_leftover_is_found() {
        let lines: Vec<String> = NOTES.iter().map(|note| format!("// {note}: later")).collect();
        let lines =
            [lines, UNFINISHED.map(|call| format!("{call}()")).into(), vec![format!("{SKIPPED}]")]].concat();
        for line in lines {
            let found = leftovers(&of(&[("a/src/b.rs", &format!("\n{line}\n"))]));
            assert_eq!(found.len(), 1, "{line}: {found:?}");
            assert!(found[0].to_string().starts_with("a/src/b.rs:2: "), "{found:?}");
        }
        assert_eq!(leftovers(&of(&[("scripts/a", &format!("# {}", NOTES[0]))])).len(), 1);
    }

    #[test]
    fn a_pattern_of_mktemp_is_no_note() {
        let text = format!("mktemp /tmp/a.{0}{0}", NOTES[2]);
        assert!(leftovers(&of(&[("scripts/a", &text)])).is_empty());
    }
}
