use std::os::unix::fs::symlink;

use super::*;
use crate::cni::facts::{FILE, facts};
use crate::cni::layout::CONFLIST;
use crate::status::tests::sample;

const PATIENCE: Duration = Duration::from_secs(20);
const CALICO: &str =
    r#"{"cniVersion":"1.0.0","name":"k8s-pod-network","plugins":[{"type":"calico"},{"type":"portmap"}]}"#;

struct Node {
    root: tempfile::TempDir,
    settings: Settings,
}

impl Node {
    fn new(mode: Mode) -> Self {
        let root = tempfile::tempdir().unwrap();
        let at = |part: &str| root.path().join(part);
        for directory in ["image", "run", "etc", "etc/net.d"] {
            fs::create_dir(at(directory)).unwrap();
        }
        fs::write(at("image/keystone-cni"), "a program").unwrap();
        let settings = Settings {
            mode: Some(mode),
            conf_dir: at("etc/net.d"),
            bin_dir: at("opt/bin"),
            plugin: Some(at("image/keystone-cni")),
            facts: None,
        };
        Self { root, settings }
    }

    fn facts(&self) -> PathBuf {
        self.root.path().join("run").join(FILE)
    }

    fn make_ready(&self) {
        facts(&sample()).unwrap().write(&self.facts()).unwrap();
    }

    fn read(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.settings.conf_dir.join(name)).ok()
    }

    fn names(&self, directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).into_iter().flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn plugin_and_list_are_installed_when_the_mesh_is_ready_and_put_back_and_taken_away() {
    let mut node = Node::new(Mode::PodNetwork);
    let installer = Installer::start(&node.settings, node.facts()).unwrap();
    let program = node.settings.bin_dir.join(PLUGIN);
    until("the program is there", || program.is_file()).await;
    assert_eq!(node.read(CONFLIST), None);
    node.make_ready();
    until("the list is there", || node.read(CONFLIST).is_some()).await;
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&program), mode(&node.settings.conf_dir.join(CONFLIST))), (0o755, 0o644));
    assert_eq!(
        (node.names(&node.settings.conf_dir), node.names(&node.settings.bin_dir)),
        (vec![CONFLIST.to_owned()], vec![PLUGIN.to_owned()])
    );

    // An upgrade brings another program; somebody deletes the list.
    fs::write(node.settings.plugin.as_ref().unwrap(), "another program").unwrap();
    fs::remove_file(node.settings.conf_dir.join(CONFLIST)).unwrap();
    until("the program is replaced", || fs::read(&program).unwrap() == b"another program").await;
    until("the list is put back", || node.read(CONFLIST).is_some()).await;
    assert_eq!(installer.problems(), [""; 0]);

    drop(installer);
    assert!(node.read(CONFLIST).is_some(), "a daemon that stops leaves it");
    withdraw(&node.settings).unwrap();
    assert_eq!(node.names(&node.settings.conf_dir), [""; 0]);
    assert!(program.is_file(), "pods of before are taken down by it");
    node.settings.mode = None;
    assert!(Installer::start(&node.settings, node.facts()).is_none());
}

#[tokio::test]
async fn a_helper_is_chained_again_when_the_owner_of_the_list_rewrites_it() {
    let node = Node::new(Mode::Helper);
    node.make_ready();
    let list = node.settings.conf_dir.join("10-calico.conflist");
    let _installer = Installer::start(&node.settings, node.facts()).unwrap();
    let chained = || node.read("10-calico.conflist").is_some_and(|text| text.contains("keystone-cni"));
    for _ in 0..2 {
        fs::write(&list, CALICO).unwrap();
        fs::set_permissions(&list, Permissions::from_mode(0o600)).unwrap();
        until("the helper is chained", chained).await;
    }
    assert_eq!(fs::metadata(&list).unwrap().permissions().mode() & 0o777, 0o600, "its owner's permissions stay");
    withdraw(&node.settings).unwrap();
    let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    assert_eq!(value(&node.read("10-calico.conflist").unwrap()), value(CALICO));
}

