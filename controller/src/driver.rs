//! The loop: changes in, a decision, writes out.
//!
//! One task owns the view and the queue. Whatever happens (a watch, an answer, a report, a timer) is fed first and makes
//! the view dirty; a little later, so that a burst is one decision, everything is decided afresh and what is to be
//! written is handed to at most [`IN_FLIGHT`](crate::queue::IN_FLIGHT) concurrent writes. A replica that does not lead
//! keeps its view warm and decides nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::apply::{Applied, Applier};
use crate::decide::{self, Action, Gauges};
use crate::events::Recorder;
use crate::http::Health;
use crate::index::Index;
use crate::lease::Leadership;
use crate::metrics::{self, ActionLabels, ErrorLabels, Metrics, State};
use crate::queue::{Outcome, Part, Queue};
use crate::view::{Kind, Now, Report, Reporter};
use crate::watch::Update;

/// A change waits so long for others that come with it.
const GATHER: Duration = Duration::from_millis(5);
/// Decisions take at most one part in so many of the time, however large the cluster and however many the changes.
const SHARE: u32 = 4;
/// Without anything else the loop turns this often, for the health check.
const TURN: Duration = Duration::from_secs(10);
/// Writes under way at the end are given so long.
const FINISH: Duration = Duration::from_secs(3);

/// Whom to ask is thought over so often at most: it takes as long as a decision, and nobody waits for it.
const REPORTERS: Duration = Duration::from_secs(1);
/// A conflict so many times in a row, over some seconds, is no coincidence.
const FOUGHT: u32 = 8;
/// A write to no effect so many times in a row is not just seen late.
const FOUGHT_FOR_NOTHING: u32 = 3;

/// What the loop is connected to.
pub struct Wiring {
    /// The view, and what feeds it.
    pub index: Index,
    /// From the watches.
    pub updates: mpsc::Receiver<Update>,
    /// From the reporters.
    pub reports: mpsc::Receiver<Report>,
    /// Whom to ask.
    pub reporters: watch::Sender<Vec<Reporter>>,
    /// Writes.
    pub applier: Applier,
    /// Events.
    pub recorder: Recorder,
    /// Whether this replica leads.
    pub leadership: Leadership,
    /// Counters.
    pub metrics: Metrics,
    /// For the health check.
    pub health: Arc<Health>,
}

/// The loop's own state.
pub struct Driver {
    wiring: Wiring,
    queue: Queue,
    writes: JoinSet<(Action, Applied, Duration)>,
    /// Since when the view shows something that was not decided about.
    dirty: Option<Instant>,
    /// Not before this is decided again.
    not_before: Instant,
    /// When time alone will have changed the answer.
    again_at: Option<Instant>,
    /// When it was last thought over whom to ask, and when it is due again because the view changed since.
    named_at: Option<Instant>,
    name_at: Option<Instant>,
}

enum Input {
    Update(Option<Update>),
    Report(Report),
    Written(Box<(Action, Applied, Duration)>),
    Leadership,
    Time,
    Stop,
}

impl Driver {
    /// A loop that has not begun.
    pub fn new(wiring: Wiring) -> Self {
        Self {
            wiring,
            queue: Queue::default(),
            writes: JoinSet::new(),
            dirty: Some(Instant::now()),
            not_before: Instant::now(),
            again_at: None,
            named_at: None,
            name_at: None,
        }
    }

