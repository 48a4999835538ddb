//! The embedded registry's store: what the control plane knows, in redb.
//!
//! One transaction for each decision: the entry, the token's remaining uses and the host number are stored together or
//! not at all, and are on disk before anyone hears of them. A copy of the entries is kept in memory for readers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use ipnet::IpNet;
use keystone_mesh_core::admission::{self, JoinRefusal, Known, PublishRefusal};
use keystone_mesh_core::facts::Malformed;
use keystone_mesh_core::network::{Network, SignedNetwork};
use keystone_mesh_core::node::{Entry, NodeName, SignedApproval, SignedRecord};
use keystone_mesh_core::token::{NamePattern, TokenId, TokenRecord, TokenSecret};
use keystone_mesh_core::{Identity, NodeId};
use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use tokio::sync::broadcast;

use crate::lifeline::{Lifeline, Watch};
use crate::registry::backend::{CHANGES, Change, Watched};

const NODES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("nodes");
const TOKENS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("tokens");
const RELEASED: TableDefinition<'_, u32, u64> = TableDefinition::new("released");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be opened.
    #[error("the registry {path} cannot be opened: {why}; it was left as it is", path = path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The reason.
        why: String,
    },
    /// There is no network in it.
    #[error("the registry holds no network; run `keystone-mesh init` first")]
    Empty,
    /// A value does not read back.
    #[error("the registry's {what} does not read back: {why}")]
    Damaged {
        /// Which value.
        what: String,
        /// The reason.
        why: String,
    },
    /// The disk or the database refused.
    #[error("the registry cannot be written: {0}")]
    Write(String),
    /// The network's document would be refused by its readers.
    #[error("the network cannot be so: {0}")]
    Network(#[from] Malformed),
    /// Not let in.
    #[error(transparent)]
    Join(#[from] JoinRefusal),
    /// Not published.
    #[error(transparent)]
    Publish(#[from] PublishRefusal),
    /// No such node.
    #[error("there is no node `{0}`; `keystone-mesh peers` lists them")]
    NoSuchNode(NodeName),
    /// No such token.
    #[error("there is no token `{0}`; `keystone-mesh token list` lists them")]
    NoSuchToken(TokenId),
    /// The control plane cannot remove itself.
    #[error("`{0}` is the control plane itself; it cannot be removed from its own network")]
    OwnNode(NodeName),
}

/// What a token is made with.
#[derive(Clone, Debug, Default)]
pub struct TokenTerms {
    /// Seconds of life; none for ever.
    pub ttl: Option<u64>,
    /// How many nodes may join with it; none any number.
    pub uses: Option<u32>,
    /// Which names it is good for.
    pub names: Option<NamePattern>,
    /// Networks that its nodes may be the way to.
    pub routes: Vec<IpNet>,
}

#[derive(Debug)]
struct Memory {
    network: SignedNetwork,
    entries: BTreeMap<NodeName, Entry>,
    released: BTreeMap<u32, u64>,
    next_host: u32,
}

impl Memory {
    fn known(&self) -> Known<'_> {
        Known {
            network: self.network.get(),
            entries: &self.entries,
            released: &self.released,
            next_host: self.next_host,
        }
    }
}

/// The control plane's registry.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    db: Mutex<Option<Database>>,
    identity: Identity,
    memory: Mutex<Memory>,
    changes: broadcast::Sender<Change>,
    lifeline: Lifeline,
}

impl Store {
    /// Makes a store with a network in it; `identity` is the network key.
    pub fn create(path: &Path, identity: Identity, network: Network) -> Result<Self, StoreError> {
        let db =
            Database::create(path).map_err(|error| StoreError::Open { path: path.into(), why: error.to_string() })?;
        let network = network.sign(&identity)?;
        let write = db.begin_write().map_err(write_error)?;
        write.open_table(NODES).map_err(write_error)?;
        write.open_table(TOKENS).map_err(write_error)?;
        write.open_table(RELEASED).map_err(write_error)?;
        put(&write, META, "network", &network)?;
        put(&write, META, "next-host", &1_u32)?;
        write.commit().map_err(write_error)?;
        drop(db);
        Self::open(path, identity)
    }

