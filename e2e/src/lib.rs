//! What the end-to-end tests share: a private containerd, images made from Debian packages, `ctr`.
#![forbid(unsafe_code)]
