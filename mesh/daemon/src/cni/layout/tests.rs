use super::*;

const READY: Ready = Ready { mesh_address: true, pod_cidr: true, peer: true };
const CILIUM: &str = r#"{"cniVersion":"0.3.1","name":"cilium","plugins":[{"type":"cilium-cni","enable-debug":false}]}"#;

/// Directories that are as the decisions make them.
struct Node {
    layout: Layout,
    wanted: Wanted,
    found: Found,
    now: Instant,
}

impl Node {
    fn new(mode: Mode) -> Self {
        let wanted = Wanted { mode, facts: None, ready: READY };
        Self { layout: Layout::default(), wanted, found: Found::default(), now: Instant::now() }
    }

    fn with(mut self, name: &str, text: &str) -> Self {
        self.found.files.insert(name.to_owned(), text.to_owned());
        self
    }

    fn decide(&mut self) -> Decision {
        self.layout.decide(&self.wanted, &self.found, self.now)
    }

    /// Decides and applies once; a second time there is nothing to do.
    fn settle(&mut self) -> Vec<String> {
        let Decision { ops, problems, .. } = self.decide();
        for op in ops {
            match op {
                Op::CopyProgram => self.found.program = true,
                Op::Write { name, text } => drop(self.found.files.insert(name, text)),
                Op::Remove(name) => assert!(self.found.files.remove(&name).is_some()),
            }
        }
        assert_eq!(self.decide().ops, [], "it is as it should be");
        problems
    }

    fn read(&self, name: &str) -> Value {
        serde_json::from_str(&self.found.files[name]).unwrap()
    }

    fn names(&self) -> Vec<&str> {
        self.found.files.keys().map(String::as_str).collect()
    }

    fn types(&self, name: &str) -> Vec<String> {
        self.read(name)["plugins"].as_array().unwrap().iter().map(|p| p["type"].as_str().unwrap().to_owned()).collect()
    }
}

#[test]
fn the_own_list_comes_when_the_mesh_is_ready_and_stays_when_it_is_away() {
    let mut node = Node::new(Mode::PodNetwork);
    for missing in
        [Ready { peer: false, ..READY }, Ready { pod_cidr: false, ..READY }, Ready { mesh_address: false, ..READY }]
    {
        node.wanted.ready = missing;
        assert_eq!(node.settle(), [""; 0]);
        assert!(node.names().is_empty() && node.found.program, "the program may come before");
    }
    node.wanted.ready = READY;
    node.settle();
    assert_eq!(node.names(), [CONFLIST]);
    let list = node.read(CONFLIST);
    assert_eq!((&list["name"], &list["managedBy"]), (&json!("keystone"), &json!("keystone-mesh")));
    assert_eq!(list["plugins"], json!([{"type": "keystone-cni"}]));
    node.wanted.ready = Ready::default();
    node.settle();
    assert_eq!(node.names(), [CONFLIST]);
}

#[test]
fn portmap_follows_where_it_is_installed_and_the_list_speaks_what_both_speak() {
    let mut node = Node::new(Mode::PodNetwork);
    node.wanted.facts = Some("/elsewhere/pods.json".into());
    node.found.portmap = Some(["0.4.0", "1.0.0"].map(String::from).into());
    node.settle();
    assert_eq!(node.types(CONFLIST), ["keystone-cni", "portmap"]);
    assert_eq!(node.read(CONFLIST)["cniVersions"], json!(["1.0.0"]));
    assert_eq!(node.read(CONFLIST)["plugins"][0]["facts"], "/elsewhere/pods.json");
    // It is upgraded, some time later.
    node.now += Duration::from_secs(300);
    node.found.portmap = Some(["1.0.0", "1.1.0"].map(String::from).into());
    node.settle();
    assert_eq!(
        (node.read(CONFLIST)["cniVersion"].clone(), node.read(CONFLIST)["cniVersions"].clone()),
        (json!("1.0.0"), json!(["1.0.0", "1.1.0"]))
    );
}

#[test]
fn only_what_is_ours_is_removed() {
    for mode in [Mode::None, Mode::Underlay, Mode::Helper] {
        let mut node = Node::new(Mode::PodNetwork);
        node.settle();
        node.wanted.mode = mode;
        node.settle();
        assert!(node.names().is_empty(), "{mode:?}");
        assert!(node.found.program, "pods of before are taken down by it");

        let theirs = r#"{"cniVersion":"1.0.0","name":"by-hand","plugins":[{"type":"keystone-cni"}]}"#;
        let mut node = Node::new(mode).with(CONFLIST, theirs);
        node.wanted.ready = Ready::default();
        node.settle();
        assert_eq!(node.found.files[CONFLIST], theirs, "{mode:?}");
    }
    let mut node = Node::new(Mode::PodNetwork).with(CONFLIST, CILIUM);
    let problems = node.settle();
    assert!(problems[0].contains("not ours") && node.found.files[CONFLIST] == CILIUM, "{problems:?}");
}

