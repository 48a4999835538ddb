//! What the plugin has to know, out of what the daemon knows.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use keystone_cni::facts::{PodFacts, Ready, VERSION};

use crate::status::{Approval, Peer, Status};

/// For so long a node that was ready has to be without what it needs before that is told: a path that changes, and a
/// daemon that starts again, must not turn the node unready for a second. Also after so long a write is tried again.
const PATIENCE: Duration = Duration::from_secs(10);

/// The facts' file among the daemon's others.
pub const FILE: &str = "pods.json";

/// What pods need to know of this node; none for a daemon with plain peers alone.
pub fn facts(status: &Status) -> Option<PodFacts> {
    let node = &status.node;
    let name = node.name.as_ref()?;
    let (ready, not_ready) = readiness(status);
    let mut cluster: Vec<IpNet> = node.mesh_cidrs.iter().chain(&node.pod_cidrs).copied().collect();
    cluster.extend(status.peers.iter().flat_map(|peer| &peer.pod_cidrs));
    Some(PodFacts {
        version: VERSION,
        node: name.to_string(),
        pod_cidrs: node.pod_cidrs.clone(),
        mesh_addresses: node.addresses.iter().map(IpNet::addr).collect(),
        mtu: node.mtu.into(),
        cluster_cidrs: IpNet::aggregate(&cluster),
        ready,
        not_ready,
    })
}

/// What there is of what pods need, and a sentence for each thing that is missing.
fn readiness(status: &Status) -> (Ready, Vec<String>) {
    let node = &status.node;
    let mut missing = Vec::new();
    let mesh_address = node.approval == Approval::Approved && !node.addresses.is_empty() && status.data_plane.up;
    if !mesh_address {
        let why = status.not_ready().unwrap_or_else(|| format!("it waits for {}", node.interface));
        missing.push(format!("this node has no mesh address: {why}"));
    }
    let pod_cidr = !node.pod_cidrs.is_empty();
    if !pod_cidr {
        missing.push(
            "no pod CIDR of this node is approved: its Node needs spec.podCIDRs (kube-controller-manager with \
             --allocate-node-cidrs), and the condition MeshRoutes says what was refused"
                .to_owned(),
        );
    }
    let peer = peers_are_reached(&status.peers);
    if !peer {
        missing.push("no peer is reached; `keystone-mesh peers` says what was tried".to_owned());
    }
    (Ready { mesh_address, pod_cidr, peer }, missing)
}

/// Whether a peer is reached, or there is none that anybody tries to reach: a cluster of one node is whole, and so is one
/// whose nodes have nothing to say to each other.
fn peers_are_reached(peers: &[Peer]) -> bool {
    let reached = |peer: &&Peer| match peer.path.as_str() {
        "direct" | "relayed" => true,
        "idle" => peer.last_handshake_s.is_some(),
        _ => false,
    };
    let mut members = peers.iter().filter(|peer| peer.identity.is_some());
    members.clone().any(|peer| reached(&peer)) || members.all(|peer| peer.path == "idle")
}

/// Decides when facts are written, and how bad news is told in `ready`: for any fault there Kubernetes takes all pods of the
/// node out of Services, with each other and with those of the same node too.
///
/// | what is missing | before it ever was there | after |
/// | --- | --- | --- |
/// | mesh address, pod CIDR | told at once | told when it lasts |
/// | peer | told at once | when it lasts; never once the node was ready for a while, for then pods that are here serve on |
///
/// The sentences in `not_ready` always say how it is.
#[derive(Clone, Debug, Default)]
pub struct Teller {
    told: Option<PodFacts>,
    /// Since when what was told to be there is missing, for each of [`FIELDS`].
    missing_since: [Option<Instant>; 3],
    /// Since when nothing is missing.
    whole_since: Option<Instant>,
    /// Nothing was missing for a while in this boot (what was told goes with a reboot, and with another name).
    was_whole: bool,
    /// When to write again what could not be written.
    retry_at: Option<Instant>,
}

/// The conditions of [`Ready`].
const FIELDS: [fn(&mut Ready) -> &mut bool; 3] =
    [|ready| &mut ready.mesh_address, |ready| &mut ready.pod_cidr, |ready| &mut ready.peer];

impl Teller {
    /// After a start; `told`: what stands in the file.
    pub fn new(told: Option<PodFacts>) -> Self {
        let was_whole = told.as_ref().is_some_and(|told| told.ready.all());
        Self { told, was_whole, ..Self::default() }
    }

    /// What to write, if anything.
    pub fn tell(&mut self, mut facts: PodFacts, now: Instant) -> Option<PodFacts> {
        if self.told.as_ref().is_some_and(|told| told.node != facts.node) {
            *self = Self::default();
        }
        self.remember(facts.ready, now);
        facts.ready.peer |= self.was_whole;
        if let Some(told) = self.told.clone() {
            self.wait_with_bad_news(&mut facts, told, now);
        }
        let retries = self.retry_at.is_some_and(|at| now >= at);
        if self.told.as_ref() == Some(&facts) && !retries {
            return None;
        }
        self.retry_at = None;
        self.told = Some(facts.clone());
        Some(facts)
    }

