//! What the CLI and the agent's pod ask for over the control socket.

use std::time::Instant;

use tokio::sync::oneshot;

use super::super::report;
use super::Driver;
use crate::cni::service::PodService;
use crate::control::{Answer, Call, Request};
use crate::kube_api::access::Grant;
use crate::member;
use crate::registry::kubernetes::hub::Known;

impl Driver {
    /// Answers a call; where the node has left by it, gives back whom to answer in the end.
    pub(super) async fn call(&mut self, call: Call) -> Option<oneshot::Sender<Answer>> {
        let Call { request, answer } = call;
        let said = match request {
            Request::Status => Answer::Status(Box::new(report::status(self, Instant::now()))),
            Request::Conditions => {
                let asked = self.uplink.registry.as_ref().and_then(|registry| registry.conditions());
                let Some(asked) = asked else {
                    let _ = answer.send(Answer::Conditions { conditions: Vec::new() });
                    return None;
                };
                // Kubernetes may take a while; the mesh does not wait for it.
                tokio::spawn(async move {
                    answer.send(match asked.await {
                        Ok(conditions) => Answer::Conditions { conditions },
                        Err(message) => failed(message),
                    })
                });
                return None;
            }
            Request::Connect { name } => match self.mesh.peer_named(&name) {
                Some(key) => {
                    self.mesh.handle_demand(&key, Instant::now());
                    Answer::Done
                }
                None => failed(format!("there is no peer `{name}`")),
            },
            Request::Leave { force } => match self.leave(force).await {
                Ok(()) => return Some(answer),
                Err(message) => failed(message),
            },
            request @ (Request::TokenCreate { .. }
            | Request::TokenList
            | Request::TokenRevoke { .. }
            | Request::Remove { .. }) => match self.uplink.backend.clone() {
                Some(backend) => {
                    // Kubernetes may take a while; the mesh does not wait for it.
                    tokio::spawn(async move { answer.send(member::answer(&*backend, request).await) });
                    return None;
                }
                None => failed("this machine is not the control plane of its network; run this on that host".into()),
            },
            Request::UseKubernetes { grant } => self.use_kubernetes(grant),
            Request::ServePods { service } => {
                self.serve_pods(service);
                Answer::Done
            }
            Request::WithdrawKubernetes => {
                if let Some(handover) = self.uplink.handover() {
                    handover.withdraw();
                }
                Answer::Done
            }
        };
        let _ = answer.send(said);
        None
    }

    fn use_kubernetes(&mut self, grant: Grant) -> Answer {
        if let Some(name) = self.start.name.as_ref().filter(|name| name.as_str() != grant.node) {
            return failed(format!(
                "this machine is `{name}` in the mesh and `{}` in Kubernetes; for its record to stand on its own Node both have to \
                 be one: leave, and join again with --name {}",
                grant.node, grant.node
            ));
        }
        let Self { uplink, mesh, signed_network, .. } = self;
        // A daemon with access of its own, as the control plane's, needs no other.
        if let Some(handover) = uplink.handover() {
            let (_, entries, peers) = mesh.known();
            let network = signed_network.clone();
            handover.grant(grant, || Known {
                network,
                entries: entries.cloned().collect(),
                peers: peers.cloned().collect(),
            });
        }
        Answer::Done
    }

    async fn leave(&mut self, force: bool) -> Result<(), String> {
        if let Some(registry) = &mut self.uplink.registry
            && let Err(why) = registry.leave().await
        {
            if !force {
                return Err(format!(
                    "the control plane was not told ({why}), so this node would stay in its list; try again, or clean up here \
                     alone with --force and run `keystone-mesh remove` there"
                ));
            }
            tracing::warn!(why, "the control plane was not told; remove this node there");
        }
        self.start.membership = None;
        // First what is still to be written, so that it does not come back.
        if let Some(saver) = self.saver.take() {
            saver.finish().await;
        }
        self.start.state.forget().map_err(|error| error.to_string())
    }

    /// The agent's pod says how pods are served. What this daemon was started with comes first.
    fn serve_pods(&mut self, service: PodService) {
        let Some(told) = self.pods.told.as_ref().filter(|_| self.pods.service != service) else { return };
        tracing::info!(mode = ?service.mode, routes = service.routes, policies = service.policies, "pods are served");
        told.write(service);
        let policies_change = self.pods.service.policies != service.policies;
        self.pods.service = service;
        self.mesh.set_pod_routes(service.routes);
        self.facts_due = true;
        if policies_change {
            self.enforce_policies();
        }
    }
}

fn failed(message: String) -> Answer {
    Answer::Failed { message }
}
