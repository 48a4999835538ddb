//! What is to stand on objects, and when it is written: no write where nothing differs, and no fight.
//!
//! A record is wanted on the Node of its name, or on the Member while there is no Node. The desk compares it with what
//! was last seen there. It is written where that differs, again after somebody else changed it, but then ever more
//! slowly, so that two who disagree do not flood the API server. Nothing is decided by a clock but pauses.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::{Duration, Instant};

use keystone_mesh_core::annotations::{self, PREFIX, Writer};
use keystone_mesh_core::backoff::Backoff;
use keystone_mesh_core::directory::Carrier;
use keystone_mesh_core::node::{NodeName, SignedRecord};

use crate::kube_api::watch::Object;

/// Between two writes of one object: what changes in one breath (a start finds its addresses one after the other) is one
/// write.
const GAP: Duration = Duration::from_millis(500);
/// The pause before something that somebody changed is put right; doubles with each time.
const FIRST_REPAIR: Duration = Duration::from_secs(1);
/// The longest of those pauses.
const LAST_REPAIR: Duration = Duration::from_secs(60);
/// Without a repair for so long the next one is the first again.
const PEACE: Duration = Duration::from_secs(600);
/// Between attempts that the API server forbids: roles change seldom.
const FORBIDDEN: Duration = Duration::from_secs(60);

/// Why a write failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The credentials do not allow it.
    Forbidden(String),
    /// The object is gone or another one, which the watch will tell.
    Moved,
    /// The value itself is refused.
    Invalid(String),
    /// The API server does not answer, or not well.
    Unavailable(String),
}

/// When one thing is written, again, and again after somebody changed it.
#[derive(Clone, Debug)]
pub struct Mender {
    backoff: Backoff,
    /// When the last write was acknowledged, and whether the same is wanted still.
    written: Option<(Instant, bool)>,
    repairs: u32,
    not_before: Option<Instant>,
    in_flight: bool,
    why: Option<String>,
}

impl Mender {
    /// Of something that was never written. Different daemons take different seeds.
    pub fn new(seed: u64) -> Self {
        let backoff = Backoff::new(seed);
        Self { backoff, written: None, repairs: 0, not_before: None, in_flight: false, why: None }
    }

    /// Something else is wanted.
    pub fn handle_wanted(&mut self) {
        if let Some((_, same)) = &mut self.written {
            *same = false;
        }
    }

    /// What is there is what is wanted.
    pub fn handle_settled(&mut self) {
        (self.not_before, self.why) = (None, None);
    }

    /// What is there is not what is wanted: when it is to be written. None while a write is under way.
    pub fn due(&mut self, now: Instant) -> Option<Instant> {
        if self.in_flight {
            return None;
        }
        if self.not_before.is_none() {
            self.not_before = Some(match self.written {
                None => now,
                Some((at, false)) => at + GAP,
                Some((at, true)) => now + self.repair(now.saturating_duration_since(at)),
            });
        }
        self.not_before
    }

    fn repair(&mut self, since: Duration) -> Duration {
        if since > PEACE {
            self.repairs = 0;
        }
        let pause = FIRST_REPAIR.saturating_mul(1 << self.repairs.min(16)).min(LAST_REPAIR);
        self.repairs = self.repairs.saturating_add(1);
        pause
    }

    /// It is being written.
    pub fn handle_started(&mut self) {
        (self.in_flight, self.not_before) = (true, None);
    }

    /// The write was acknowledged, or not.
    pub fn handle_done(&mut self, done: Result<(), &Failure>, now: Instant) {
        self.in_flight = false;
        match done {
            Ok(()) => {
                self.backoff.handle_network_change();
                (self.written, self.why) = (Some((now, true)), None);
            }
            Err(failure) => {
                let again = self.backoff.handle_failure(now);
                let seldom = matches!(failure, Failure::Forbidden(_) | Failure::Invalid(_));
                self.not_before = Some(if seldom { again.max(now + FORBIDDEN) } else { again });
                self.why = match failure {
                    Failure::Forbidden(why) | Failure::Invalid(why) | Failure::Unavailable(why) => Some(why.clone()),
                    Failure::Moved => None,
                };
            }
        }
    }

    /// Why the last attempt failed, where it did.
    pub fn why(&self) -> Option<&str> {
        self.why.as_deref()
    }
}

/// What was last seen on an object.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stand {
    uid: String,
    version: u64,
    /// Of the annotations that a node writes.
    digest: u64,
    /// Which of them are there, a bit each in the order of [`annotations::names`].
    present: u32,
}