    /// Opens the store. One process at a time may.
    pub fn open(path: &Path, identity: Identity) -> Result<Self, StoreError> {
        let db = open(path)?;
        let memory = load(&db)?;
        if memory.network.get().id != identity.id() {
            let why = "it belongs to another network key than this machine's secret".into();
            return Err(StoreError::Open { path: path.into(), why });
        }
        let (path, db) = (path.to_owned(), Mutex::new(Some(db)));
        let (changes, _) = broadcast::channel(CHANGES);
        Ok(Self { path, db, identity, memory: Mutex::new(memory), changes, lifeline: Lifeline::default() })
    }

    /// Watches for the moment when the file can be opened again.
    pub fn watch_end(&self) -> Watch {
        self.lifeline.watch()
    }

    /// Everything, and the changes from then on, without a gap. There are no plain peers: those stand in configurations.
    pub fn watch(&self) -> Watched {
        let memory = self.memory();
        Watched {
            network: memory.network.clone(),
            entries: memory.entries.values().cloned().collect(),
            peers: Vec::new(),
            changes: self.changes.subscribe(),
        }
    }

    /// Whether what is in here was brought over to Kubernetes, which is the truth since then.
    pub fn is_moved(&self) -> Result<bool, StoreError> {
        self.with(|db| {
            let table = db.begin_read().map_err(write_error)?.open_table(META).map_err(write_error)?;
            Ok(table.get("moved").map_err(write_error)?.is_some())
        })
    }

    /// Notes that all of it was brought over to Kubernetes.
    pub fn set_moved(&self) -> Result<(), StoreError> {
        self.write(|write| put(write, META, "moved", &true))
    }

    /// The network's document.
    pub fn network(&self) -> SignedNetwork {
        self.memory().network.clone()
    }

    /// One node by name.
    pub fn entry(&self, name: &NodeName) -> Option<Entry> {
        self.memory().entries.get(name).cloned()
    }

    /// Every node's name.
    pub fn names(&self) -> Vec<NodeName> {
        self.memory().entries.keys().cloned().collect()
    }

    /// Changes the network's document where `edit` changes anything.
    pub fn edit_network(&self, edit: impl FnOnce(&mut Network)) -> Result<(), StoreError> {
        let mut memory = self.memory();
        let mut network = memory.network.get().clone();
        edit(&mut network);
        if network == *memory.network.get() {
            return Ok(());
        }
        network.serial += 1;
        let network = network.sign(&self.identity)?;
        self.write(|write| put(write, META, "network", &network))?;
        memory.network = network.clone();
        self.tell(Change::Network(Box::new(network)));
        Ok(())
    }

    /// Lets a node in, or says why not. `now` in seconds since 1970.
    pub fn join(
        &self,
        client: NodeId,
        record: SignedRecord,
        token: TokenId,
        secret: &TokenSecret,
        now: u64,
    ) -> Result<SignedApproval, StoreError> {
        let mut memory = self.memory();
        let stored = self.token(token)?;
        let grant = admission::decide_join(memory.known(), client, record.get(), stored.as_ref(), secret, now)?;
        let spent = match stored {
            Some(TokenRecord { uses_left: Some(left), .. }) if grant.spends_use => {
                stored.map(|token| TokenRecord { uses_left: Some(left.saturating_sub(1)), ..token })
            }
            _ => None,
        };
        self.admit(&mut memory, grant, record, spent.as_ref())
    }

    /// Stores the control-plane host's own record; its approval follows the routes that the record asks for.
    pub fn publish_own(&self, record: SignedRecord, now: u64) -> Result<(), StoreError> {
        let own = self.identity.id();
        let same_routes = self
            .entry(&record.get().name)
            .is_some_and(|entry| entry.approved(own).is_some_and(|approval| approval.routes == record.get().routes));
        if same_routes { self.publish(own, record) } else { self.enter_own(record, now).map(|_| ()) }
    }

    /// Enters the control-plane host itself, with what its record asks for.
    pub fn enter_own(&self, record: SignedRecord, now: u64) -> Result<SignedApproval, StoreError> {
        let mut memory = self.memory();
        let grant = admission::decide_own(memory.known(), record.get(), now)?;
        self.admit(&mut memory, grant, record, None)
    }

