//! Which of the controller's replicas acts: leader election over a coordination.k8s.io Lease.
//!
//! `Election` decides, [`run`] reads and writes the Lease. The rules are client-go's:
//!
//! ```text
//!   leader     renews every RETRY; believes in itself for RENEW_DEADLINE after it *sent* the last renewal that succeeded
//!   candidate  takes the Lease once it has *seen* it unchanged for DURATION, or at once where it was released
//! ```
//!
//! Both sides measure with their own monotonic clock from what they did or saw themselves, so clocks that differ do no
//! harm; RENEW_DEADLINE < DURATION is what keeps two leaders apart. Every write carries the resourceVersion that was
//! read, so of two candidates that take the Lease together one is refused.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::PostParams;
use tokio::sync::watch;

use keystone_mesh_api::errors::words;

/// So long a Lease has to stand unchanged before another replica takes it; client-go's default.
pub const DURATION: Duration = Duration::from_secs(15);
/// So long a leader acts after its last renewal; client-go's default.
pub const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Between two tries to renew or to take; client-go's default.
pub const RETRY: Duration = Duration::from_secs(2);
/// An API call about the Lease that takes longer has failed: two of them fit into [`RENEW_DEADLINE`].
const CALL_TIMEOUT: Duration = Duration::from_secs(4);

/// Annotation of the Lease: where the leader serves its metrics, as [`Replica::place`] says.
const PLACE: &str = "mesh.keystone.cluster/metrics-place";
/// The same complaint is made again after so long.
const COMPLAINT: Duration = Duration::from_secs(60);

/// A replica, as the Lease tells of it.
#[derive(Clone, Debug)]
pub struct Replica {
    /// Its name, which no other process has.
    pub name: String,
    /// Its port and the network namespace that it is in: of two with the same place only one can have the port. None
    /// where that is not known, and nobody's business.
    pub place: Option<String>,
}

/// What a replica sees of the leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sight {
    /// Whether somebody leads: this replica, or another that renews the Lease.
    pub led: bool,
    /// Whether it is another that wants the very port of this replica.
    pub beside: bool,
}

/// Whether this replica may write, asked right before every write; and what it sees of the one that may.
#[derive(Clone, Debug)]
pub struct Leadership {
    until: Arc<Mutex<Option<Instant>>>,
    changes: watch::Sender<bool>,
    sights: watch::Sender<Option<Sight>>,
}

impl Leadership {
    /// Nobody's yet.
    pub fn new() -> Self {
        Self { until: Arc::default(), changes: watch::Sender::new(false), sights: watch::Sender::new(None) }
    }

    /// Whether this replica leads at `now`.
    pub fn holds(&self, now: Instant) -> bool {
        self.until.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|until| now < until)
    }

    /// Tells when leadership begins and ends.
    pub fn subscribe(&self) -> watch::Receiver<bool> {
        self.changes.subscribe()
    }

    /// Tells what is seen of the leader; none before the first look.
    pub fn sights(&self) -> watch::Receiver<Option<Sight>> {
        self.sights.subscribe()
    }

    fn set(&self, until: Option<Instant>) {
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = until;
        self.changes.send_if_modified(|leads| std::mem::replace(leads, until.is_some()) != until.is_some());
    }
}

impl Default for Leadership {
    fn default() -> Self {
        Self::new()
    }
}

/// What a replica does about the Lease next.
#[derive(Clone, Debug, PartialEq)]
enum Step {
    /// Create it, or replace it; the resourceVersion is the read one's.
    Write(Box<Lease>),
    /// Read it again after [`RETRY`].
    Wait,
}

/// The state of one replica in the election.
#[derive(Debug)]
struct Election {
    me: String,
    place: Option<String>,
    /// The Lease as first seen in its present form, and when.
    seen: Option<(Lease, Instant)>,
    /// When the last renewal that succeeded was sent.
    renewed: Option<Instant>,
}

impl Election {
    fn new(Replica { name, place }: Replica) -> Self {
        Self { me: name, place, seen: None, renewed: None }
    }