impl Stand {
    fn of(object: &Object) -> Self {
        let (digest, present) = digest(&object.annotations);
        Self { uid: object.uid.clone(), version: object.version, digest, present }
    }
}

fn digest(annotations: &BTreeMap<String, String>) -> (u64, u32) {
    let (mut hasher, mut present) = (DefaultHasher::new(), 0);
    for (bit, name) in annotations::names(Writer::Node).enumerate() {
        if let Some(value) = annotations.get(&format!("{PREFIX}{name}")) {
            (bit, value).hash(&mut hasher);
            present |= 1 << bit;
        }
    }
    (hasher.finish(), present)
}

/// A write to be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Onto which kind of object.
    pub carrier: Carrier,
    /// Its name.
    pub name: NodeName,
    /// The very object: one that was deleted meanwhile must not be made again.
    pub uid: String,
    /// What is to stand there.
    pub annotations: BTreeMap<String, String>,
    /// A node's annotations that are to go, whoever wrote them.
    pub remove: Vec<String>,
}

#[derive(Debug)]
struct Want {
    record: SignedRecord,
    digest: u64,
    present: u32,
    mender: Mender,
}

/// The desk. See the [module](self).
#[derive(Debug)]
pub struct Desk {
    seed: u64,
    /// What stands on the Node and on the Member of a name.
    stands: BTreeMap<NodeName, [Option<Stand>; 2]>,
    wants: BTreeMap<NodeName, Want>,
}

impl Desk {
    /// A desk that wants nothing yet.
    pub fn new(seed: u64) -> Self {
        Self { seed, stands: BTreeMap::new(), wants: BTreeMap::new() }
    }

    /// Wants this record on the object of its name, in place of an older one.
    pub fn want(&mut self, record: SignedRecord) {
        let name = record.get().name.clone();
        let (digest, present) = digest(&annotations::of_record(&record));
        match self.wants.get_mut(&name) {
            Some(want) if want.digest == digest => {}
            Some(want) => {
                want.mender.handle_wanted();
                (want.record, want.digest, want.present) = (record, digest, present);
            }
            None => {
                let mut hasher = DefaultHasher::new();
                name.hash(&mut hasher);
                let mender = Mender::new(self.seed ^ hasher.finish());
                self.wants.insert(name, Want { record, digest, present, mender });
            }
        }
    }

    /// The record that is wanted under a name.
    pub fn wanted(&self, name: &NodeName) -> Option<&SignedRecord> {
        self.wants.get(name).map(|want| &want.record)
    }

    /// Wants nothing more under this name.
    pub fn forget(&mut self, name: &NodeName) {
        self.wants.remove(name);
    }

    /// An object came or changed.
    pub fn handle_object(&mut self, carrier: Carrier, object: &Object) {
        let Ok(name) = object.name.parse::<NodeName>() else { return };
        let stand = &mut self.stands.entry(name).or_default()[index(carrier)];
        let seen = Stand::of(object);
        // What the watch tells may be older than what a write was answered with.
        if stand.as_ref().is_none_or(|known| known.uid != seen.uid || known.version <= seen.version) {
            *stand = Some(seen);
        }
    }

    /// An object went.
    pub fn handle_deleted(&mut self, carrier: Carrier, name: &str) {
        let Ok(name) = name.parse::<NodeName>() else { return };
        let Some(stands) = self.stands.get_mut(&name) else { return };
        stands[index(carrier)] = None;
        if stands.iter().all(Option::is_none) {
            self.stands.remove(&name);
        }
        // The next object of that name is another one, and nobody's fault.
        if let Some(want) = self.wants.get_mut(&name) {
            want.mender.handle_wanted();
        }
    }

    /// Every object of a kind.
    pub fn handle_listed(&mut self, carrier: Carrier, objects: &[Object]) {
        let listed: std::collections::BTreeSet<&str> = objects.iter().map(|object| object.name.as_str()).collect();
        let there = |stands: &[Option<Stand>; 2]| stands[index(carrier)].is_some();
        let gone: Vec<NodeName> = self
            .stands
            .iter()
            .filter(|(name, stands)| there(stands) && !listed.contains(name.as_str()))
            .map(|(name, _)| name.clone())
            .collect();
        gone.iter().for_each(|name| self.handle_deleted(carrier, name.as_str()));
        objects.iter().for_each(|object| self.handle_object(carrier, object));
    }

