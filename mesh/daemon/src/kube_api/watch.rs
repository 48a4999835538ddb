//! A collection that is kept watched for ever.
//!
//! ```text
//!        ┌──────────── 410 Gone ────────────┐
//!        ▼                                  │
//!   list, page by page ──► watch from there ┴─► ends (its time is over, the server goes) ──► watch from the last version
//!        ▲                      │
//!        └─ told at each failure, pause ◄── silent for minutes: neither an event nor a bookmark
//! ```
//!
//! Of each object only what is read is kept: what that is, its type says. For the mesh it is an [`Object`]: its name, its
//! version, our annotations, and a ConfigMap's data. The rest (managedFields are most of a Node's metadata) is skipped
//! while it is parsed, and an object that does not parse is told and skipped by itself. No clock of the server is read.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::pin::pin;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use keystone_mesh_core::annotations::PREFIX;
use keystone_mesh_core::backoff::Backoff;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::core::Request;
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, IgnoredAny, MapAccess, Visitor};
use tokio::sync::mpsc;

use super::access::Access;
use super::{status_code, words};

/// Objects in one page of a list: a Node's metadata is some 6 KiB on the wire, so a page is about 1 MiB.
const PAGE: u32 = 200;
/// HTTP: the credentials are not accepted.
const UNAUTHORIZED: u16 = 401;
/// HTTP: the version that was asked for is compacted away.
const GONE: u16 = 410;
/// HTTP: the collection does not exist; here: its CustomResourceDefinition is not installed.
const NOT_FOUND: u16 = 404;

/// How patient a watch is.
#[derive(Clone, Debug)]
pub struct Pace {
    /// How long a list's page, and the head of a watch's answer, may take.
    pub answer: Duration,
    /// How long a watch may say nothing. The API server sends a bookmark about once a minute.
    pub silence: Duration,
    /// Seconds after which the server is asked to end a watch; drawn, so that a thousand do not end together.
    pub life: RangeInclusive<u32>,
    /// How long until a collection that does not exist is looked for again.
    pub absent: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(30),
            silence: Duration::from_secs(180),
            life: 300..=600,
            absent: Duration::from_secs(60),
        }
    }
}

/// What is watched.
#[derive(Clone, Debug)]
pub struct Collection {
    /// Its path, as in `/api/v1/nodes`.
    pub path: String,
    /// The one object that is of interest; none: all.
    pub name: Option<String>,
    /// Whether the whole objects are wanted, not their metadata alone.
    pub data: bool,
}