#[tokio::test]
async fn what_cannot_be_done_is_told_with_the_remedy() {
    let mut node = Node::new(Mode::PodNetwork);
    node.settings.plugin = Some(node.root.path().join("nowhere"));
    let installer = Installer::start(&node.settings, node.facts()).unwrap();
    until("a missing program is told", || installer.problems().iter().any(|it| it.contains("--cni-plugin"))).await;
    drop(installer);

    node.settings.plugin = Some(node.root.path().join("image/keystone-cni"));
    fs::write(node.root.path().join("opt"), "a file where a directory should be").unwrap();
    let installer = Installer::start(&node.settings, node.facts()).unwrap();
    until("a directory that is none is told", || installer.problems().iter().any(|it| it.contains("cannot write")))
        .await;
}

#[test]
fn a_directory_that_does_not_exist_has_nothing_of_ours() {
    withdraw_from(Path::new("/nonexistent/net.d")).unwrap();
}

#[test]
fn a_rewrite_of_another_program_in_between_is_not_lost() {
    let directory = tempfile::tempdir().unwrap();
    let list = directory.path().join("10-calico.conflist");
    fs::write(&list, "what was read").unwrap();
    let write = |was: &str| {
        let unchanged = || fs::read_to_string(&list).unwrap() == was;
        replace(directory.path(), "10-calico.conflist", b"ours", 0o644, unchanged).unwrap()
    };
    assert_eq!(write("what it was before"), Applied::Changed);
    assert_eq!(fs::read_to_string(&list).unwrap(), "what was read");
    assert_eq!(write("what was read"), Applied::Done);
    assert_eq!(
        (fs::read_to_string(&list).unwrap(), fs::read_dir(directory.path()).unwrap().count()),
        ("ours".into(), 1)
    );
}

#[test]
fn a_list_that_is_a_link_stays_one_and_one_that_leads_nowhere_is_told() {
    let node = Node::new(Mode::Helper);
    node.make_ready();
    let managed = node.root.path().join("managed");
    fs::create_dir(&managed).unwrap();
    fs::write(managed.join("calico"), CALICO).unwrap();
    let list = node.settings.conf_dir.join("10-calico.conflist");
    symlink("../../managed/calico", &list).unwrap();
    let mut work = Work {
        settings: node.settings.clone(),
        mode: Mode::Helper,
        facts: node.facts(),
        layout: Layout::default(),
        programs: Programs::default(),
    };
    work.round().unwrap();
    assert!(fs::symlink_metadata(&list).unwrap().is_symlink());
    assert!(fs::read_to_string(managed.join("calico")).unwrap().contains(PLUGIN));
    assert_eq!((node.names(&managed), node.names(&node.settings.conf_dir).len()), (vec!["calico".to_owned()], 1));

    symlink("/nonexistent/list", node.settings.conf_dir.join(CONFLIST)).unwrap();
    work = Work { mode: Mode::PodNetwork, ..work };
    let told = format!("{:#}", work.round().unwrap_err());
    assert!(told.contains("10-keystone.conflist is a link to /nonexistent/list"), "{told}");
}

#[test]
fn a_plugin_tells_its_versions_or_is_not_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let plugin = |name: &str, says: &str| {
        let path = directory.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{says}\n")).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        // Another test's child may hold the file open for writing for a moment.
        let deadline = Instant::now() + PATIENCE;
        let patience = if name == "hangs" { Duration::from_millis(100) } else { PATIENCE };
        loop {
            let busy = |error: &anyhow::Error| {
                error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::ExecutableFileBusy)
            };
            match ask_versions(&path, patience) {
                Err(error) if busy(&error) && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                answer => return answer,
            }
        }
    };
    let speaks = plugin("speaks", r#"read -r _; echo '{"supportedVersions":["0.4.0","1.0.0"]}'"#);
    assert_eq!(speaks.unwrap(), ["0.4.0", "1.0.0"]);
    assert!(plugin("hangs", "exec sleep 600").unwrap_err().to_string().contains("no answer"));
    assert!(plugin("stutters", "read -r _; echo no").is_err());
}
