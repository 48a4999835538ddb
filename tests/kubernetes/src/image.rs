//! Container images out of files of this machine: an OCI archive (image-spec, layout 1.0.0) with one layer, that
//! `ctr images import` takes. No registry, no builder.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use keystone_lab::tool;
use serde_json::json;
use sha2::{Digest, Sha256};

/// What pods run, and what holds their namespaces: busybox.
pub const BUSYBOX: &str = "kubelab/busybox:1";

/// tar's block (ustar, POSIX.1-1988).
const BLOCK: usize = 512;

/// Where programs look for others, in an image as Linux distributions have them.
const USUAL_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// An image in the making.
#[derive(Clone, Default)]
pub struct Image {
    layer: Vec<u8>,
    folders: BTreeSet<PathBuf>,
    files: BTreeSet<PathBuf>,
    entrypoint: Option<String>,
}

enum Kind<'a> {
    Folder,
    File(&'a [u8]),
    Link(&'a str),
}

impl Image {
    /// busybox with the usual names, `/tmp` and a command that waits: for pods and as the pause image.
    pub fn busybox() -> Result<Self> {
        let mut image = Self::default();
        let program = tool::find("busybox").context("busybox is not installed (package busybox)")?;
        image.add_program(&program, "/bin/busybox")?;
        let names = [
            "sh", "sleep", "cat", "echo", "hostname", "ip", "ls", "nc", "ping", "wget", "id", "mount", "env", "true",
            "date",
        ];
        for name in names {
            image.add_link(&format!("/bin/{name}"), "busybox");
        }
        image.add_folder("/tmp", 0o1777);
        Ok(image)
    }

    /// Puts an executable of this machine into the image, with the libraries it is linked with.
    pub fn add_program(&mut self, source: &Path, target: &str) -> Result<()> {
        self.add_file(source, Path::new(target))?;
        // A static program makes ldd fail, and needs none.
        let linked = tool::feed(Command::new("ldd").arg(source), "").unwrap_or_default();
        for library in linked.split_whitespace().filter(|word| word.starts_with('/')).map(Path::new) {
            if !self.files.contains(library) {
                self.add_file(library, library)?;
            }
        }
        Ok(())
    }

    /// Puts any file of this machine into the image; everybody may read and execute it.
    pub fn add_file(&mut self, source: &Path, target: &Path) -> Result<()> {
        let bytes = fs::read(source).with_context(|| format!("read {}", source.display()))?;
        self.add(target, 0o755, &Kind::File(&bytes));
        Ok(())
    }

    /// Puts a small file into the image.
    pub fn add_text(&mut self, target: &str, text: &str) {
        self.add(Path::new(target), 0o644, &Kind::File(text.as_bytes()));
    }

    /// Puts a symbolic link into the image.
    pub fn add_link(&mut self, target: &str, points_to: &str) {
        self.add(Path::new(target), 0o777, &Kind::Link(points_to));
    }

    /// Puts an empty folder into the image.
    pub fn add_folder(&mut self, target: &str, mode: u32) {
        self.add(Path::new(target), mode, &Kind::Folder);
    }

    /// What every container of this image runs; a container's own words are its arguments.
    pub fn set_entrypoint(&mut self, program: &str) {
        self.entrypoint = Some(program.to_owned());
    }

    /// Whether a file or link is there already.
    pub fn has(&self, target: &str) -> bool {
        self.files.contains(Path::new(target))
    }

    fn add(&mut self, path: &Path, mode: u32, kind: &Kind<'_>) {
        if let Some(parent) = path.parent().filter(|parent| *parent != Path::new("/"))
            && !self.folders.contains(parent)
        {
            self.add(parent, 0o755, &Kind::Folder);
        }
        match kind {
            Kind::Folder => self.folders.insert(path.to_owned()),
            Kind::File(_) | Kind::Link(_) => self.files.insert(path.to_owned()),
        };
        append(&mut self.layer, &path.to_string_lossy(), mode, kind);
    }

    /// Writes the archive of this image under the name `reference`, as manifests call it; `command` is what it runs, or
    /// gives to its entrypoint, where a container does not say.
    pub fn write(mut self, archive: &Path, reference: &str, command: &[&str]) -> Result<()> {
        end(&mut self.layer);
        let layer = Blob::new(self.layer);
        let config = Blob::json(&json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": { "Entrypoint": self.entrypoint.iter().collect::<Vec<_>>(), "Cmd": command, "Env": [USUAL_PATH] },
            "rootfs": { "type": "layers", "diff_ids": [layer.digest()] },
        }));
        let manifest = Blob::json(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config.descriptor("config.v1+json"),
            "layers": [layer.descriptor("layer.v1.tar")],
        }));
        let mut described = manifest.descriptor("manifest.v1+json");
        // The name that containerd gives it (its own annotation).
        described["annotations"] = json!({ "io.containerd.image.name": full_name(reference) });
        let index = json!({ "schemaVersion": 2, "manifests": [described] });

        let mut tar = Vec::new();
        append(&mut tar, "oci-layout", 0o644, &Kind::File(br#"{"imageLayoutVersion":"1.0.0"}"#));
        append(&mut tar, "index.json", 0o644, &Kind::File(index.to_string().as_bytes()));
        for blob in [&layer, &config, &manifest] {
            append(&mut tar, &format!("blobs/sha256/{}", blob.hex), 0o644, &Kind::File(&blob.bytes));
        }
        end(&mut tar);
        let written = File::create(archive).and_then(|mut file| file.write_all(&tar));
        written.with_context(|| format!("write {}", archive.display()))
    }
}