    /// Runs until `stop` says true or the watches end, then waits a little for writes under way.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut leads = self.wiring.leadership.subscribe();
        self.handle_leadership(*leads.borrow_and_update());
        loop {
            self.wiring.health.handle_turn(self.wiring.index.view().is_complete());
            let led = self.wiring.leadership.sights().borrow().is_some_and(|sight| sight.led);
            self.wiring.metrics.leader_seen.set(led.into());
            let wake_at = self.wake_at();
            let input = tokio::select! {
                update = self.wiring.updates.recv() => Input::Update(update),
                Some(report) = self.wiring.reports.recv() => Input::Report(report),
                Some(written) = self.writes.join_next() => match written {
                    Ok(written) => Input::Written(Box::new(written)),
                    Err(error) => std::panic::resume_unwind(error.into_panic()),
                },
                _ = leads.changed() => Input::Leadership,
                () = tokio::time::sleep_until(wake_at.into()) => Input::Time,
                _ = stop.wait_for(|stop| *stop) => Input::Stop,
            };
            match input {
                Input::Update(Some(update)) => self.handle_updates(update),
                Input::Report(report) => {
                    self.wiring.index.handle_report(report);
                    self.mark();
                }
                Input::Written(written) => self.handle_written(*written),
                Input::Leadership => self.handle_leadership(*leads.borrow_and_update()),
                Input::Time => {}
                Input::Update(None) | Input::Stop => break,
            }
            self.decide_when_due();
            self.send();
        }
        let finish = async { while self.writes.join_next().await.is_some() {} };
        if tokio::time::timeout(FINISH, finish).await.is_err() {
            tracing::warn!("some writes did not end in time; whoever leads next decides about them again");
        }
    }

    /// One update, and whatever came with it.
    fn handle_updates(&mut self, first: Update) {
        let mut next = Some(first);
        while let Some(update) = next {
            let kind = update.kind;
            if self.wiring.index.handle_update(update, now()) {
                self.mark();
                if kind == Kind::Network {
                    self.say_network();
                }
            }
            next = self.wiring.updates.try_recv().ok();
        }
    }

    /// Without the network's document nothing is decided, so its faults are worth a line.
    fn say_network(&self) {
        let view = self.wiring.index.view();
        if let Some(network) = view.network() {
            tracing::info!(network = %network.id, ipv4 = %network.ipv4, ipv6 = %network.ipv6, "the network's document is known");
            return;
        }
        let faults: Vec<String> = view
            .faults()
            .filter(|(kind, _, _)| *kind == Kind::Network)
            .flat_map(|(_, _, faults)| faults.iter().map(ToString::to_string))
            .collect();
        if faults.is_empty() {
            tracing::warn!(
                config_map = keystone_mesh_api::NETWORK_CONFIG_MAP,
                "there is no network document yet; the daemon on the control-plane host writes it, with `registry = \
                 \"kubernetes\"`"
            );
        } else {
            tracing::error!(
                config_map = keystone_mesh_api::NETWORK_CONFIG_MAP, network_key = %view.network_id(),
                "the network's document does not count: {}; is the Secret with the network key of this network?",
                faults.join("; ")
            );
        }
    }

    fn handle_written(&mut self, (action, applied, took): (Action, Applied, Duration)) {
        let part = Part::of(&action.effect);
        let Applied { outcome, object, error, code } = applied;
        let metrics = &self.wiring.metrics;
        metrics.actions.get_or_create(&ActionLabels { kind: part.kind, result: outcome.label() }).inc();
        metrics.write_duration.observe(took.as_secs_f64());
        if let Some(code) = code {
            metrics.api_errors.get_or_create(&ErrorLabels { during: "write", code: code.to_string() }).inc();
        }
        let failures = self.queue.handle_outcome(&action.effect, outcome, Instant::now());
        let (kind, name, reason) = (part.kind, &part.name, &action.reason);
        match outcome {
            Outcome::Done => {
                tracing::info!(action = kind, object = %name, reason, "done");
                action.events.into_iter().for_each(|event| self.wiring.recorder.record(event));
            }
            Outcome::Conflict if failures >= FOUGHT => tracing::warn!(
                action = kind, object = %name, reason, error, failures,
                "this is always another than the watch shows; does something else write it, or hide it (a page of the \
                 ledger without its label)?"
            ),
            Outcome::Conflict | Outcome::Gone | Outcome::Dropped => {
                tracing::debug!(action = kind, object = %name, reason, error, "overtaken");
            }
            Outcome::Refused => tracing::error!(
                action = kind, object = %name, reason, error,
                "the API server refuses this; does the controller's ClusterRole allow it, and do the CRDs fit its version?"
            ),
            Outcome::Failed => tracing::warn!(action = kind, object = %name, reason, error, "failed; trying again"),
        }
        if let Some(object) = object {
            self.wiring.index.handle_answer(object);
        } else if outcome == Outcome::Gone
            && let decide::Effect::Ledger { edit, .. } = &action.effect
        {
            let name = format!("{}{}", keystone_mesh_api::LEDGER_PREFIX, edit.page);
            self.wiring.index.handle_deleted(Kind::LedgerPage, &name, now());
        }
        self.mark();
    }

    fn say_futile(&self, part: &Part, times: u32) {
        let labels = ActionLabels { kind: part.kind, result: metrics::FUTILE };
        self.wiring.metrics.actions.get_or_create(&labels).inc();
        if times >= FOUGHT_FOR_NOTHING {
            tracing::warn!(
                action = part.kind, object = %part.name, times,
                "the API server says that this is done, and the object stays as it was; do the CRDs fit this version \
                 (`keystone-controller crds`), and does an admission webhook take something out? Trying again, less and \
                 less often"
            );
        }
    }

    fn handle_leadership(&mut self, leads: bool) {
        self.wiring.metrics.leader.set(leads.into());
        if leads {
            self.wiring.index.handle_leading(now());
            self.mark();
            self.not_before = Instant::now();
        } else {
            self.queue.clear();
            (self.again_at, self.named_at, self.name_at) = (None, None, None);
            self.wiring.reporters.send_replace(Vec::new());
            self.show(&Gauges::default());
        }
    }

    fn mark(&mut self) {
        self.dirty.get_or_insert_with(Instant::now);
    }

    fn wake_at(&self) -> Instant {
        let now = Instant::now();
        let due = self.decision_due(now);
        due.into_iter().chain([now + TURN]).min().unwrap_or(now + TURN)
    }

    /// When the next decision is due, where one is: after a change, when a failed part has rested, or when time will
    /// have changed the answer.
    fn decision_due(&self, now: Instant) -> Option<Instant> {
        if !self.wiring.leadership.holds(now) || !self.wiring.index.view().is_complete() {
            return None;
        }
        let gathered = self.dirty.map(|since| since + GATHER);
        let wanted = [gathered, self.again_at, self.name_at, self.queue.rested_at()].into_iter().flatten().min();
        wanted.map(|at| at.max(self.not_before))
    }

    fn decide_when_due(&mut self) {
        let began = Instant::now();
        if self.decision_due(began).is_none_or(|due| began < due) {
            return;
        }
        let wall = now();
        let decision = decide::reconcile(self.wiring.index.view(), wall);
        self.name_reporters(began);
        let took = began.elapsed();
        self.wiring.metrics.reconcile_duration.observe(took.as_secs_f64());
        tracing::debug!(actions = decision.actions.len(), ?took, "decided");
        self.show(&decision.gauges);
        for (part, times) in self.queue.handle_decision(decision.actions, began) {
            self.say_futile(&part, times);
        }
        self.dirty = None;
        self.again_at = decision.again_at.map(|at| began + Duration::from_millis(at.saturating_sub(wall)));
        self.not_before = began + took * SHARE + GATHER;
    }

    fn name_reporters(&mut self, now: Instant) {
        if let Some(again) = self.named_at.map(|at| at + REPORTERS).filter(|again| now < *again) {
            self.name_at = Some(again);
            return;
        }
        (self.named_at, self.name_at) = (Some(now), None);
        let reporters = decide::reporters(self.wiring.index.view());
        self.wiring.reporters.send_if_modified(|known| {
            let changed = *known != reporters;
            *known = reporters;
            changed
        });
    }

    fn send(&mut self) {
        while let Some(action) = self.queue.take_next() {
            let applier = self.wiring.applier.clone();
            self.writes.spawn(async move {
                let began = Instant::now();
                let applied = applier.apply(action.effect.clone()).await;
                (action, applied, began.elapsed())
            });
        }
        self.wiring.metrics.queued.set(self.queue.waiting() as i64);
        self.wiring.metrics.in_flight.set(self.queue.busy() as i64);
    }

    fn show(&self, gauges: &Gauges) {
        let metrics = &self.wiring.metrics;
        show_states(&metrics.nodes, &gauges.machines);
        show_states(&metrics.ready_nodes, &gauges.ready);
        show_states(&metrics.peers, &gauges.peers);
        show_states(&metrics.join_tokens, &gauges.tokens);
        let free = gauges.addresses_total.saturating_sub(gauges.addresses_held);
        show_states(&metrics.addresses, &[("held", gauges.addresses_held), ("free", free)].into());
        metrics.absent_members.set(gauges.members_absent as i64);
        metrics.refused_routes.set(gauges.routes_refused as i64);
        metrics.faulty_objects.clear();
        for (resource, count) in &gauges.faults {
            metrics.faulty_objects.get_or_create(&metrics::Resource::of(resource)).set(*count as i64);
        }
    }
}

/// States that are not told of any longer are taken away.
fn show_states(family: &Family<State, Gauge>, states: &BTreeMap<&'static str, u64>) {
    family.clear();
    for (state, count) in states {
        family.get_or_create(&State::of(state)).set(*count as i64);
    }
}

/// Milliseconds since 1970.
fn now() -> Now {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
