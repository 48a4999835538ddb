//! The images that Kubernetes' own tests of networking ask for, made out of this machine's programs under exactly the
//! names that they ask by (`e2e.test --list-images`), so that nothing is ever pulled.
//!
//! `agnhost` is the real one, built from Kubernetes' sources. Around it the tests expect a small system: they run a shell,
//! curl, dig, OpenBSD's nc and a handful of small tools inside.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use keystone_lab::tool;

use crate::{Assets, Image};

/// What most pods of the tests run.
pub const AGNHOST: &str = "registry.k8s.io/e2e-test-images/agnhost:2.59";

/// The cluster's DNS; of this name nobody asks but [`dns`](crate::dns).
pub(crate) const COREDNS: &str = "kubelab/coredns:1";

/// Pods that only have to be there.
const PAUSE: &str = "registry.k8s.io/pause:3.10.1";

/// Shell scripts.
const BUSYBOX: &str = "registry.k8s.io/e2e-test-images/busybox:1.37.0-1";

/// Look-ups of names.
const DNSUTILS: &str = "registry.k8s.io/e2e-test-images/jessie-dnsutils:1.7";

/// Programs with libraries, and where the tests look for them. busybox' own shell would take busybox' own nc, which knows
/// no `-v`.
const PROGRAMS: [(&str, &str); 6] = [
    ("dash", "/bin/sh"),
    ("curl", "/usr/bin/curl"),
    ("dig", "/usr/bin/dig"),
    ("getent", "/usr/bin/getent"),
    ("nc.openbsd", "/usr/bin/nc"),
    ("iperf", "/usr/bin/iperf"),
];

/// Writes the archive of every image into `folder`, and returns them.
pub fn write_test_images(folder: &Path) -> Result<Vec<PathBuf>> {
    let assets = Assets::find_tests()?;
    let system = system()?;
    let mut archives = Vec::new();
    let mut write = |image: Image, reference: &str, command: &[&str]| {
        let archive = folder.join(format!("image-{}.tar", archives.len()));
        archives.push(archive.clone());
        image.write(&archive, reference, command)
    };

    let mut agnhost = system.clone();
    agnhost.add_file(&assets.program("agnhost"), Path::new("/agnhost"))?;
    agnhost.add_link("/agnhost-2", "agnhost");
    agnhost.add_folder("/uploads", 0o777);
    for file in ["localhost.crt", "localhost.key"] {
        agnhost.add_file(&assets.program(file), &Path::new("/").join(file))?;
    }
    agnhost.set_entrypoint("/agnhost");
    write(agnhost, AGNHOST, &["pause"])?;

    write(Image::busybox()?, PAUSE, &["/bin/sleep", "2147483647"])?;

    write(system.clone(), DNSUTILS, &["/bin/sleep", "2147483647"])?;
    write(system, BUSYBOX, &["/bin/sh"])?;

    let mut coredns = Image::default();
    coredns.add_file(&assets.program("coredns"), Path::new("/coredns"))?;
    coredns.set_entrypoint("/coredns");
    write(coredns, COREDNS, &[])?;
    Ok(archives)
}

/// A small system without a program of its own.
fn system() -> Result<Image> {
    let mut image = Image::default();
    for (program, target) in PROGRAMS {
        let path = tool::find(program).with_context(|| format!("{program} is not installed (`make deps` does it)"))?;
        image.add_program(&path, target)?;
    }
    let busybox = tool::find("busybox").context("busybox is not installed (package busybox)")?;
    image.add_program(&busybox, "/bin/busybox")?;
    for applet in tool::feed(Command::new(&busybox).arg("--list"), "")?.lines() {
        let targets = ["/bin", "/usr/bin"].map(|folder| format!("{folder}/{applet}"));
        if !targets.iter().any(|target| image.has(target)) {
            image.add_link(&targets[0], "busybox");
        }
    }
    image.add_text("/etc/passwd", "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n");
    image.add_text("/etc/group", "root:x:0:\nnogroup:x:65534:\n");
    image.add_text("/etc/nsswitch.conf", "hosts: files dns\n");
    image.add_folder("/tmp", 0o1777);
    Ok(image)
}