#[test]
fn another_network_that_the_runtime_would_take_is_told_and_left() {
    let mut node = Node::new(Mode::PodNetwork).with("05-cilium.conflist", CILIUM).with("99-loopback.conf", "{}");
    let problems = node.settle();
    assert!(problems.len() == 1 && problems[0].contains("05-cilium.conflist comes before"), "{problems:?}");
    assert_eq!(node.names(), ["05-cilium.conflist", CONFLIST, "99-loopback.conf"]);
}

#[test]
fn the_helper_is_chained_last_to_the_list_that_the_runtime_takes_and_taken_out_again() {
    let mut node = Node::new(Mode::Helper).with("05-cilium.conflist", CILIUM).with("20-flannel.conflist", CILIUM);
    node.wanted.ready = Ready { mesh_address: true, peer: false, pod_cidr: false };
    assert_eq!(node.decide().ops, [Op::CopyProgram], "not before the mesh is there");
    node.wanted.ready.peer = true;
    node.settle();
    assert_eq!(node.types("05-cilium.conflist"), ["cilium-cni", "keystone-cni"]);
    assert_eq!(node.read("05-cilium.conflist")["plugins"][1], json!({"type": "keystone-cni", "mode": "helper"}));
    assert_eq!(node.found.files["20-flannel.conflist"], CILIUM);

    // Its owner writes another file, which comes first.
    node.found.files.insert("01-new.conflist".into(), CILIUM.into());
    node.now += Duration::from_secs(300);
    node.settle();
    assert_eq!(node.types("01-new.conflist"), ["cilium-cni", "keystone-cni"]);
    assert_eq!(node.types("05-cilium.conflist"), ["cilium-cni"]);

    for mode in [Mode::None, Mode::Underlay, Mode::PodNetwork] {
        node.wanted.mode = mode;
        node.now += Duration::from_secs(300);
        node.settle();
        assert_eq!(node.types("01-new.conflist"), ["cilium-cni"], "{mode:?}");
        let theirs: Value = serde_json::from_str(CILIUM).unwrap();
        assert_eq!(node.read("01-new.conflist"), theirs);
    }
}

#[test]
fn a_helper_without_a_list_waits_and_says_so() {
    let mut node = Node::new(Mode::Helper);
    assert!(node.settle()[0].contains("no network yet"));
    let mut node =
        Node::new(Mode::Helper).with("10-bridge.conf", r#"{"cniVersion":"1.0.0","name":"b","type":"bridge"}"#);
    assert!(node.settle()[0].contains("single plugin"));
    let mut node = Node::new(Mode::Helper).with("00-broken.conflist", "{").with("10-good.conflist", CILIUM);
    assert!(node.settle()[0].contains("00-broken.conflist is no valid configuration"));
    assert_eq!(node.types("10-good.conflist"), ["cilium-cni", "keystone-cni"]);
}

#[test]
fn a_writer_that_insists_is_not_fought_but_answered_later_each_time() {
    for (mode, name) in [(Mode::Helper, "05-cilium.conflist"), (Mode::PodNetwork, CONFLIST)] {
        let mut node = Node::new(mode).with("05-cilium.conflist", CILIUM);
        node.found.program = true;
        let (start, mut writes, mut told) = (node.now, 0, false);
        while node.now < start + Duration::from_secs(600) {
            let Decision { ops, problems, again_at } = node.decide();
            told |= problems.iter().any(|problem| problem.contains("keeps changing"));
            assert!(ops.is_empty() || again_at.is_none());
            // At once it is taken out, or away.
            writes += ops.len();
            node.now = again_at.unwrap_or(node.now + Duration::from_millis(1));
        }
        assert!((8..=20).contains(&writes) && told, "{name}: {writes} writes in ten minutes");
        // And after a while without the quarrel it is put right at once again.
        node.settle();
        node.now += Duration::from_secs(600);
        match mode {
            Mode::Helper => drop(node.found.files.insert(name.to_owned(), CILIUM.to_owned())),
            Mode::None | Mode::PodNetwork | Mode::Underlay => drop(node.found.files.remove(name)),
        }
        assert_eq!(node.decide().ops.len(), 1, "{name}");
    }
}

#[test]
fn runtimes_look_at_three_endings() {
    for (name, looked_at) in [
        ("10-keystone.conflist", true),
        ("87-podman.conf", true),
        ("x.json", true),
        (".10-keystone.conflist.7", false),
        (".hidden.conf", false),
        ("05-cilium.conflist.cilium_bak", false),
        ("README", false),
    ] {
        assert_eq!(is_configuration(name), looked_at, "{name}");
    }
}
