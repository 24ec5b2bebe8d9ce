//! The command line that containerd gives a shim: flags in Go's style, then an action.
//!
//! Contract: containerd's `runtime/v2/README.md`.

use std::ffi::OsString;

use crate::error::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Make the process that serves a sandbox, and print its address.
    Start,
    /// Clean up after a sandbox whose shim is gone.
    Delete,
    /// Serve a sandbox: what `start` leaves behind.
    Serve,
    /// Boot, save and hand out one template.
    KeepTemplate,
    /// Bring up a VM that waits for its sandbox, and then serve that.
    Spare,
    /// End the templates of a namespace.
    DropTemplates,
    /// Remove from the cache what is of no more use.
    Collect,
    /// Remove the images of a namespace.
    DropImages,
    /// Tell containerd what this runtime is.
    Info,
    Version,
}

#[derive(Debug, Clone)]
pub(crate) struct Args {
    pub(crate) action: Action,
    pub(crate) namespace: String,
    pub(crate) id: String,
    /// containerd's gRPC address.
    pub(crate) address: String,
    /// The folder of the bundle, when not the working directory.
    pub(crate) bundle: Option<String>,
    pub(crate) debug: bool,
}

impl Args {
    pub(crate) fn parse(words: impl Iterator<Item = OsString>) -> Result<Args> {
        let mut args = Args {
            action: Action::Serve,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            bundle: None,
            debug: false,
        };
        let mut action = None;
        let mut words = words.map(|word| {
            word.into_string()
                .map_err(|word| Error::invalid(format!("the argument {} is not UTF-8", word.display())))
        });
        while let Some(word) = words.next() {
            let word = word?;
            let Some(flag) = word.strip_prefix('-') else {
                action = Some(parse_action(&word)?);
                continue;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, inline) =
                flag.split_once('=').map_or((flag, None), |(name, value)| (name, Some(value)));
            match name {
                "debug" => args.debug = inline != Some("false"),
                "v" | "version" => action = Some(Action::Version),
                "info" => action = Some(Action::Info),
                "namespace" | "id" | "address" | "bundle" | "publish-binary" | "socket" => {
                    let value = match inline {
                        Some(value) => value.to_owned(),
                        None => words
                            .next()
                            .ok_or_else(|| Error::invalid(format!("the flag -{name} lacks its value")))??,
                    };
                    match name {
                        "namespace" => args.namespace = value,
                        "id" => args.id = value,
                        "address" => args.address = value,
                        "bundle" => args.bundle = Some(value),
                        // Events go to the address in TTRPC_ADDRESS; the socket is handed over open.
                        _ => {}
                    }
                }
                _ => return Err(Error::invalid(format!("the flag -{name} is not known"))),
            }
        }
        args.action = action.ok_or_else(usage)?;
        Ok(args)
    }
}

fn parse_action(word: &str) -> Result<Action> {
    match word {
        "start" => Ok(Action::Start),
        "delete" => Ok(Action::Delete),
        "serve" => Ok(Action::Serve),
        "keep-template" => Ok(Action::KeepTemplate),
        "spare" => Ok(Action::Spare),
        "drop-templates" => Ok(Action::DropTemplates),
        "collect" => Ok(Action::Collect),
        "drop-images" => Ok(Action::DropImages),
        _ => Err(Error::invalid(format!("the action {word} is not known"))),
    }
}

fn usage() -> Error {
    Error::invalid(
        "containerd starts this program; by hand: \
         containerd-shim-bailey-v1 collect, -namespace NAME drop-templates, -namespace NAME drop-images, or -version",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args> {
        Args::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn containerds_line_is_understood() {
        let args = parse(
            "-namespace default -address /run/c.sock -publish-binary /usr/bin/containerd -id a -debug start",
        )
        .unwrap();
        assert_eq!((args.action, args.namespace.as_str(), args.id.as_str()), (Action::Start, "default", "a"));
        assert!(args.debug);
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        assert!(parse("-nonsense start").unwrap_err().to_string().contains("-nonsense"));
        assert!(parse("-id").unwrap_err().to_string().contains("-id"));
        assert!(parse("").is_err());
    }
}