/// What is kept of an object.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(from = "Raw")]
pub struct Object {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`: tells an object from a later one of the same name.
    pub uid: String,
    /// `metadata.resourceVersion`: grows with every change of anything of the API server's.
    pub version: u64,
    /// `metadata.annotations` that begin with our prefix.
    pub annotations: BTreeMap<String, String>,
    /// `data`, where it was asked for.
    pub data: BTreeMap<String, String>,
}

/// What a watch tells of objects that are kept as `O`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told<O = Object> {
    /// Every object; what is not among them is not there.
    Listed(Vec<O>),
    /// An object came or changed.
    Changed(O),
    /// An object went.
    Deleted(O),
    /// The watch runs again after it was lost, without a gap.
    Resumed,
    /// The collection cannot be heard, for this reason; followed by `Listed` or `Resumed` once it can.
    Lost(String),
    /// As `Lost`, because the credentials are not accepted, nor were fresh ones.
    Unauthorized(String),
    /// There is no such collection. It is as if it were empty, and looked for again.
    Absent,
}

impl Object {
    /// Reads one object, as it stands in an answer of the API server.
    pub fn from_json(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }
}

/// Watches a collection until `tell` is closed, and tells what is heard under `label`.
pub async fn run<L: Copy, O: DeserializeOwned + Clone>(
    access: Access,
    collection: Collection,
    pace: Pace,
    seed: u64,
    label: L,
    tell: mpsc::Sender<(L, Told<O>)>,
) {
    let closed = tell.clone();
    let request = Request::new(&collection.path);
    let mut watch =
        Watch { access, collection, request, pace, label, tell, version: None, lost: false, renewed: false };
    let watching = async {
        let (mut backoff, mut draw) = (Backoff::new(seed), seed);
        loop {
            // A linear congruential step (Knuth, MMIX): lives need spread, not secrecy.
            draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let life = draw_from(&watch.pace.life, draw);
            let round = Round { begun: Instant::now(), life, lists: watch.version.is_none() };
            let (Ok(end) | Err(end)) = watch.once(life, &mut backoff).await;
            let Some(pause) = watch.ended(end, &round, &mut backoff).await else { return };
            tokio::time::sleep_until(pause.into()).await;
        }
    };
    tokio::select! {
        () = watching => {}
        () = closed.closed() => {}
    }
}

fn draw_from(range: &RangeInclusive<u32>, random: u64) -> u32 {
    let span = u64::from(range.end().saturating_sub(*range.start())) + 1;
    range.start() + u32::try_from((random >> 33) % span).expect("less than the span of a u32 range")
}

struct Watch<L, O> {
    access: Access,
    collection: Collection,
    request: Request,
    pace: Pace,
    label: L,
    tell: mpsc::Sender<(L, Told<O>)>,
    /// From where to watch on; none: to be listed first.
    version: Option<String>,
    /// Whether it was told that the collection cannot be heard.
    lost: bool,
    /// Whether fresh credentials were refused too.
    renewed: bool,
}

/// One round of a watch: a list where that is needed, and what is heard after it.
struct Round {
    begun: Instant,
    /// Seconds after which the server is asked to end it.
    life: u32,
    /// Whether it begins with a list.
    lists: bool,
}

/// How one round of a watch ended.
enum End {
    /// Nobody listens any more.
    Closed,
    /// In good order.
    Over,
    /// The version is compacted away: everything is to be listed again.
    Gone,
    /// There is no such collection.
    Absent,
    /// The credentials are not (any more) accepted.
    Unauthorized(String),
    /// For a reason that a person may want to know.
    Failed(String),
}

impl From<kube::Error> for End {
    fn from(error: kube::Error) -> Self {
        match status_code(&error) {
            Some(GONE) => Self::Gone,
            Some(NOT_FOUND) => Self::Absent,
            Some(UNAUTHORIZED) => Self::Unauthorized(words(&error)),
            Some(_) | None => Self::Failed(words(&error)),
        }
    }
}

impl<L: Copy, O: DeserializeOwned + Clone> Watch<L, O> {
    /// Lists where that is needed, and watches until the watch ends.
    async fn once(&mut self, life: u32, backoff: &mut Backoff) -> Result<End, End> {
        let client = self.access.client().await.map_err(|error| End::Failed(error.to_string()))?;
        let version = match &self.version {
            Some(version) => version.clone(),
            None => {
                let (version, objects) = self.list(&client).await?;
                self.lost = false;
                self.tell(Told::Listed(objects)).await?;
                self.version.insert(version).clone()
            }
        };
        let params = WatchParams { timeout: Some(life), field_selector: self.selector(), ..WatchParams::default() };
        let request = match self.collection.data {
            true => self.request.watch(&params, &version),
            false => self.request.watch_metadata(&params, &version),
        };
        let request = request.map_err(|error| End::Failed(error.to_string()))?;
        let opening = client.request_events::<Lenient<O>>(request);
        let stream = tokio::time::timeout(self.pace.answer, opening).await.map_err(|_| self.no_answer())??;
        let mut events = pin!(stream);
        backoff.handle_connected(Instant::now());
        self.renewed = false;
        if std::mem::take(&mut self.lost) {
            self.tell(Told::Resumed).await?;
        }
        loop {
            let Ok(next) = tokio::time::timeout(self.pace.silence, events.next()).await else {
                tracing::debug!(path = self.collection.path, "the watch is silent; opening it again");
                return Ok(End::Over);
            };
            match next {
                None => return Ok(End::Over),
                Some(Ok(event)) => {
                    if let Some(told) = self.heard(event)? {
                        self.tell(told).await?;
                    }
                }
                Some(Err(kube::Error::SerdeError(error))) => self.skipped(&error),
                // The stream broke; whether the server is lost shows when it is opened again.
                Some(Err(error @ (kube::Error::ReadEvents(_) | kube::Error::HyperError(_)))) => {
                    tracing::debug!(path = self.collection.path, error = words(&error), "the watch broke");
                    return Ok(End::Over);
                }
                Some(Err(error)) => return Err(error.into()),
            }
        }
    }

    /// What follows from the end of a round: when the next one begins; none: never.
    async fn ended(&mut self, end: End, round: &Round, backoff: &mut Backoff) -> Option<Instant> {
        let now = Instant::now();
        match end {
            End::Closed => None,
            // A watch that ends at once, again and again, is paused like one that fails.
            End::Over if now.saturating_duration_since(round.begun) >= Duration::from_secs(1) => Some(now),
            End::Over => Some(backoff.handle_failure(now)),
            End::Gone => {
                self.version = None;
                // After an outage everybody is told so, each when his pause is over, and may list without another one. But
                // not for ever: a list may be outdated as soon as it is read.
                if round.lists { Some(backoff.handle_failure(now)) } else { Some(now) }
            }
            End::Absent => {
                (self.version, self.lost) = (None, false);
                self.tell(Told::Absent).await.ok()?;
                Some(now + self.pace.absent.mul_f64(0.75 + f64::from(round.life % 64) / 128.0))
            }
            // A token that was rotated is read again before anybody is alarmed.
            End::Unauthorized(_) if !std::mem::replace(&mut self.renewed, true) => {
                self.access.renew();
                Some(backoff.handle_failure(now))
            }
            End::Unauthorized(why) => self.lost(Told::Unauthorized(why), backoff).await,
            End::Failed(why) => self.lost(Told::Lost(why), backoff).await,
        }
    }

    async fn lost(&mut self, told: Told<O>, backoff: &mut Backoff) -> Option<Instant> {
        self.access.renew();
        self.lost = true;
        self.tell(told).await.ok()?;
        Some(backoff.handle_failure(Instant::now()))
    }

    fn heard(&mut self, event: WatchEvent<Lenient<O>>) -> Result<Option<Told<O>>, End> {
        let (object, tell): (_, fn(O) -> Told<O>) = match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => (object, Told::Changed),
            WatchEvent::Deleted(object) => (object, Told::Deleted),
            WatchEvent::Bookmark(bookmark) => {
                self.version = Some(bookmark.metadata.resource_version);
                return Ok(None);
            }
            WatchEvent::Error(status) => return Err(kube::Error::Api(status).into()),
        };
        // The watch goes on behind an object that does not read, too.
        if let Some(version) = object.version {
            self.version = Some(version);
        }
        match object.read {
            Ok(object) => Ok(Some(tell(object))),
            Err(error) => {
                self.skipped(&error);
                Ok(None)
            }
        }
    }

    /// The collection's version and its objects.
    async fn list(&self, client: &kube::Client) -> Result<(String, Vec<O>), End> {
        let mut objects = Vec::new();
        let mut params = ListParams { limit: Some(PAGE), field_selector: self.selector(), ..ListParams::default() };
        loop {
            let request = match self.collection.data {
                true => self.request.list(&params),
                false => self.request.list_metadata(&params),
            };
            let asking = client.request_text(request.map_err(|error| End::Failed(error.to_string()))?);
            let text = tokio::time::timeout(self.pace.answer, asking).await.map_err(|_| self.no_answer())??;
            let page: Page<O> = serde_json::from_str(&text)
                .map_err(|error| End::Failed(format!("the API server's list does not read: {error}")))?;
            for object in page.items.unwrap_or_default() {
                match object.read {
                    Ok(object) => objects.push(object),
                    Err(error) => self.skipped(&error),
                }
            }
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params.continue_token = Some(token),
                None => return Ok((page.metadata.resource_version, objects)),
            }
        }
    }

    async fn tell(&self, told: Told<O>) -> Result<(), End> {
        self.tell.send((self.label, told)).await.map_err(|_| End::Closed)
    }

    fn selector(&self) -> Option<String> {
        self.collection.name.as_ref().map(|name| format!("metadata.name={name}"))
    }

    fn no_answer(&self) -> End {
        End::Failed(format!("the API server did not answer within {} s", self.pace.answer.as_secs()))
    }

    fn skipped(&self, error: &impl fmt::Display) {
        tracing::warn!(path = self.collection.path, %error, "an object does not read and is skipped");
    }
}

/// A value that reads or tells why not, without harm to what stands around it.
#[derive(Clone)]
struct Lenient<T> {
    /// `metadata.resourceVersion`, where that reads.
    version: Option<String>,
    read: Result<T, String>,
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Lenient<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Through a value: an object of the wrong shape is then whole JSON all the same.
        let value = serde_json::Value::deserialize(deserializer)?;
        let version = value["metadata"]["resourceVersion"].as_str().map(str::to_owned);
        Ok(Self { version, read: T::deserialize(value).map_err(|error| error.to_string()) })
    }
}

#[derive(Deserialize)]
#[serde(bound = "O: DeserializeOwned")]
struct Page<O> {
    metadata: PageMeta,
    items: Option<Vec<Lenient<O>>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PageMeta {
    resource_version: String,
    #[serde(default, rename = "continue")]
    continue_: Option<String>,
}

#[derive(Clone, Deserialize)]
struct Raw {
    metadata: RawMeta,
    #[serde(default)]
    data: Option<BTreeMap<String, String>>,
}

#[derive(Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawMeta {
    name: String,
    #[serde(default)]
    uid: String,
    #[serde(default)]
    resource_version: String,
    #[serde(default)]
    annotations: Ours,
}

impl From<Raw> for Object {
    fn from(raw: Raw) -> Self {
        // Opaque by the letter, but comparable since 1.35, and a number in every version that was ever released.
        let version = raw.metadata.resource_version.parse().unwrap_or(0);
        let Ours(annotations) = raw.metadata.annotations;
        Self {
            name: raw.metadata.name,
            uid: raw.metadata.uid,
            version,
            annotations,
            data: raw.data.unwrap_or_default(),
        }
    }
}

/// Annotations with our prefix; others are not kept for a moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Ours(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Ours {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pick;
        impl<'de> Visitor<'de> for Pick {
            type Value = Ours;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("annotations")
            }
            fn visit_unit<E>(self) -> Result<Ours, E> {
                Ok(Ours::default())
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Ours, A::Error> {
                let mut ours = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    if key.starts_with(PREFIX) {
                        ours.insert(key, map.next_value()?);
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(Ours(ours))
            }
        }
        deserializer.deserialize_any(Pick)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_an_object_only_what_is_ours_is_kept() {
        let text = r#"{"kind":"PartialObjectMetadata","metadata":{"name":"w","resourceVersion":"7","labels":{"a":"b"},
            "annotations":{"other":"x","mesh.keystone.cluster/seq":"3"},"managedFields":[{"manager":"kubelet"}]}}"#;
        let object = Object::from_json(text).unwrap();
        let annotations = BTreeMap::from([("mesh.keystone.cluster/seq".to_owned(), "3".to_owned())]);
        assert_eq!(object, Object { name: "w".into(), version: 7, annotations, ..Object::default() });
    }

    #[test]
    fn one_bad_object_disturbs_no_other() {
        let text = r#"{"metadata":{"resourceVersion":"9","continue":""},"items":[
            {"metadata":{"name":"a","annotations":null}}, {"metadata":{"name":5}}, 7,
            {"metadata":{"name":"b","annotations":{"mesh.keystone.cluster/seq":3}}}, {"metadata":{"name":"c"}}]}"#;
        let page: Page<Object> = serde_json::from_str(text).unwrap();
        let names: Vec<_> =
            page.items.unwrap().into_iter().filter_map(|object| object.read.ok()).map(|object| object.name).collect();
        assert_eq!(names, ["a", "c"]);
        let empty: Page<Object> = serde_json::from_str(r#"{"metadata":{"resourceVersion":"9"},"items":null}"#).unwrap();
        assert!(empty.items.is_none());
    }

    #[test]
    fn lives_are_drawn_within_their_range() {
        for random in [0, 1, u64::MAX, 1 << 40, 12_345_678_901_234_567_890] {
            assert!((300..=600).contains(&draw_from(&(300..=600), random)));
        }
        assert_eq!(draw_from(&(5..=5), u64::MAX), 5);
    }
}