    /// Whether there is an object of that kind and name.
    pub fn is_there(&self, carrier: Carrier, name: &NodeName) -> bool {
        self.stands.get(name).is_some_and(|stands| stands[index(carrier)].is_some())
    }

    /// What is to be written at this moment; to be drained. Each write has to be answered by [`Desk::handle_written`].
    pub fn poll(&mut self, now: Instant) -> Option<Write> {
        for (name, want) in &mut self.wants {
            let Some((carrier, stand)) = target(&self.stands, name) else { continue };
            if stand.digest == want.digest {
                want.mender.handle_settled();
                continue;
            }
            if want.mender.due(now).is_none_or(|at| at > now) {
                continue;
            }
            want.mender.handle_started();
            let extra = stand.present & !want.present;
            let remove = annotations::names(Writer::Node).enumerate().filter(|(bit, _)| extra & (1 << bit) != 0);
            return Some(Write {
                carrier,
                name: name.clone(),
                uid: stand.uid.clone(),
                annotations: annotations::of_record(&want.record),
                remove: remove.map(|(_, name)| format!("{PREFIX}{name}")).collect(),
            });
        }
        None
    }

    /// When [`Desk::poll`] has something next. To be asked after it was drained.
    pub fn next_at(&mut self, now: Instant) -> Option<Instant> {
        let Self { stands, wants, .. } = self;
        let waiting = wants
            .iter_mut()
            .filter(|(name, want)| target(stands, name).is_some_and(|(_, stand)| stand.digest != want.digest));
        waiting.filter_map(|(_, want)| want.mender.due(now)).min()
    }

    /// A write was answered: with the object as it is from then on, or not.
    pub fn handle_written(&mut self, write: &Write, answer: Result<&Object, &Failure>, now: Instant) {
        if let Ok(object) = answer {
            self.handle_object(write.carrier, object);
        }
        if let Some(want) = self.wants.get_mut(&write.name) {
            let same = digest(&write.annotations).0 == want.digest;
            want.mender.handle_done(answer.map(|_| ()), now);
            if !same {
                want.mender.handle_wanted();
            }
        }
    }

    /// What cannot be written and why, by name.
    pub fn troubles(&self) -> impl Iterator<Item = (&NodeName, &str)> {
        self.wants.iter().filter_map(|(name, want)| Some((name, want.mender.why()?)))
    }
}

fn index(carrier: Carrier) -> usize {
    match carrier {
        Carrier::Node => 0,
        Carrier::Member => 1,
    }
}

/// The Node where there is one, else the Member.
fn target<'a>(stands: &'a BTreeMap<NodeName, [Option<Stand>; 2]>, name: &NodeName) -> Option<(Carrier, &'a Stand)> {
    let [node, member] = stands.get(name)?;
    let node = node.as_ref().map(|stand| (Carrier::Node, stand));
    node.or_else(|| member.as_ref().map(|stand| (Carrier::Member, stand)))
}

#[cfg(test)]
mod tests {
    use keystone_mesh_core::Secret;
    use keystone_mesh_core::node::NodeRecord;
    use keystone_mesh_core::path::Nat;

    use super::*;

    fn record(seq: u64) -> SignedRecord {
        let secret = Secret::from_bytes([7; 32]);
        let record = NodeRecord {
            name: "w".parse().unwrap(),
            identity: secret.identity().id(),
            public_key: secret.wireguard(0).public_key(),
            endpoints: vec![],
            nat: Nat::Unknown,
            relays: vec![],
            routes: vec![],
            seq,
        };
        record.sign(&secret.identity())
    }

    fn object(version: u64, annotations: BTreeMap<String, String>) -> Object {
        Object { name: "w".into(), uid: "u1".into(), version, annotations, ..Object::default() }
    }

    fn bare(version: u64) -> Object {
        object(version, BTreeMap::new())
    }

    fn acknowledge(desk: &mut Desk, write: &Write, version: u64, now: Instant) {
        desk.handle_written(write, Ok(&object(version, write.annotations.clone())), now);
    }

    #[test]
    fn a_record_is_written_once_and_then_there_is_nothing_to_do() {
        let (mut desk, t0) = (Desk::new(1), Instant::now());
        desk.want(record(1));
        assert_eq!(desk.poll(t0), None, "there is no object yet");
        desk.handle_object(Carrier::Member, &bare(5));
        let write = desk.poll(t0).unwrap();
        assert_eq!((write.carrier, write.uid.as_str()), (Carrier::Member, "u1"));
        assert_eq!((desk.poll(t0), desk.next_at(t0)), (None, None), "one write at a time");
        acknowledge(&mut desk, &write, 6, t0);
        desk.handle_object(Carrier::Member, &bare(5));
        desk.want(record(1));
        assert_eq!((desk.poll(t0), desk.next_at(t0)), (None, None), "an older version changes nothing");
    }

