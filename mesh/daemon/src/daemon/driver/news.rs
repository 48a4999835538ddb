//! What the registry says: of the network, of the others, and of this node.

use std::time::Instant;

use keystone_mesh_core::network::SignedNetwork;
use keystone_mesh_core::node::{Entry, SignedApproval};
use keystone_mesh_core::plain_peer::SignedPlainPeer;

use super::{Driver, GATEWAY_OBSERVER, RegistryState};
use crate::registry::{self, Event};
use crate::state::Membership;

/// Events of the registry that are handed to the machine in one go. As many as a registry keeps for a slow reader; data
/// plane and control socket wait meanwhile, some milliseconds.
const EVENTS_AT_ONCE: usize = registry::backend::CHANGES;

impl Driver {
    /// With what waits behind it: the machine then makes one plan of all of it.
    pub(super) fn registry_events(&mut self, first: Event) -> anyhow::Result<()> {
        self.registry_event(first)?;
        for _ in 1..EVENTS_AT_ONCE {
            let Some(event) = self.uplink.registry.as_mut().and_then(|registry| registry::waiting(&mut **registry))
            else {
                break;
            };
            self.registry_event(event)?;
        }
        Ok(())
    }

    fn registry_event(&mut self, event: Event) -> anyhow::Result<()> {
        let now = Instant::now();
        match event {
            Event::Joined(approval) => self.approved(&approval)?,
            Event::Snapshot { network, entries, peers } => {
                (self.registry_state, self.registry_since) = (RegistryState::Current, now);
                self.registry_heard = true;
                self.everything(network, entries, peers)?;
            }
            Event::Changed(entry) => {
                self.own_entry(&entry)?;
                self.mesh.handle_entry(*entry);
            }
            Event::Removed(name) => self.mesh.handle_removed(&name),
            Event::PeerChanged(peer) => self.mesh.handle_peer(*peer),
            Event::PeerRemoved(name) => self.mesh.handle_peer_removed(&name),
            Event::Network(network) => self.network(network),
            Event::Observed(seen) => self.mesh.handle_observed(GATEWAY_OBSERVER, seen, now),
            Event::Stale { why } => {
                match self.registry_state {
                    RegistryState::Stale(_) => tracing::debug!(why, "the registry is still not heard"),
                    RegistryState::None | RegistryState::Waiting | RegistryState::Current => {
                        self.registry_since = now;
                        self.counts.registry_losses += 1;
                        tracing::warn!(why, "the registry is not heard; what is known stays in force");
                    }
                }
                self.registry_state = RegistryState::Stale(why);
            }
            Event::Refused(refusal) => anyhow::bail!("the control plane refused: {}", refusal.message),
        }
        Ok(())
    }

    /// What the network says of this node. The first word makes it a member.
    fn approved(&mut self, approval: &SignedApproval) -> anyhow::Result<()> {
        let (own, said) = (self.start.secret.identity().id(), approval.get());
        let (Some(network), Some(name)) = (self.start.network, self.start.name.clone()) else { return Ok(()) };
        if said.identity != own || said.name != name || said.is_revoked() {
            return Ok(());
        }
        anyhow::ensure!(
            said.network == network,
            "the registry answered with an approval of another network; nothing was changed"
        );
        if self.start.membership.is_none() {
            let rendezvous = self.start.token.as_ref().map(|token| token.rendezvous.clone()).unwrap_or_default();
            let approval = Some(approval.clone());
            let membership = Membership { network, name: name.clone(), control_plane: false, rendezvous, approval };
            self.start.state.set_membership(&membership)?;
            let addresses = keystone_mesh_core::facts::join(&said.addresses, " ");
            tracing::info!(node = %name, network = %membership.network, addresses, "joined");
            self.start.membership = Some(membership);
        }
        self.uplink.set_approval(approval);
        Ok(())
    }

    /// This node as others see it.
    fn own_entry(&mut self, entry: &Entry) -> anyhow::Result<()> {
        let record = entry.record.get();
        if record.identity != self.start.secret.identity().id() {
            return Ok(());
        }
        if record.seq > self.last_seq {
            self.last_seq = record.seq;
            // A word of ours from before, or from a copy of this machine: the latest has to be this one's.
            if let Some(said) = self.published.clone().filter(|said| !said.says_the_same_as(record)) {
                self.publish(said);
            }
        }
        entry.approval.as_ref().map_or(Ok(()), |approval| self.approved(approval))
    }

    pub(super) fn everything(
        &mut self,
        network: SignedNetwork,
        entries: Vec<Entry>,
        peers: Vec<SignedPlainPeer>,
    ) -> anyhow::Result<()> {
        if !self.is_ours(&network) {
            return Ok(());
        }
        self.follow_network(&network);
        let own = self.start.secret.identity().id();
        if let Some(entry) = entries.iter().find(|entry| entry.record.get().identity == own) {
            self.own_entry(entry)?;
        }
        self.mesh.handle_snapshot(network.get().clone(), entries, peers);
        self.signed_network = Some(network);
        Ok(())
    }

    fn network(&mut self, network: SignedNetwork) {
        if self.is_ours(&network) {
            self.follow_network(&network);
            self.mesh.handle_network(network.get().clone());
            self.signed_network = Some(network);
        }
    }

    /// Whatever a gateway says, only the pinned network's document counts.
    fn is_ours(&self, network: &SignedNetwork) -> bool {
        let ours = Some(network.get().id) == self.start.network;
        if !ours {
            tracing::error!(network = %network.get().id, "a document of another network was offered and is not used");
        }
        ours
    }

    fn follow_network(&self, network: &SignedNetwork) {
        self.uplink.set_rendezvous(network.get().rendezvous());
        self.keeper.set_excluded(network.get().prefixes().to_vec());
    }
}