    /// What was to be written could not be.
    pub fn not_written(&mut self, now: Instant) {
        self.retry_at = Some(now + PATIENCE);
    }

    /// When to look again though nothing changed: bad news that waits, or what could not be written.
    pub fn again_at(&self) -> Option<Instant> {
        let missing = self.missing_since.iter().flatten().min().map(|since| *since + PATIENCE);
        missing.into_iter().chain(self.retry_at).min()
    }

    /// Peers count as reached for a moment after a start, while none is tried: only what lasted is remembered.
    fn remember(&mut self, ready: Ready, now: Instant) {
        self.was_whole |= self.whole_since.is_some_and(|since| now.saturating_duration_since(since) >= PATIENCE);
        self.whole_since = ready.all().then(|| self.whole_since.unwrap_or(now));
    }

    fn wait_with_bad_news(&mut self, facts: &mut PodFacts, mut told: PodFacts, now: Instant) {
        for (field, since) in FIELDS.into_iter().zip(&mut self.missing_since) {
            let lost = *field(&mut told.ready) && !*field(&mut facts.ready);
            *since = lost.then(|| since.unwrap_or(now));
            if since.is_some_and(|since| now.saturating_duration_since(since) < PATIENCE) {
                *field(&mut facts.ready) = true;
            } else {
                *since = None;
            }
        }
        if self.missing_since.iter().all(Option::is_none) {
            return;
        }
        // What is not known yet after a start is no news either.
        for (here, before) in [(&mut facts.pod_cidrs, told.pod_cidrs), (&mut facts.cluster_cidrs, told.cluster_cidrs)] {
            if here.is_empty() {
                *here = before;
            }
        }
        if facts.mesh_addresses.is_empty() {
            facts.mesh_addresses = told.mesh_addresses;
        }
    }
}

/// The file, and what stands in it.
#[derive(Debug)]
pub struct FactsFile {
    path: PathBuf,
    teller: Teller,
}

impl FactsFile {
    /// What cannot be read counts as nothing.
    pub fn open(path: PathBuf) -> Self {
        let told = PodFacts::read(&path).ok();
        Self { path, teller: Teller::new(told) }
    }

    /// Writes what is due.
    pub fn update(&mut self, status: &Status, now: Instant) {
        let Some(due) = facts(status).and_then(|facts| self.teller.tell(facts, now)) else { return };
        if let Err(error) = due.write(&self.path) {
            self.teller.not_written(now);
            tracing::error!(path = %self.path.display(), %error, "the facts for pods are not written");
        }
    }

    /// When to look again though nothing changed.
    pub fn again_at(&self) -> Option<Instant> {
        self.teller.again_at()
    }