    #[test]
    fn the_node_takes_over_from_the_member() {
        let (mut desk, t0) = (Desk::new(1), Instant::now());
        desk.want(record(1));
        desk.handle_object(Carrier::Member, &object(5, annotations::of_record(&record(1))));
        assert_eq!(desk.poll(t0), None);
        desk.handle_object(Carrier::Node, &bare(7));
        assert_eq!(desk.poll(t0).unwrap().carrier, Carrier::Node);
    }

    #[test]
    fn changes_in_one_breath_are_one_write() {
        let (mut desk, t0) = (Desk::new(1), Instant::now());
        desk.handle_object(Carrier::Node, &bare(5));
        desk.want(record(1));
        let write = desk.poll(t0).unwrap();
        desk.want(record(2));
        acknowledge(&mut desk, &write, 6, t0);
        desk.want(record(3));
        assert_eq!((desk.poll(t0), desk.next_at(t0)), (None, Some(t0 + GAP)));
        assert_eq!(desk.poll(t0 + GAP).unwrap().annotations, annotations::of_record(&record(3)));
    }

    #[test]
    fn what_somebody_changed_is_put_right_ever_more_slowly() {
        let (mut desk, mut now) = (Desk::new(1), Instant::now());
        desk.handle_object(Carrier::Node, &bare(5));
        desk.want(record(1));
        let write = desk.poll(now).unwrap();
        acknowledge(&mut desk, &write, 6, now);
        let mut version = 7;
        for pause in [1, 2, 4, 8, 16, 32, 60, 60] {
            let mut foreign = annotations::of_record(&record(1));
            foreign.insert(format!("{PREFIX}seq"), "x".into());
            foreign.insert(format!("{PREFIX}routes-wanted"), "10.0.0.0/8".into());
            desk.handle_object(Carrier::Node, &object(version, foreign));
            assert_eq!(desk.poll(now), None);
            let at = desk.next_at(now).unwrap();
            assert_eq!(at - now, Duration::from_secs(pause));
            now = at;
            let write = desk.poll(now).unwrap();
            assert_eq!(write.remove, [format!("{PREFIX}routes-wanted")]);
            acknowledge(&mut desk, &write, version + 1, now);
            version += 2;
        }
        now += PEACE + FIRST_REPAIR;
        desk.handle_object(Carrier::Node, &bare(version));
        assert_eq!(desk.next_at(now), Some(now + FIRST_REPAIR));
    }

    #[test]
    fn a_failure_is_tried_again_and_a_refusal_seldom() {
        let (mut desk, t0) = (Desk::new(1), Instant::now());
        desk.handle_object(Carrier::Node, &bare(5));
        desk.want(record(1));
        let write = desk.poll(t0).unwrap();
        desk.handle_written(&write, Err(&Failure::Unavailable("away".into())), t0);
        assert!(desk.next_at(t0).unwrap() - t0 < Duration::from_secs(1));
        assert_eq!(desk.troubles().next().unwrap().1, "away");
        let at = desk.next_at(t0).unwrap();
        let write = desk.poll(at).unwrap();
        desk.handle_written(&write, Err(&Failure::Forbidden("no".into())), at);
        assert!(desk.next_at(at).unwrap() - at >= FORBIDDEN);
        desk.handle_object(Carrier::Node, &object(6, annotations::of_record(&record(1))));
        assert_eq!(desk.poll(at), None);
        assert_eq!(desk.troubles().count(), 0, "somebody else has done it");
    }

    #[test]
    fn an_object_that_is_made_again_is_written_at_once() {
        let (mut desk, t0) = (Desk::new(1), Instant::now());
        desk.handle_listed(Carrier::Node, &[bare(5)]);
        desk.want(record(1));
        let write = desk.poll(t0).unwrap();
        acknowledge(&mut desk, &write, 6, t0);
        let later = t0 + Duration::from_secs(5);
        desk.handle_listed(Carrier::Node, &[]);
        assert_eq!((desk.poll(later), desk.next_at(later)), (None, None));
        desk.handle_object(Carrier::Node, &Object { uid: "u2".into(), ..bare(9) });
        assert_eq!(desk.poll(later).unwrap().uid, "u2");
    }
}
