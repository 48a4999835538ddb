//! From the gateway to Kubernetes and back, without a moment in between.
//!
//! ```text
//!            access granted, everything heard
//!   gateway ─────────────────────────────────► kubernetes
//!      ▲                                           │
//!      └───────────────────────────────────────────┘
//!        access ended or refused, or the own node gone; everything heard
//! ```
//!
//! The registry in force stays until the other one has told everything, so readers see one snapshot follow another and
//! nothing is taken away in between. Granted access is renewed by whoever granted it; without a renewal it ends.

use std::sync::Arc;
use std::time::Duration;

use keystone_mesh_core::NodeId;
use keystone_mesh_core::node::{NodeName, SignedRecord};
use tokio::sync::watch;
use zeroize::Zeroizing;

use super::kubernetes::KubernetesRegistry;
use super::kubernetes::hub::{Heard, Hub, Known, Start};
use super::{Answer, Event, Faults, Registry, Writes};
use crate::clock::unix_now;
use crate::kube_api::access::{Access, Grant};
use crate::kube_api::watch::Pace;
use crate::status::Condition;

/// Access that does not say when it ends is given so long. It is renewed every few seconds.
const UNTOLD_LIFE: Duration = Duration::from_secs(3600);
/// How often the end of access is looked at: it is a point in wall-clock time, which jumps after a suspend.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Opens a session with the gateway.
pub type OpenGateway = Box<dyn FnMut() -> Box<dyn Registry> + Send>;

/// Which registry is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The gateway.
    Gateway,
    /// Kubernetes, with granted access.
    Kubernetes,
}

impl Kind {
    /// The word for status.
    pub fn label(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Kubernetes => "kubernetes",
        }
    }
}

/// Who this node is.
#[derive(Clone, Debug)]
pub struct Own {
    /// The network key, pinned.
    pub network: NodeId,
    /// Its name.
    pub name: NodeName,
    /// Its identity.
    pub identity: NodeId,
    /// Different daemons take different seeds.
    pub seed: u64,
}

struct Granted {
    grants: watch::Sender<Grant>,
    heard: watch::Receiver<Heard>,
}

/// A registry that is the gateway, and Kubernetes while there is access.
pub struct Handover {
    own: Own,
    open_gateway: OpenGateway,
    current: (Kind, Box<dyn Registry>),
    /// What takes over once it has told everything.
    next: Option<(Kind, Box<dyn Registry>)>,
    granted: Option<Granted>,
    /// The access of that, for whoever else has a use for it.
    access: watch::Sender<Option<Access>>,
    /// The token that the API server did not accept: it is not tried again.
    refused: Option<Zeroizing<String>>,
    record: Option<SignedRecord>,
}

impl Handover {
    /// Begins with the gateway.
    pub fn new(own: Own, mut open_gateway: OpenGateway) -> Self {
        let gateway = open_gateway();
        Self {
            own,
            open_gateway,
            current: (Kind::Gateway, gateway),
            next: None,
            granted: None,
            access: watch::Sender::new(None),
            refused: None,
            record: None,
        }
    }

    /// The access that is granted, while it is.
    pub fn access(&self) -> watch::Receiver<Option<Access>> {
        self.access.subscribe()
    }

    /// Access was granted, or renewed. `known` is asked for what is known, where it begins.
    pub fn grant(&mut self, grant: Grant, known: impl FnOnce() -> Known) {
        if self.refused.as_ref() == Some(&grant.token) {
            return;
        }
        self.refused = None;
        let expires = grant.expires.unwrap_or_else(|| unix_now().saturating_add(UNTOLD_LIFE.as_secs()));
        let grant = Grant { expires: Some(expires), ..grant };
        if let Some(granted) = &self.granted {
            granted.grants.send_if_modified(|old| std::mem::replace(old, grant.clone()) != grant);
            return;
        }
        let (grants, latest) = watch::channel(grant);
        let access = Access::granted(latest);
        self.access.send_replace(Some(access.clone()));
        let hub = Arc::new(Hub::start(Start {
            access,
            network: self.own.network,
            known: known(),
            founder: false,
            first: None,
            pace: Pace::default(),
            seed: self.own.seed,
        }));
        self.granted = Some(Granted { grants, heard: hub.heard() });
        let registry = KubernetesRegistry::new(hub, self.own.name.clone(), self.own.identity);
        self.begin(Kind::Kubernetes, Box::new(registry));
    }

