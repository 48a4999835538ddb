//! Events for people, through events.k8s.io.
//!
//! One task publishes them one after another: an Event tells of what is done already, so nothing waits for it, and when
//! too many come at once the oldest are worth more than the newest. The same thing said again within some minutes
//! counts up the first Event (its series) and makes no second.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event as KubeEvent;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use keystone_mesh_api::CONTROLLER_MANAGER;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::mpsc;

use crate::decide::{Event, Regarding};
use crate::metrics::{ErrorLabels, Metrics};
use keystone_mesh_api::errors::words;

/// Events that wait; more are dropped and counted. A burst of 200 nodes brings some hundreds.
const CHANNEL: usize = 1024;
/// The same Event within this time counts up.
const SERIES: Duration = Duration::from_secs(360);
/// Events of objects without a namespace live here.
const NAMESPACE: &str = "default";
/// Most bytes of a note (the API's own limit).
const NOTE: usize = 1024;
/// Most characters of the reporting instance (the API's own limit).
const INSTANCE: usize = 128;

/// Where events are handed in.
#[derive(Clone, Debug)]
pub struct Recorder {
    events: mpsc::Sender<Event>,
    metrics: Metrics,
}

impl Recorder {
    /// Starts the task that publishes, in the name of the replica `instance`. It ends when every recorder is gone.
    pub fn start(client: Client, instance: String, metrics: Metrics) -> Self {
        let (events, receiver) = mpsc::channel(CHANNEL);
        tokio::spawn(publish(client, instance, receiver, metrics.clone()));
        Self { events, metrics }
    }

    /// Hands an event in. Never waits.
    pub fn record(&self, event: Event) {
        if self.events.try_send(event).is_err() {
            self.metrics.api_errors.get_or_create(&ErrorLabels { during: "event", code: "dropped".into() }).inc();
        }
    }
}

struct Published {
    name: String,
    count: i32,
    at: Instant,
}

async fn publish(client: Client, instance: String, mut events: mpsc::Receiver<Event>, metrics: Metrics) {
    let api = Api::<KubeEvent>::namespaced(client, NAMESPACE);
    let mut published: BTreeMap<u64, Published> = BTreeMap::new();
    while let Some(event) = events.recv().await {
        let now = Instant::now();
        published.retain(|_, event| now < event.at + SERIES);
        let digest = digest(&event);
        let result = if let Some(before) = published.get_mut(&digest) {
            before.count += 1;
            before.at = now;
            let series = json!({"series": {"count": before.count, "lastObservedTime": MicroTime(Timestamp::now())}});
            api.patch(&before.name, &PatchParams::default(), &Patch::Merge(series)).await
        } else {
            let made = to_kube(&event, digest, &instance, Timestamp::now());
            let name = made.metadata.name.clone().unwrap_or_default();
            published.insert(digest, Published { name, count: 1, at: now });
            api.create(&PostParams::default(), &made).await
        };
        if let Err(error) = result {
            published.remove(&digest);
            let code = if let kube::Error::Api(status) = &error { status.code.to_string() } else { "none".into() };
            metrics.api_errors.get_or_create(&ErrorLabels { during: "event", code }).inc();
            tracing::debug!(
                error = words(&error),
                reason = event.reason,
                object = event.name,
                "an event could not be published"
            );
        }
    }
}

fn digest(event: &Event) -> u64 {
    let mut hasher = DefaultHasher::new();
    (std::mem::discriminant(&event.regarding), &event.name, &event.uid, event.warning, event.reason, &event.note)
        .hash(&mut hasher);
    hasher.finish()
}

fn to_kube(event: &Event, digest: u64, instance: &str, now: Timestamp) -> KubeEvent {
    let (api_version, kind) = match event.regarding {
        Regarding::Node => ("v1", "Node"),
        Regarding::Member => ("mesh.keystone.cluster/v1alpha1", "Member"),
        Regarding::Peer => ("mesh.keystone.cluster/v1alpha1", "Peer"),
        Regarding::JoinToken => ("mesh.keystone.cluster/v1alpha1", "JoinToken"),
    };
    // A name has 253 characters at most, and a node's may have as many.
    let prefix: String = event.name.chars().take(200).collect();
    KubeEvent {
        metadata: ObjectMeta {
            name: Some(format!("{}.{:x}{digest:016x}", prefix.trim_end_matches(['-', '.']), now.as_microsecond())),
            namespace: Some(NAMESPACE.to_owned()),
            ..ObjectMeta::default()
        },
        regarding: Some(ObjectReference {
            api_version: Some(api_version.to_owned()),
            kind: Some(kind.to_owned()),
            name: Some(event.name.clone()),
            uid: Some(event.uid.clone()),
            ..ObjectReference::default()
        }),
        event_time: Some(MicroTime(now)),
        reporting_controller: Some(CONTROLLER_MANAGER.to_owned()),
        reporting_instance: Some(instance.chars().take(INSTANCE).collect()),
        action: Some(event.reason.to_owned()),
        reason: Some(event.reason.to_owned()),
        type_: Some(if event.warning { "Warning" } else { "Normal" }.to_owned()),
        note: Some(event.note[..event.note.floor_char_boundary(NOTE)].to_owned()),
        ..KubeEvent::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_of_the_longest_name_and_note_keeps_the_limits() {
        let event = Event {
            regarding: Regarding::Node,
            name: "a.".repeat(126) + "a",
            uid: "u".into(),
            warning: true,
            reason: "IdentityChanged",
            note: "ü".repeat(2000),
        };
        let made = to_kube(&event, u64::MAX, &"i".repeat(300), Timestamp::MAX);
        let name = made.metadata.name.unwrap();
        assert!(name.len() <= 253 && !name.contains(".."), "{name}");
        assert!(made.note.unwrap().len() <= NOTE);
        assert_eq!(made.reporting_instance.unwrap().len(), INSTANCE);
    }
}
