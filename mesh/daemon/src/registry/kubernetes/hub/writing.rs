//! The hub's hand: what is ordered becomes writes, and what a write is answered with becomes known.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::Instant;

use keystone_mesh_api::NETWORK_CONFIG_MAP;
use keystone_mesh_core::annotations;
use keystone_mesh_core::directory::{self, Carrier};
use keystone_mesh_core::network::SignedNetwork;
use keystone_mesh_core::node::{NodeName, SignedRecord};

use super::Heard;
use super::work::{Kind, Work};
use crate::kube_api::watch::Object;
use crate::registry::kubernetes::desk::{Failure, Mender, Write};
use crate::registry::kubernetes::write;

/// Writes under way at once.
const WRITES: usize = 16;

/// The network's ConfigMap.
#[derive(Debug)]
pub(super) struct Document {
    wanted: Option<SignedNetwork>,
    there: Option<BTreeMap<String, String>>,
    mender: Mender,
}

impl Document {
    /// One that is not wanted yet. Different daemons take different seeds.
    pub(super) fn new(seed: u64) -> Self {
        Self { wanted: None, there: None, mender: Mender::new(seed) }
    }

    /// What stands in Kubernetes; none: nothing.
    pub(super) fn set_there(&mut self, data: Option<BTreeMap<String, String>>) {
        self.there = data;
    }

    /// What is to be written, where it differs and it is time.
    fn due(&mut self, now: Instant) -> Option<(Instant, SignedNetwork)> {
        let wanted = self.wanted.as_ref()?;
        if self.there.as_ref() == Some(&wanted.to_map()) {
            self.mender.handle_settled();
            return None;
        }
        Some((self.mender.due(now)?, wanted.clone()))
    }
}

/// A write that was answered.
pub(super) enum Done {
    Record(Write, Result<Object, Failure>),
    Document(Result<Object, Failure>),
}

impl Work {
    pub(super) fn take_orders(&mut self) {
        let orders = std::mem::take(&mut *self.orders.lock().unwrap_or_else(PoisonError::into_inner));
        for (name, record) in orders.records {
            match record {
                Some(record) => {
                    self.mirror(&name, &record);
                    self.desk.want(record);
                }
                None => self.desk.forget(&name),
            }
        }
        if let Some(network) = orders.document {
            self.document.wanted = Some(network.clone());
            self.document.mender.handle_wanted();
            self.set_network(network);
        }
    }

    /// A record is its node's word whoever carries it: readers hear it at once, whether or not the API server answers.
    fn mirror(&mut self, name: &NodeName, record: &SignedRecord) {
        let known = [Carrier::Node, Carrier::Member].into_iter().find(|carrier| self.desk.is_there(*carrier, name));
        let Some(carrier) = known else { return };
        let object = directory::Object { name: name.to_string(), annotations: annotations::of_record(record) };
        let changes = self.directory.handle_object(carrier, &object);
        self.take(changes);
    }

    /// Starts what is due, and says when something is next.
    pub(super) fn begin_writes(&mut self) -> Option<Instant> {
        let now = Instant::now();
        while self.writes.len() < WRITES
            && let Some(write) = self.desk.poll(now)
        {
            let access = self.access.clone();
            self.writes.spawn(async move {
                let done = write::record(&access, &write).await;
                Done::Record(write, done)
            });
        }
        // Only once it was seen what is there: a write that changes nothing is a write all the same.
        let seen = self.heard.get(&Kind::Network).is_some_and(|heard| *heard != Heard::Waiting);
        let document = self.document.due(now).filter(|_| seen);
        let document_at = match document {
            Some((at, network)) if at <= now => {
                self.document.mender.handle_started();
                let access = self.access.clone();
                self.writes.spawn(async move { Done::Document(write::document(&access, &network).await) });
                None
            }
            Some((at, _)) => Some(at),
            None => None,
        };
        let desk_at = if self.writes.len() < WRITES { self.desk.next_at(now) } else { None };
        self.tell_warnings();
        desk_at.into_iter().chain(document_at).min()
    }

    pub(super) fn written(&mut self, done: Done) {
        let now = Instant::now();
        let failed = match &done {
            Done::Record(_, answer) => answer.is_err(),
            Done::Document(answer) => answer.is_err(),
        };
        let mut view = self.view();
        *if failed { &mut view.writes.failed } else { &mut view.writes.done } += 1;
        drop(view);
        match done {
            Done::Record(write, answer) => {
                if let Err(failure) = &answer {
                    tracing::debug!(name = %write.name, ?failure, "the record is not written");
                }
                self.desk.handle_written(&write, answer.as_ref(), now);
            }
            Done::Document(answer) => {
                self.document.mender.handle_done(answer.as_ref().map(|_| ()), now);
                if let Ok(object) = answer {
                    self.document.there = Some(object.data);
                }
            }
        }
    }

    fn tell_warnings(&self) {
        let records = self.desk.troubles().map(|(name, why)| format!("the record of `{name}` is not written: {why}"));
        let document = self.document.mender.why();
        let document = document.map(|why| format!("the ConfigMap {NETWORK_CONFIG_MAP} is not written: {why}"));
        let warnings: Vec<String> = records.chain(document).collect();
        let mut view = self.view();
        for warning in warnings.iter().filter(|warning| !view.warnings.contains(warning)) {
            tracing::warn!("{warning}");
        }
        view.warnings = warnings;
    }
}