    fn admit(
        &self,
        memory: &mut Memory,
        grant: admission::Grant,
        record: SignedRecord,
        spent: Option<&TokenRecord>,
    ) -> Result<SignedApproval, StoreError> {
        let approval = grant.approval.sign(&self.identity);
        let entry = Entry { record, approval: Some(approval.clone()) };
        self.write(|write| {
            put(write, NODES, entry.name().as_str(), &entry)?;
            if let Some(token) = spent {
                put(write, TOKENS, &token.id.to_string(), token)?;
            }
            if let Some(host) = grant.host {
                put(write, META, "next-host", &(host + 1))?;
                write.open_table(RELEASED).map_err(write_error)?.remove(host).map_err(write_error)?;
            }
            Ok(())
        })?;
        if let Some(host) = grant.host {
            memory.next_host = host + 1;
            memory.released.remove(&host);
        }
        memory.entries.insert(entry.name().clone(), entry.clone());
        self.tell(Change::Node(Box::new(entry)));
        Ok(approval)
    }

    /// Stores a member's record.
    pub fn publish(&self, client: NodeId, record: SignedRecord) -> Result<(), StoreError> {
        let mut memory = self.memory();
        if !admission::decide_publish(memory.known(), client, record.get())? {
            return Ok(());
        }
        let approval = memory.entries.get(&record.get().name).and_then(|entry| entry.approval.clone());
        let entry = Entry { record, approval };
        self.write(|write| put(write, NODES, entry.name().as_str(), &entry))?;
        memory.entries.insert(entry.name().clone(), entry.clone());
        self.tell(Change::Node(Box::new(entry)));
        Ok(())
    }

    /// Forgets a node; its addresses rest before another gets them. `now` in seconds since 1970.
    pub fn remove(&self, name: &NodeName, now: u64) -> Result<(), StoreError> {
        let mut memory = self.memory();
        let entry = memory.entries.get(name).ok_or_else(|| StoreError::NoSuchNode(name.clone()))?;
        if entry.record.get().identity == self.identity.id() {
            return Err(StoreError::OwnNode(name.clone()));
        }
        let network = memory.network.get();
        let host = entry.approved(network.id).and_then(|approval| admission::host_of(network, approval));
        self.write(|write| {
            write.open_table(NODES).map_err(write_error)?.remove(name.as_str()).map_err(write_error)?;
            if let Some(host) = host {
                write.open_table(RELEASED).map_err(write_error)?.insert(host, now).map_err(write_error)?;
            }
            Ok(())
        })?;
        memory.entries.remove(name);
        memory.released.extend(host.map(|host| (host, now)));
        self.tell(Change::Removed(name.clone()));
        Ok(())
    }

    /// Makes a token and keeps its hash. `id` and `secret` are random; `now` in seconds since 1970.
    pub fn create_token(
        &self,
        id: TokenId,
        secret: &TokenSecret,
        terms: TokenTerms,
        now: u64,
    ) -> Result<TokenRecord, StoreError> {
        let token = TokenRecord {
            id,
            hash: secret.hash(),
            created: now,
            expires: terms.ttl.map(|ttl| now.saturating_add(ttl)),
            uses_left: terms.uses,
            names: terms.names,
            routes: terms.routes,
            revoked: false,
        };
        self.put_token(&token)?;
        Ok(token)
    }

    /// Every token, by age.
    pub fn tokens(&self) -> Result<Vec<TokenRecord>, StoreError> {
        let mut tokens = self.with(|db| {
            let table = db.begin_read().map_err(write_error)?.open_table(TOKENS).map_err(write_error)?;
            let mut tokens = Vec::new();
            for row in table.iter().map_err(write_error)? {
                let (id, json) = row.map_err(write_error)?;
                tokens.push(decode::<TokenRecord>(&format!("token {}", id.value()), json.value())?);
            }
            Ok(tokens)
        })?;
        tokens.sort_by_key(|token| token.created);
        Ok(tokens)
    }

    /// Takes a token back. Nodes that joined with it stay.
    pub fn revoke_token(&self, id: TokenId) -> Result<(), StoreError> {
        let token = self.token(id)?.ok_or(StoreError::NoSuchToken(id))?;
        self.put_token(&TokenRecord { revoked: true, ..token })
    }

    fn token(&self, id: TokenId) -> Result<Option<TokenRecord>, StoreError> {
        self.with(|db| {
            let table = db.begin_read().map_err(write_error)?.open_table(TOKENS).map_err(write_error)?;
            let row = table.get(id.to_string().as_str()).map_err(write_error)?;
            row.map(|json| decode(&format!("token {id}"), json.value())).transpose()
        })
    }

    fn put_token(&self, token: &TokenRecord) -> Result<(), StoreError> {
        self.write(|write| put(write, TOKENS, &token.id.to_string(), token))
    }