/// With the registry that a short name stands for. A name's first part is a registry's where it looks like a host's.
fn full_name(reference: &str) -> String {
    let host = reference.split_once('/').is_some_and(|(first, _)| first.contains(['.', ':']));
    if host { reference.to_owned() } else { format!("docker.io/{reference}") }
}

/// Bytes that are known by their hash.
struct Blob {
    bytes: Vec<u8>,
    hex: String,
}

impl Blob {
    fn new(bytes: Vec<u8>) -> Self {
        let hex = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        Self { bytes, hex }
    }

    fn json(value: &serde_json::Value) -> Self {
        Self::new(value.to_string().into_bytes())
    }

    fn digest(&self) -> String {
        format!("sha256:{}", self.hex)
    }

    fn descriptor(&self, kind: &str) -> serde_json::Value {
        json!({
            "mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": self.digest(),
            "size": self.bytes.len(),
        })
    }
}

fn append(tar: &mut Vec<u8>, path: &str, mode: u32, kind: &Kind<'_>) {
    let (flag, contents, link): (u8, &[u8], &str) = match kind {
        Kind::Folder => (b'5', &[], ""),
        Kind::File(bytes) => (b'0', bytes, ""),
        Kind::Link(target) => (b'2', &[], target),
    };
    let mut head = [0; BLOCK];
    let mut put = |at: usize, text: &[u8]| head[at..at + text.len()].copy_from_slice(text);
    // 100 bytes are enough for every path here.
    put(0, path.trim_start_matches('/').as_bytes());
    put(100, format!("{mode:07o}\0").as_bytes());
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    put(124, format!("{:011o}\0", contents.len()).as_bytes());
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, &[flag]);
    put(157, link.as_bytes());
    put(257, b"ustar\x0000");
    let sum: u32 = head.iter().copied().map(u32::from).sum();
    head[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    tar.extend_from_slice(&head);
    tar.extend_from_slice(contents);
    tar.resize(tar.len().next_multiple_of(BLOCK), 0);
}

/// Two empty blocks end an archive.
fn end(tar: &mut Vec<u8>) {
    tar.resize(tar.len() + 2 * BLOCK, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_name_is_of_the_usual_registry() {
        assert_eq!(full_name("kubelab/busybox:1"), "docker.io/kubelab/busybox:1");
        assert_eq!(full_name("registry.k8s.io/pause:3.10.1"), "registry.k8s.io/pause:3.10.1");
        assert_eq!(full_name("localhost:5000/pause:1"), "localhost:5000/pause:1");
    }

    #[test]
    fn tar_reads_what_was_written() {
        let mut tar = Vec::new();
        append(&mut tar, "/bin", 0o755, &Kind::Folder);
        append(&mut tar, "/bin/program", 0o755, &Kind::File(&[b'x'; 700]));
        append(&mut tar, "/bin/sh", 0o777, &Kind::Link("program"));
        end(&mut tar);
        let file = std::env::temp_dir().join(format!("kubelab-tar-{}", std::process::id()));
        fs::write(&file, &tar).unwrap();
        let listed = tool::feed(Command::new("tar").args(["--list", "--verbose", "--file"]).arg(&file), "");
        fs::remove_file(&file).unwrap();
        let listed = listed.unwrap();
        let lines: Vec<&str> = listed.lines().collect();
        assert!(
            lines[0].starts_with("drwxr-xr-x") && lines[0].ends_with(" bin/") || lines[0].ends_with(" bin"),
            "{listed}"
        );
        assert!(lines[1].contains(" 700 ") && lines[1].ends_with(" bin/program"), "{listed}");
        assert!(lines[2].ends_with(" bin/sh -> program"), "{listed}");
    }
}
