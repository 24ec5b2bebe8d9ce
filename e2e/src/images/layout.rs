//! OCI image layouts, the same bytes for the same content.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{Config, hex};
use crate::process::text_of;

const PACK_LIMIT: Duration = Duration::from_secs(300);
/// The time that every file and the image itself were made, for all that they tell.
const EPOCH: &str = "2020-01-01T00:00:00Z";

/// Packs a folder so that the same files give the same bytes.
pub(super) fn pack(folder: &Path, tar: &Path) -> Result<()> {
    let mut command = Command::new("tar");
    command.args(["--create", "--format=posix", "--sort=name", "--numeric-owner", "--xattrs"]);
    command.args(["--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime"]);
    command.arg(format!("--mtime={EPOCH}")).arg("--file").arg(tar);
    command.arg("--directory").arg(folder).arg(".");
    text_of(&mut command, PACK_LIMIT).map(drop)
}

struct Blob {
    digest: String,
    size: u64,
}

impl Blob {
    fn descriptor(&self, media_type: &str) -> Value {
        json!({"mediaType": media_type, "digest": format!("sha256:{}", self.digest), "size": self.size})
    }
}

/// Writes the layout of an image with these layers, and packs it.
pub(super) fn write(
    layout: &Path,
    layers: &[PathBuf],
    config: &Config,
    reference: &str,
    archive: &Path,
) -> Result<()> {
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).with_context(|| format!("creating {}", blobs.display()))?;
    let layers = layers.iter().map(|tar| move_in(&blobs, tar)).collect::<Result<Vec<Blob>>>()?;
    let diff_ids: Vec<_> = layers.iter().map(|layer| format!("sha256:{}", layer.digest)).collect();
    let config = add(&blobs, &config_json(config, &diff_ids))?;
    let layers: Vec<_> =
        layers.iter().map(|layer| layer.descriptor("application/vnd.oci.image.layer.v1.tar")).collect();
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": manifest_type,
        "config": config.descriptor("application/vnd.oci.image.config.v1+json"),
        "layers": layers,
    });
    let mut manifest = add(&blobs, &manifest)?.descriptor(manifest_type);
    manifest["annotations"] = json!({"io.containerd.image.name": reference});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    write_json(&layout.join("index.json"), &index)?;
    write_json(&layout.join("oci-layout"), &json!({"imageLayoutVersion": "1.0.0"}))?;
    pack(layout, archive)
}

/// Unpacks the files of the lowest layer of a packed image.
pub(super) fn unpack_lowest(archive: &Path, into: &Path) -> Result<()> {
    let layout = tempfile::tempdir().context("making a folder")?;
    unpack(archive, layout.path())?;
    let read = |path: &Path| -> Result<Value> {
        let text = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))
    };
    let blob = |descriptor: &Value| {
        let digest = descriptor["digest"].as_str().and_then(|digest| digest.strip_prefix("sha256:"));
        digest
            .map(|digest| layout.path().join("blobs/sha256").join(digest))
            .context("an image without a digest")
    };
    let manifest = read(&blob(&read(&layout.path().join("index.json"))?["manifests"][0])?)?;
    fs::create_dir_all(into).with_context(|| format!("creating {}", into.display()))?;
    unpack(&blob(&manifest["layers"][0])?, into)
}

fn unpack(tar: &Path, into: &Path) -> Result<()> {
    let mut command = Command::new("tar");
    command.args(["--extract", "--numeric-owner", "--preserve-permissions", "--xattrs", "--file"]).arg(tar);
    text_of(command.arg("--directory").arg(into), PACK_LIMIT).map(drop)
}

fn config_json(config: &Config, diff_ids: &[String]) -> Value {
    let mut run = json!({});
    let lists = [("Entrypoint", config.entrypoint), ("Cmd", config.cmd), ("Env", config.env)];
    for (name, list) in lists.iter().filter(|(_, list)| !list.is_empty()) {
        run[name] = json!(list);
    }
    let texts =
        [("User", config.user), ("WorkingDir", config.working_dir), ("StopSignal", config.stop_signal)];
    for (name, text) in texts.iter().filter(|(_, text)| !text.is_empty()) {
        run[name] = json!(text);
    }
    json!({
        "created": EPOCH,
        "architecture": "amd64",
        "os": "linux",
        "config": run,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    })
}

fn move_in(blobs: &Path, file: &Path) -> Result<Blob> {
    let mut hash = Sha256::new();
    let mut opened = File::open(file).with_context(|| format!("opening {}", file.display()))?;
    let size =
        std::io::copy(&mut opened, &mut hash).with_context(|| format!("reading {}", file.display()))?;
    let digest = hex(&hash.finalize());
    fs::rename(file, blobs.join(&digest)).with_context(|| format!("moving {}", file.display()))?;
    Ok(Blob { digest, size })
}

fn add(blobs: &Path, content: &Value) -> Result<Blob> {
    let text = content.to_string();
    let digest = hex(&Sha256::digest(&text));
    write_json(&blobs.join(&digest), content)?;
    Ok(Blob { digest, size: text.len() as u64 })
}

fn write_json(path: &Path, content: &Value) -> Result<()> {
    fs::write(path, content.to_string()).with_context(|| format!("writing {}", path.display()))
}