    /// One transaction: all of it is on disk when this returns, or nothing.
    fn write(&self, fill: impl FnOnce(&redb::WriteTransaction) -> Result<(), StoreError>) -> Result<(), StoreError> {
        self.with(|db| {
            let write = db.begin_write().map_err(write_error)?;
            fill(&write)?;
            write.commit().map_err(write_error)
        })
    }

    /// redb refuses everything after an error of the disk, such as a full one, until the file is opened again. So it is
    /// closed after an error, and the next use opens it.
    fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut slot = self.db.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let db = match slot.take() {
            Some(db) => db,
            None => open(&self.path)?,
        };
        let done = work(&db);
        if !matches!(done, Err(StoreError::Write(_))) {
            *slot = Some(db);
        }
        done
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn tell(&self, change: Change) {
        // No receiver is no error: then nobody watches.
        let _ = self.changes.send(change);
    }
}

fn open(path: &Path) -> Result<Database, StoreError> {
    builder().open(path).map_err(|error| StoreError::Open { path: path.into(), why: error.to_string() })
}

/// redb's own default cache is 1 GiB; a mesh of 5,000 nodes is a few megabytes.
fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(4 << 20);
    builder
}

fn load(db: &Database) -> Result<Memory, StoreError> {
    let read = db.begin_read().map_err(write_error)?;
    let meta = read.open_table(META).map_err(|_| StoreError::Empty)?;
    let network = meta.get("network").map_err(write_error)?.ok_or(StoreError::Empty)?;
    let network: SignedNetwork = decode("network document", network.value())?;
    let next_host = match meta.get("next-host").map_err(write_error)? {
        Some(json) => decode("next host number", json.value())?,
        None => 1,
    };
    let mut entries = BTreeMap::new();
    for row in read.open_table(NODES).map_err(write_error)?.iter().map_err(write_error)? {
        let (name, json) = row.map_err(write_error)?;
        // One malformed node never stops the others.
        match decode::<Entry>(&format!("node {}", name.value()), json.value()) {
            Ok(entry) => drop(entries.insert(entry.name().clone(), entry)),
            Err(error) => tracing::error!(%error, "a node in the registry is ignored"),
        }
    }
    let mut released = BTreeMap::new();
    for row in read.open_table(RELEASED).map_err(write_error)?.iter().map_err(write_error)? {
        let (host, at) = row.map_err(write_error)?;
        released.insert(host.value(), at.value());
    }
    Ok(Memory { network, entries, released, next_host })
}

fn decode<T: serde::de::DeserializeOwned>(what: &str, json: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(json).map_err(|error| StoreError::Damaged { what: what.to_owned(), why: error.to_string() })
}

fn put<T: serde::Serialize>(
    write: &redb::WriteTransaction,
    table: TableDefinition<'_, &str, &[u8]>,
    key: &str,
    value: &T,
) -> Result<(), StoreError> {
    let json = serde_json::to_vec(value).map_err(write_error)?;
    write.open_table(table).map_err(write_error)?.insert(key, json.as_slice()).map_err(write_error)?;
    Ok(())
}

fn write_error(error: impl std::fmt::Display) -> StoreError {
    StoreError::Write(error.to_string())
}

#[cfg(test)]
mod tests {
    use keystone_mesh_core::Secret;
    use keystone_mesh_core::network::{DEFAULT_IPV4, default_ipv6};
    use keystone_mesh_core::node::NodeRecord;
    use keystone_mesh_core::path::Nat;

    use super::*;

    fn identity(byte: u8) -> Identity {
        Secret::from_bytes([byte; 32]).identity()
    }

    fn record(byte: u8, name: &str, seq: u64) -> SignedRecord {
        let identity = identity(byte);
        NodeRecord {
            name: name.parse().unwrap(),
            identity: identity.id(),
            public_key: Secret::from_bytes([byte; 32]).wireguard(0).public_key(),
            endpoints: vec![],
            nat: Nat::Unknown,
            relays: vec![],
            routes: vec![],
            seq,
        }
        .sign(&identity)
    }

    fn store(dir: &Path) -> Store {
        let id = identity(1).id();
        let network = Network {
            id,
            ipv4: DEFAULT_IPV4.parse().unwrap(),
            ipv6: default_ipv6(id),
            relays: vec![],
            gateways: vec![],
            serial: 1,
        };
        Store::create(&dir.join("registry.redb"), identity(1), network).unwrap()
    }