    /// Takes the file away: the node has left.
    pub fn remove(path: &Path) {
        let _ = std::fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::tests::sample;

    #[test]
    fn a_node_that_has_everything_is_ready_and_tells_what_is_inside_of_the_cluster() {
        let mut status = sample();
        status.peers[0].pod_cidrs = vec!["10.42.1.0/24".parse().unwrap()];
        let facts = facts(&status).unwrap();
        assert!(facts.ready.all() && facts.not_ready.is_empty(), "{facts:?}");
        assert_eq!((facts.node.as_str(), facts.mtu), ("home", 1280));
        assert_eq!(facts.pod_cidrs, status.node.pod_cidrs);
        let inside = |net: &str| facts.cluster_cidrs.iter().any(|one| one.contains(&net.parse::<IpNet>().unwrap()));
        assert!(inside("10.98.0.0/16") && inside("10.42.0.0/24") && inside("10.42.1.0/24") && !inside("10.43.0.0/24"));
    }

    #[test]
    fn whatever_is_missing_has_its_sentence() {
        let mut status = sample();
        status.node.approval = Approval::Pending;
        status.node.approval_reason = Some("nobody has approved it yet".into());
        status.node.pod_cidrs.clear();
        status.peers.iter_mut().for_each(|peer| peer.path = "none".into());
        let facts = facts(&status).unwrap();
        assert_eq!(facts.ready, Ready::default());
        for (sentence, part) in facts.not_ready.iter().zip(["nobody has approved it", "spec.podCIDRs", "no peer"]) {
            assert!(sentence.contains(part), "{sentence}");
        }
        assert_eq!(facts.not_ready.len(), 3);
        status.node.name = None;
        assert_eq!(super::facts(&status), None, "plain peers alone are no pod network");
    }

    #[test]
    fn peers_count_as_reached_when_one_is_or_none_is_tried() {
        let peers = |paths: &[(&str, bool)]| {
            let of = |(path, spoken): &(&str, bool)| {
                let mut peer = sample().peers[0].clone();
                (peer.path, peer.last_handshake_s) = ((*path).to_owned(), spoken.then_some(1.0));
                peer
            };
            peers_are_reached(&paths.iter().map(of).collect::<Vec<_>>())
        };
        for (paths, reached) in [
            (&[][..], true),
            (&[("direct", true), ("none", false)], true),
            (&[("relayed", false), ("idle", false)], true),
            (&[("idle", true), ("none", false)], true),
            (&[("idle", false)], true),
            (&[("idle", false), ("none", false)], false),
            (&[("none", true)], false),
        ] {
            assert_eq!(peers(paths), reached, "{paths:?}");
        }
    }

    fn without_peer(good: &PodFacts) -> PodFacts {
        let ready = Ready { peer: false, ..good.ready };
        PodFacts { ready, not_ready: vec!["no peer".into()], ..good.clone() }
    }

    #[test]
    fn bad_news_is_told_when_it_lasts_and_good_news_at_once() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let ready = |facts: &Option<PodFacts>| facts.as_ref().map(|facts| facts.ready);
        let good = facts(&sample()).unwrap();
        let bad = without_peer(&good);

        let mut fresh = Teller::default();
        assert_eq!(fresh.tell(bad.clone(), at(0)), Some(bad.clone()), "a node that starts is not ready at once");
        assert_eq!(fresh.tell(good.clone(), at(1)), Some(good.clone()));
        let waits = fresh.tell(bad.clone(), at(2)).unwrap();
        assert!(waits.ready.all() && waits.not_ready == bad.not_ready, "people see it at once");
        assert_eq!(fresh.tell(good.clone(), at(5)), Some(good.clone()), "it was a moment");
        assert_eq!(ready(&fresh.tell(bad.clone(), at(6))), Some(good.ready));
        assert_eq!(fresh.again_at(), Some(at(16)));
        assert_eq!(fresh.tell(bad.clone(), at(16)), Some(bad.clone()));
        assert_eq!(fresh.again_at(), None);
        assert_eq!(fresh.tell(good.clone(), at(17)), Some(good.clone()));

        // A daemon that starts again knows nothing for a moment.
        let mut nothing = bad.clone();
        (nothing.ready, nothing.not_ready) = (Ready::default(), vec![]);
        (nothing.pod_cidrs, nothing.mesh_addresses, nothing.cluster_cidrs) = (vec![], vec![], vec![]);
        let mut restarted = Teller::new(Some(good));
        assert_eq!(restarted.tell(nothing.clone(), at(20)), None);
        nothing.mtu = 1400;
        let told = restarted.tell(nothing, at(21)).unwrap();
        assert!(told.mtu == 1400 && told.ready.all(), "what else changes is told all the same");
    }

    #[test]
    fn a_peer_that_is_lost_after_the_node_was_ready_is_told_to_people_alone() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let good = facts(&sample()).unwrap();
        let bad = without_peer(&good);
        let mut running = Teller::default();
        let _told = running.tell(good.clone(), at(0));
        for mut teller in [running, Teller::new(Some(good.clone()))] {
            let told = teller.tell(bad.clone(), at(100)).unwrap();
            assert!(told.ready.all() && told.not_ready == bad.not_ready);
            assert_eq!((teller.tell(bad.clone(), at(1000)), teller.again_at()), (None, None));
            // A mesh address that is lost counts, the peer all the same not.
            let mut address = bad.clone();
            address.ready.mesh_address = false;
            assert_eq!(teller.tell(address.clone(), at(2000)), None);
            let told = teller.tell(address, at(2010)).unwrap();
            assert_eq!(told.ready, Ready { mesh_address: false, ..good.ready });
            let mut renamed = bad.clone();
            renamed.node = "another".into();
            assert!(!teller.tell(renamed, at(3000)).unwrap().ready.peer, "that one never had a peer");
        }
    }

    #[test]
    fn a_node_without_a_pod_cidr_has_patience_too() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut good = facts(&sample()).unwrap();
        good.ready.pod_cidr = false;
        let bad = without_peer(&good);
        let mut teller = Teller::default();
        let _told = teller.tell(good.clone(), at(0));
        assert!(teller.tell(bad.clone(), at(100)).unwrap().ready.peer);
        assert_eq!(teller.again_at(), Some(at(110)));
        assert!(!teller.tell(bad, at(110)).unwrap().ready.peer);
    }

    #[test]
    fn what_could_not_be_written_is_due_again_though_nothing_changed() {
        let directory = tempfile::tempdir().unwrap();
        let run = directory.path().join("run");
        std::fs::write(&run, "a file where a directory should be").unwrap();
        let mut file = FactsFile::open(run.join(FILE));
        let start = Instant::now();
        file.update(&sample(), start);
        let again_at = file.again_at().unwrap();
        std::fs::remove_file(&run).unwrap();
        file.update(&sample(), start);
        assert!(!run.exists(), "not with every change");
        file.update(&sample(), again_at);
        assert_eq!(PodFacts::read(&run.join(FILE)).unwrap(), facts(&sample()).unwrap());
        assert_eq!(file.again_at(), None);
    }
}