    /// The Lease was read: none where it does not exist. `wall` is only written for people to read.
    fn handle_read(&mut self, lease: Option<Lease>, now: Instant, wall: Timestamp) -> Step {
        let Some(lease) = lease else {
            self.seen = None;
            self.renewed = None;
            return Step::Write(Box::new(self.claim(None, wall)));
        };
        if self.seen.as_ref().is_none_or(|(seen, _)| seen.metadata.resource_version != lease.metadata.resource_version)
        {
            self.seen = Some((lease.clone(), now));
        }
        let holder = holder(&lease);
        let unchanged_since = self.seen.as_ref().map_or(now, |(_, since)| *since);
        if holder != Some(self.me.as_str()) {
            self.renewed = None;
        }
        let free = holder.is_none_or(|holder| holder == self.me) || now >= unchanged_since + life(&lease);
        if free { Step::Write(Box::new(self.claim(Some(&lease), wall))) } else { Step::Wait }
    }

    /// The write that was sent at `sent` succeeded.
    fn handle_written(&mut self, lease: Lease, sent: Instant) {
        self.seen = Some((lease, sent));
        self.renewed = Some(sent);
    }

    /// Until when this replica leads, if it does.
    fn leads_until(&self, now: Instant) -> Option<Instant> {
        self.renewed.map(|sent| sent + RENEW_DEADLINE).filter(|until| now < *until)
    }

    /// Who else holds the Lease, as last seen.
    fn other_holder(&self) -> Option<&str> {
        self.seen.as_ref().and_then(|(lease, _)| holder(lease)).filter(|holder| *holder != self.me)
    }

    /// What there is to see of the leader.
    fn sight(&self, now: Instant) -> Sight {
        let other = self.other_holder().and(self.seen.as_ref());
        let renewed = other.is_some_and(|(lease, since)| now < *since + life(lease));
        let place = other.and_then(|(lease, _)| lease.metadata.annotations.as_ref()?.get(PLACE));
        Sight {
            led: renewed || self.leads_until(now).is_some(),
            beside: place.is_some() && place == self.place.as_ref(),
        }
    }

    fn claim(&self, read: Option<&Lease>, wall: Timestamp) -> Lease {
        let old = read.and_then(|lease| lease.spec.clone()).unwrap_or_default();
        let mine = old.holder_identity.as_deref() == Some(&self.me);
        let transitions = old.lease_transitions.unwrap_or(0);
        let mut metadata = read.map(|lease| lease.metadata.clone()).unwrap_or_default();
        let annotations = metadata.annotations.get_or_insert_default();
        match &self.place {
            Some(place) => drop(annotations.insert(PLACE.to_owned(), place.clone())),
            None => drop(annotations.remove(PLACE)),
        }
        Lease {
            metadata,
            spec: Some(LeaseSpec {
                acquire_time: if mine { old.acquire_time } else { Some(MicroTime(wall)) },
                holder_identity: Some(self.me.clone()),
                lease_duration_seconds: Some(DURATION.as_secs() as i32),
                lease_transitions: Some(if mine || read.is_none() { transitions } else { transitions + 1 }),
                renew_time: Some(MicroTime(wall)),
                ..old
            }),
        }
    }

    /// The Lease given back, where this replica holds it.
    fn release(&self, wall: Timestamp) -> Option<Lease> {
        let (lease, _) = self.seen.as_ref().filter(|(lease, _)| holder(lease) == Some(self.me.as_str()))?;
        let mut lease = lease.clone();
        if let Some(spec) = &mut lease.spec {
            spec.holder_identity = None;
            spec.lease_duration_seconds = Some(1);
            spec.renew_time = Some(MicroTime(wall));
        }
        Some(lease)
    }
}

fn holder(lease: &Lease) -> Option<&str> {
    lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()).filter(|holder| !holder.is_empty())
}

fn life(lease: &Lease) -> Duration {
    let seconds = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds);
    seconds.and_then(|seconds| u64::try_from(seconds).ok()).map_or(DURATION, Duration::from_secs)
}

/// Why an election ended.
#[derive(Debug, thiserror::Error)]
#[error("another replica leads: the lease went from {me} to {other}")]
pub struct Lost {
    /// This replica.
    pub me: String,
    /// Who has the Lease.
    pub other: String,
}