    fn token(store: &Store, uses: Option<u32>) -> (TokenId, TokenSecret) {
        let (id, secret) = (TokenId::from_bytes([7; 8]), TokenSecret::from_bytes([8; 20]));
        store.create_token(id, &secret, TokenTerms { uses, ..TokenTerms::default() }, 0).unwrap();
        (id, secret)
    }

    #[test]
    fn a_join_is_on_disk_before_anyone_hears_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        store.enter_own(record(1, "home", 1), 0).unwrap();
        let (id, secret) = token(&store, Some(1));
        let mut changes = store.watch().changes;
        let approval = store.join(identity(2).id(), record(2, "w", 1), id, &secret, 10).unwrap();
        assert_eq!(approval.get().addresses[0].to_string(), "10.98.0.2/32");
        assert!(matches!(changes.try_recv().unwrap(), Change::Node(_)));
        drop(store);
        let again = Store::open(&dir.path().join("registry.redb"), identity(1)).unwrap();
        assert_eq!(again.names().len(), 2);
        assert_eq!(again.tokens().unwrap()[0].uses_left, Some(0));
        let refused = again.join(identity(3).id(), record(3, "x", 1), id, &secret, 10).unwrap_err();
        assert!(refused.to_string().contains("used up"), "{refused}");
    }

    #[test]
    fn two_joins_at_once_spend_one_use_once() {
        let dir = tempfile::tempdir().unwrap();
        let store = std::sync::Arc::new(store(dir.path()));
        let (id, secret) = token(&store, Some(3));
        let joins: Vec<_> = (2..12)
            .map(|byte| {
                let (store, secret) = (store.clone(), secret.clone());
                std::thread::spawn(move || {
                    store.join(identity(byte).id(), record(byte, &format!("w{byte}"), 1), id, &secret, 10).is_ok()
                })
            })
            .collect();
        let let_in = joins.into_iter().map(|join| join.join().unwrap()).filter(|ok| *ok).count();
        assert_eq!(let_in, 3);
    }

    #[test]
    fn removed_nodes_are_gone_and_the_control_plane_is_not_removable() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        store.enter_own(record(1, "home", 1), 0).unwrap();
        let (id, secret) = token(&store, None);
        store.join(identity(2).id(), record(2, "w", 1), id, &secret, 10).unwrap();
        assert!(matches!(store.remove(&"home".parse().unwrap(), 20), Err(StoreError::OwnNode(_))));
        store.remove(&"w".parse().unwrap(), 20).unwrap();
        assert!(matches!(store.remove(&"w".parse().unwrap(), 20), Err(StoreError::NoSuchNode(_))));
        let refused = store.publish(identity(2).id(), record(2, "w", 2)).unwrap_err();
        assert!(refused.to_string().contains("not in the network"), "{refused}");
        let approval = store.join(identity(3).id(), record(3, "x", 1), id, &secret, 30).unwrap();
        assert_eq!(approval.get().addresses[0].to_string(), "10.98.0.3/32", "the address of `w` rests");
    }

    #[test]
    fn the_control_planes_approval_changes_only_with_its_routes() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let serial = |store: &Store| store.entry(&"home".parse().unwrap()).unwrap().approval.unwrap().get().serial;
        store.enter_own(record(1, "home", 1), 0).unwrap();
        store.publish_own(record(1, "home", 2), 0).unwrap();
        assert_eq!(serial(&store), 1);
        let identity = identity(1);
        let routes = vec!["10.42.0.0/24".parse().unwrap()];
        let routed = NodeRecord { routes, seq: 3, ..record(1, "home", 3).get().clone() }.sign(&identity);
        store.publish_own(routed, 0).unwrap();
        assert_eq!(serial(&store), 2);
    }

    #[test]
    fn another_networks_store_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(store(dir.path()));
        let error = Store::open(&dir.path().join("registry.redb"), identity(9)).unwrap_err();
        assert!(error.to_string().contains("another network key"), "{error}");
    }

    #[test]
    fn a_damaged_store_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registry.redb");
        std::fs::write(&path, b"rubbish").unwrap();
        assert!(matches!(Store::open(&path, identity(1)), Err(StoreError::Open { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"rubbish");
    }

    #[test]
    fn an_unchanged_document_keeps_its_serial() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        store.edit_network(|_| {}).unwrap();
        assert_eq!(store.network().get().serial, 1);
        store.edit_network(|network| network.gateways.push("vpn.example.org:51840".parse().unwrap())).unwrap();
        assert_eq!(store.network().get().serial, 2);
    }
}