    /// Access was taken back.
    pub fn withdraw(&mut self) {
        self.back("access to Kubernetes was withdrawn");
        self.refused = None;
    }

    fn begin(&mut self, kind: Kind, mut registry: Box<dyn Registry>) {
        if let Some(record) = &self.record {
            registry.publish(record.clone());
        }
        self.next = Some((kind, registry));
    }

    fn back(&mut self, why: &str) {
        let Some(Granted { grants, .. }) = self.granted.take() else { return };
        self.access.send_replace(None);
        self.refused = Some(grants.borrow().token.clone());
        tracing::info!(why, "back to the gateway");
        match self.current.0 {
            // It never was in force: the gateway still is.
            Kind::Gateway => self.next = None,
            Kind::Kubernetes => {
                let gateway = (self.open_gateway)();
                self.begin(Kind::Gateway, gateway);
            }
        }
    }

    async fn event(&mut self) -> Event {
        loop {
            let ended = async {
                match &mut self.granted {
                    Some(granted) => granted.ended().await,
                    None => std::future::pending().await,
                }
            };
            let next = async {
                match &mut self.next {
                    Some((_, registry)) => registry.next().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                why = ended => self.back(&why),
                event = next => {
                    if let Some(event) = self.of_next(event) {
                        return event;
                    }
                }
                event = self.current.1.next() => {
                    if let Event::Removed(name) = &event
                        && *name == self.own.name
                    {
                        self.back("this node's Node was deleted");
                    }
                    return event;
                }
            }
        }
    }

    /// What the one that waits says: with everything told it is in force.
    fn of_next(&mut self, event: Event) -> Option<Event> {
        match event {
            Event::Snapshot { .. } => {
                self.current = self.next.take()?;
                tracing::info!(registry = self.current.0.label(), "the registry was changed over");
                Some(event)
            }
            Event::Refused(_) => {
                // The gateway says that this node is out of the network, which is so whoever else is asked.
                self.current = self.next.take()?;
                Some(event)
            }
            Event::Stale { why } => {
                tracing::debug!(why, "the other registry is not heard yet");
                None
            }
            Event::Joined(_)
            | Event::Changed(_)
            | Event::Removed(_)
            | Event::PeerChanged(_)
            | Event::PeerRemoved(_)
            | Event::Network(_)
            | Event::Observed(_) => None,
        }
    }
}

impl Granted {
    /// Waits until the access is of no use any more, and says why. Cancel-safe.
    async fn ended(&mut self) -> String {
        loop {
            if self.grants.borrow().expires.is_some_and(|expires| unix_now() >= expires) {
                return "access to Kubernetes expired and was not renewed".into();
            }
            if let Heard::Unauthorized(why) = &*self.heard.borrow_and_update() {
                return format!("access to Kubernetes is refused: {why}");
            }
            tokio::select! {
                changed = self.heard.changed() => if changed.is_err() {
                    return "Kubernetes is not heard any more".into();
                },
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }
}

impl Registry for Handover {
    fn publish(&mut self, record: SignedRecord) {
        self.current.1.publish(record.clone());
        if let Some((_, next)) = &mut self.next {
            next.publish(record.clone());
        }
        self.record = Some(record);
    }

    fn next(&mut self) -> Answer<'_, Event> {
        Box::pin(self.event())
    }

    fn leave(&mut self) -> Answer<'_, Result<(), String>> {
        self.current.1.leave()
    }

    fn kind(&self) -> &'static str {
        self.current.0.label()
    }

    fn handover(&mut self) -> Option<&mut Handover> {
        Some(self)
    }

    fn network_changed(&mut self) {
        self.current.1.network_changed();
        if let Some((_, next)) = &mut self.next {
            next.network_changed();
        }
    }

    fn warnings(&self) -> Vec<String> {
        self.current.1.warnings()
    }

    fn faults(&self) -> Faults {
        self.current.1.faults()
    }

    fn conditions(&self) -> Option<Answer<'static, Result<Vec<Condition>, String>>> {
        self.current.1.conditions()
    }

    fn writes(&self) -> Option<Writes> {
        self.current.1.writes()
    }
}