/// Takes part in the election as `me` until `stop` says true, then gives the Lease back. Ends with an
/// error where another replica took over from this one. While the API server is away leadership lapses, and is taken
/// up again when it is back and nobody else was faster.
pub async fn run(
    api: Api<Lease>,
    name: &str,
    me: Replica,
    leadership: &Leadership,
    mut stop: watch::Receiver<bool>,
) -> Result<(), Lost> {
    let mut election = Election::new(me);
    let mut led = false;
    let mut complained: Option<(String, Instant)> = None;
    loop {
        match attempt(&api, name, &mut election).await {
            Ok(()) => complained = None,
            Err(error) => complain(name, error.to_string(), &mut complained),
        }
        let until = election.leads_until(Instant::now());
        leadership.set(until);
        leadership.sights.send_replace(Some(election.sight(Instant::now())));
        match (led, until.is_some()) {
            (false, true) => tracing::info!(lease = name, me = %election.me, "this replica leads"),
            (true, false) => tracing::warn!(lease = name, me = %election.me, "this replica does not lead any longer"),
            (false, false) | (true, true) => {}
        }
        if led && let Some(other) = election.other_holder() {
            leadership.set(None);
            return Err(Lost { me: election.me.clone(), other: other.to_owned() });
        }
        led |= until.is_some();
        let lapse = until.map_or(RETRY, |until| until.saturating_duration_since(Instant::now())).min(RETRY);
        tokio::select! {
            () = tokio::time::sleep(lapse) => {}
            _ = stop.wait_for(|stop| *stop) => break,
        }
    }
    leadership.set(None);
    if let Some(lease) = election.release(Timestamp::now()) {
        match call(api.replace(name, &PostParams::default(), &lease)).await {
            Ok(_) => tracing::info!(lease = name, "gave the leader lease back"),
            Err(error) => {
                tracing::warn!(%error, lease = name, "the leader lease could not be given back; it will lapse");
            }
        }
    }
    Ok(())
}

/// Says once a minute what is wrong with the Lease, and at once where that changes.
fn complain(lease: &str, error: String, complained: &mut Option<(String, Instant)>) {
    if complained.as_ref().is_some_and(|(said, at)| *said == error && at.elapsed() < COMPLAINT) {
        return;
    }
    tracing::warn!(error, lease, "the leader lease could not be read or written; trying again");
    *complained = Some((error, Instant::now()));
}

async fn attempt(api: &Api<Lease>, name: &str, election: &mut Election) -> Result<(), CallError> {
    let lease = call(api.get_opt(name)).await?;
    let Step::Write(mut lease) = election.handle_read(lease, Instant::now(), Timestamp::now()) else { return Ok(()) };
    let sent = Instant::now();
    let written = if lease.metadata.resource_version.is_none() {
        lease.metadata.name = Some(name.to_owned());
        call(api.create(&PostParams::default(), &lease)).await
    } else {
        call(api.replace(name, &PostParams::default(), &lease)).await
    };
    match written {
        Ok(lease) => election.handle_written(lease, sent),
        // Another replica was faster, and the next reading shows it.
        Err(CallError::Api(kube::Error::Api(status))) if status.code == 409 => {}
        Err(error) => return Err(error),
    }
    Ok(())
}

#[derive(Debug, thiserror::Error)]
enum CallError {
    #[error("no answer within {CALL_TIMEOUT:?}")]
    Timeout,
    #[error("{}", words(.0))]
    Api(kube::Error),
}

