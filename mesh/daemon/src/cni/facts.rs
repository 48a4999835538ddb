//! What the plugin has to know, out of what the daemon knows.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use keystone_cni::facts::{PodFacts, Ready, VERSION};

use crate::status::{Approval, Peer, Status};

/// For so long a node that was ready has to be without what it needs before that is told: a path that changes, and a
/// daemon that starts again, must not turn the node unready for a second.
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

/// Decides when facts are written.
#[derive(Clone, Debug, Default)]
pub struct Teller {
    told: Option<PodFacts>,
    unready_since: Option<Instant>,
}

impl Teller {
    /// After a start; `told`: what stands in the file.
    pub fn new(told: Option<PodFacts>) -> Self {
        Self { told, unready_since: None }
    }

    /// What to write, if anything.
    pub fn tell(&mut self, mut facts: PodFacts, now: Instant) -> Option<PodFacts> {
        let before = self.told.as_ref().filter(|told| told.node == facts.node);
        let turns_bad = before.is_some_and(|told| told.ready.all()) && !facts.ready.all();
        if turns_bad {
            let since = *self.unready_since.get_or_insert(now);
            if now.saturating_duration_since(since) < PATIENCE {
                (facts.ready, facts.not_ready) = (Ready { mesh_address: true, pod_cidr: true, peer: true }, Vec::new());
                // What is not known yet after a start is no news either.
                let before = before?;
                for (new, old) in
                    [(&mut facts.pod_cidrs, &before.pod_cidrs), (&mut facts.cluster_cidrs, &before.cluster_cidrs)]
                {
                    if new.is_empty() {
                        new.clone_from(old);
                    }
                }
                if facts.mesh_addresses.is_empty() {
                    facts.mesh_addresses.clone_from(&before.mesh_addresses);
                }
            }
        } else {
            self.unready_since = None;
        }
        if self.told.as_ref() == Some(&facts) {
            return None;
        }
        self.told = Some(facts.clone());
        Some(facts)
    }

    /// When to look again though nothing changed: bad news that waits.
    pub fn again_at(&self) -> Option<Instant> {
        self.unready_since.map(|since| since + PATIENCE)
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
            // It is tried again with the next change.
            self.teller = Teller::default();
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

    #[test]
    fn bad_news_is_told_when_it_lasts_and_good_news_at_once() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let good = facts(&sample()).unwrap();
        let mut bad = good.clone();
        (bad.ready.peer, bad.not_ready) = (false, vec!["no peer".into()]);

        let mut fresh = Teller::default();
        assert_eq!(fresh.tell(bad.clone(), at(0)), Some(bad.clone()), "a node that starts is not ready at once");
        assert_eq!(fresh.tell(good.clone(), at(1)), Some(good.clone()));
        assert_eq!(fresh.tell(bad.clone(), at(2)), None);
        assert_eq!(fresh.tell(good.clone(), at(5)), None, "it was a moment");
        assert_eq!((fresh.tell(bad.clone(), at(6)), fresh.again_at()), (None, Some(at(16))));
        assert_eq!(fresh.tell(bad.clone(), at(16)), Some(bad.clone()));
        assert_eq!(fresh.tell(good.clone(), at(17)), Some(good.clone()));

        // A daemon that starts again knows nothing for a moment.
        let mut nothing = bad.clone();
        (nothing.pod_cidrs, nothing.mesh_addresses, nothing.cluster_cidrs) = (vec![], vec![], vec![]);
        let mut restarted = Teller::new(Some(good));
        assert_eq!(restarted.tell(nothing, at(20)), None);
        let mut more = bad;
        more.mtu = 1400;
        let told = restarted.tell(more, at(21)).unwrap();
        assert!(told.mtu == 1400 && told.ready.all(), "what else changes is told all the same");
    }
}