async fn call<T>(call: impl Future<Output = kube::Result<T>>) -> Result<T, CallError> {
    tokio::time::timeout(CALL_TIMEOUT, call).await.map_err(|_| CallError::Timeout)?.map_err(CallError::Api)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The API server: keeps one Lease and refuses a write over another version than the stored one.
    #[derive(Default)]
    struct Server {
        lease: Option<Lease>,
        version: u64,
    }

    impl Server {
        fn write(&mut self, mut lease: Lease) -> Option<Lease> {
            let stored = self.lease.as_ref().and_then(|stored| stored.metadata.resource_version.clone());
            if stored != lease.metadata.resource_version {
                return None;
            }
            self.version += 1;
            lease.metadata.resource_version = Some(self.version.to_string());
            self.lease = Some(lease.clone());
            Some(lease)
        }

        /// A whole attempt of one replica, without delay.
        fn attempt(&mut self, election: &mut Election, now: Instant) -> bool {
            if let Step::Write(lease) = election.handle_read(self.lease.clone(), now, Timestamp::UNIX_EPOCH)
                && let Some(lease) = self.write(*lease)
            {
                election.handle_written(lease, now);
            }
            election.leads_until(now).is_some()
        }
    }

    fn start() -> (Server, Election, Election, Instant) {
        (Server::default(), election("a", "host 1"), election("b", "host 1"), Instant::now())
    }

    fn election(name: &str, place: &str) -> Election {
        Election::new(Replica { name: name.into(), place: Some(place.into()) })
    }

    #[test]
    fn the_first_replica_leads_and_the_second_waits() {
        let (mut server, mut a, mut b, t) = start();
        assert!(server.attempt(&mut a, t));
        for second in 0..60 {
            let now = t + Duration::from_secs(second);
            assert!(server.attempt(&mut a, now));
            assert!(!server.attempt(&mut b, now));
        }
        let spec = server.lease.unwrap().spec.unwrap();
        assert_eq!(spec.lease_transitions, Some(0));
    }

    #[test]
    fn a_dead_leader_is_followed_after_the_duration_and_not_before_it_stopped_believing_in_itself() {
        let (mut server, mut a, mut b, t) = start();
        assert!(server.attempt(&mut a, t));
        let mut taken = None;
        for tick in 1..400 {
            let now = t + Duration::from_millis(100 * tick);
            if server.attempt(&mut b, now) {
                taken.get_or_insert(now);
                assert!(a.leads_until(now).is_none(), "two leaders at {tick}");
            }
        }
        let after = taken.expect("b leads at last") - t;
        assert!((DURATION..DURATION + RETRY).contains(&after), "{after:?}");
        assert_eq!(server.lease.unwrap().spec.unwrap().lease_transitions, Some(1));
    }

    #[test]
    fn a_released_lease_is_taken_at_once() {
        let (mut server, mut a, mut b, t) = start();
        assert!(server.attempt(&mut a, t));
        assert!(!server.attempt(&mut b, t));
        server.write(a.release(Timestamp::UNIX_EPOCH).unwrap()).unwrap();
        assert!(server.attempt(&mut b, t + Duration::from_millis(1)));
    }

    #[test]
    fn of_two_that_take_it_together_one_leads() {
        let (mut server, mut a, mut b, t) = start();
        let step_a = a.handle_read(None, t, Timestamp::UNIX_EPOCH);
        let step_b = b.handle_read(None, t, Timestamp::UNIX_EPOCH);
        let (Step::Write(lease_a), Step::Write(lease_b)) = (step_a, step_b) else { panic!("both try") };
        a.handle_written(server.write(*lease_a).unwrap(), t);
        assert!(server.write(*lease_b).is_none());
        assert!(a.leads_until(t).is_some() && b.leads_until(t).is_none());
    }

    #[test]
    fn a_clock_that_is_wrong_by_hours_changes_nothing() {
        let (mut server, mut a, mut b, t) = start();
        assert!(server.attempt(&mut a, t));
        let mut lease = server.lease.clone().unwrap();
        lease.spec.as_mut().unwrap().renew_time = Some(MicroTime(Timestamp::MIN));
        server.lease = Some(lease);
        assert!(!server.attempt(&mut b, t + Duration::from_secs(1)));
    }

    #[test]
    fn a_leader_that_slept_sees_the_other() {
        let (mut server, mut a, mut b, t) = start();
        assert!(server.attempt(&mut a, t));
        assert!(!server.attempt(&mut b, t));
        let late = t + DURATION + RETRY;
        assert!(server.attempt(&mut b, late));
        assert!(!server.attempt(&mut a, late));
        assert_eq!(a.other_holder(), Some("b"));
        assert_eq!(a.release(Timestamp::UNIX_EPOCH), None);
    }

    #[test]
    fn a_replica_that_waits_sees_whether_somebody_leads_and_where() {
        let (mut server, mut a, mut b, t) = start();
        let mut elsewhere = election("c", "host 2");
        assert!(server.attempt(&mut a, t));
        assert_eq!(a.sight(t), Sight { led: true, beside: false });
        assert!(!server.attempt(&mut b, t) && !server.attempt(&mut elsewhere, t));
        assert_eq!(b.sight(t), Sight { led: true, beside: true });
        assert_eq!(elsewhere.sight(t), Sight { led: true, beside: false });
        // The leader is dead: it leads no longer, and its port is left to whoever follows.
        let late = t + DURATION;
        assert_eq!(b.sight(late), Sight { led: false, beside: true });
        assert!(server.attempt(&mut elsewhere, late) && !server.attempt(&mut b, late));
        assert_eq!(b.sight(late), Sight { led: true, beside: false });
        // One of before there was a place.
        server.lease.as_mut().unwrap().metadata.annotations = None;
        let mut fresh = election("d", "host 2");
        assert!(!server.attempt(&mut fresh, late));
        assert_eq!(fresh.sight(late), Sight { led: true, beside: false });
    }

    #[test]
    fn leadership_ends_by_itself() {
        let leadership = Leadership::new();
        let now = Instant::now();
        leadership.set(Some(now + RENEW_DEADLINE));
        assert!(leadership.holds(now) && !leadership.holds(now + RENEW_DEADLINE));
    }
}
