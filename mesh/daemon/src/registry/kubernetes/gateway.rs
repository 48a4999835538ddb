//! The gateway's backend in Kubernetes: lets machines in by token, and publishes for those without credentials.
//!
//! ```text
//!   join ──> JoinToken (hash, terms) ──> Member (identity, token; annotations: record) ──> controller
//!     ▲                                                                                       │
//!     └── approval, or condition Approved=False with reason and message ◄─────────────────────┘
//! ```
//!
//! The gateway proves the token; the controller decides, counts uses and gives addresses. While the API server is away
//! what is known is served, the latest record of every node waits to be written, and nobody is let in.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use keystone_mesh_api::{GATEWAY_MANAGER, JoinToken, JoinTokenSpec, Member, MemberSpec};
use keystone_mesh_core::admission::{self, JoinRefusal, Known};
use keystone_mesh_core::gateway::Refusal;
use keystone_mesh_core::network::SignedNetwork;
use keystone_mesh_core::node::{NodeName, SignedApproval, SignedRecord};
use keystone_mesh_core::token::{TokenId, TokenRecord, TokenRefusal, TokenSecret};
use keystone_mesh_core::{NodeId, annotations};
use kube::Api;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::time::Instant;

use super::hub::{Heard, Hub};
use super::members;
use crate::clock::unix_now;
use crate::kube_api::{status_code, words};
use crate::registry::Answer;
use crate::registry::backend::{Backend, Watched};
use crate::store::TokenTerms;

/// How long a join may take: a joiner waits ten seconds for its answer.
const JOIN_PATIENCE: Duration = Duration::from_secs(8);
/// Between two looks at a Member that waits for the controller.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long an old refusal is given to the controller to take back: the machine comes again with something better.
const OLD_REFUSAL: Duration = Duration::from_millis(1500);
/// HTTP: the object is not there.
const NOT_FOUND: u16 = 404;
/// HTTP: the object is there already, or another one meanwhile.
const CONFLICT: u16 = 409;

/// The backend of the gateway on the control-plane host.
#[derive(Debug)]
pub struct KubernetesBackend {
    hub: Arc<Hub>,
    /// Before the ConfigMap was ever read.
    founded: SignedNetwork,
}

impl KubernetesBackend {
    /// A backend on what the hub knows. `founded` is the network's document.
    pub fn new(hub: Arc<Hub>, founded: SignedNetwork) -> Self {
        Self { hub, founded }
    }

    async fn let_in(
        &self,
        client: NodeId,
        record: SignedRecord,
        token: TokenId,
        secret: &TokenSecret,
    ) -> Result<SignedApproval, Refusal> {
        self.available()?;
        let kube = self.client().await?;
        let id = token.to_string();
        let found = Api::<JoinToken>::all(kube.clone()).get_opt(&id).await.map_err(|error| unavailable(&error))?;
        let token = found.map(|found| token_record(&found, Some(client))).transpose().map_err(|why| {
            tracing::error!(token = id, why, "a JoinToken does not read");
            refuse("registry-unavailable", "the token's object in Kubernetes does not read; ask who made it")
        })?;
        self.check(client, &record, token.as_ref(), secret)?;
        let Some(token) = token else { return Err(refusal(&TokenRefusal::Unknown.into())) };
        let fresh = self.vouch(kube.clone(), client, &record, &token).await?;
        self.hub.want(record.clone());
        self.verdict(kube, &record, fresh).await
    }

    /// What can be told without the controller: a token that is none, a name or key that is another's.
    fn check(
        &self,
        client: NodeId,
        record: &SignedRecord,
        token: Option<&TokenRecord>,
        secret: &TokenSecret,
    ) -> Result<(), Refusal> {
        let released = BTreeMap::new();
        let decided = self.hub.look(|network, entries| {
            let network = network.unwrap_or(&self.founded).get();
            let known = Known { network, entries, released: &released, next_host: 1 };
            admission::decide_join(known, client, record.get(), token, secret, unix_now()).map(drop)
        });
        match decided {
            // Addresses and routes are the controller's, which knows more.
            Ok(()) | Err(JoinRefusal::AddressesExhausted(_) | JoinRefusal::RouteOverlap { .. }) => Ok(()),
            Err(error) => Err(refusal(&error)),
        }
    }

    /// Makes the Member, or lets this token vouch for the one that is there. Whether it was made.
    async fn vouch(
        &self,
        kube: kube::Client,
        client: NodeId,
        record: &SignedRecord,
        token: &TokenRecord,
    ) -> Result<bool, Refusal> {
        let (members, name) = (Api::<Member>::all(kube), &record.get().name);
        let spec = MemberSpec {
            identity: client.to_string(),
            token: Some(token.id.to_string()),
            routes: token.routes.iter().map(ToString::to_string).collect(),
        };
        let Some(there) = members.get_opt(name.as_str()).await.map_err(|error| unavailable(&error))? else {
            let mut member = Member::new(name.as_str(), spec);
            if !self.hub.is_node(name) {
                member.metadata.annotations = Some(annotations::of_record(record));
            }
            let params = PostParams { field_manager: Some(GATEWAY_MANAGER.into()), ..PostParams::default() };
            return match members.create(&params, &member).await {
                Ok(_) => Ok(true),
                Err(error) if status_code(&error) == Some(CONFLICT) => Err(refuse(
                    "registry-unavailable",
                    "another machine joins under this name at this moment; try again",
                )),
                Err(error) => Err(unavailable(&error)),
            };
        };
        if there.metadata.deletion_timestamp.is_some() {
            return Err(refuse("registry-unavailable", "the machine of this name is being removed; try again"));
        }
        if there.spec.identity != spec.identity {
            let known = there.spec.identity.chars().take(8).collect();
            return Err(refusal(&JoinRefusal::NameTaken { name: name.clone(), known }));
        }
        // Whom a person let in needs no token, and keeps what the person allowed.
        if there.spec.token.is_some() && there.spec != spec {
            let patch = json!({ "metadata": { "uid": there.metadata.uid }, "spec": spec });
            let params = PatchParams { field_manager: Some(GATEWAY_MANAGER.into()), ..PatchParams::default() };
            members.patch(name.as_str(), &params, &Patch::Merge(patch)).await.map_err(|error| unavailable(&error))?;
        }
        Ok(false)
    }

    /// Waits for the controller.
    async fn verdict(&self, kube: kube::Client, record: &SignedRecord, fresh: bool) -> Result<SignedApproval, Refusal> {
        let members = Api::<Member>::all(kube);
        let (name, started) = (&record.get().name, Instant::now());
        let mut changes = self.hub.changes();
        let mut look_at = started + LOOK_EVERY;
        while started.elapsed() < JOIN_PATIENCE {
            if let Some(approval) = self.approval(record) {
                return Ok(approval);
            }
            // Any change is a reason to look at what is known; the condition is asked for now and then.
            let told = tokio::time::timeout_at(look_at, changes.recv()).await;
            if told.is_ok() {
                continue;
            }
            look_at += LOOK_EVERY;
            let said = match members.get_opt(name.as_str()).await {
                Ok(member) => member.and_then(|member| refused(&member)),
                Err(error) => return Err(unavailable(&error)),
            };
            if let Some(refusal) = said
                && (fresh || started.elapsed() >= OLD_REFUSAL)
            {
                return Err(refusal);
            }
        }
        let message = "the controller has not let this machine in yet; it is known there, so try again. If it stays so, see \
                       `kubectl --namespace keystone-mesh get pods` and `kubectl describe members` on the control plane";
        Err(refuse("registry-unavailable", message))
    }

    /// The approval that is in force for the very machine, where it allows what the machine asks for.
    fn approval(&self, record: &SignedRecord) -> Option<SignedApproval> {
        let asked = record.get();
        self.hub.look(|_, entries| {
            let approval = entries.get(&asked.name)?.approval.as_ref()?;
            let given = approval.get();
            let in_force = given.network == self.hub.id() && given.identity == asked.identity && !given.is_revoked();
            let all = asked.routes.iter().all(|route| given.routes.contains(route));
            (in_force && all).then(|| approval.clone())
        })
    }

    fn available(&self) -> Result<(), Refusal> {
        let heard = self.hub.heard().borrow().clone();
        match heard {
            Heard::Current => Ok(()),
            Heard::Waiting => Err(refuse("registry-unavailable", "the control plane is starting; try again")),
            Heard::Lost(why) | Heard::Unauthorized(why) => Err(refuse(
                "registry-unavailable",
                &format!(
                    "the control plane cannot let anybody in while it does not hear Kubernetes ({why}); try again"
                ),
            )),
        }
    }

    async fn client(&self) -> Result<kube::Client, Refusal> {
        self.hub.access().client().await.map_err(|error| refuse("registry-unavailable", &error.to_string()))
    }

    async fn tokens_api(&self) -> Result<Api<JoinToken>, String> {
        self.hub.access().client().await.map(Api::all).map_err(|error| error.to_string())
    }
}

impl Backend for KubernetesBackend {
    fn watch(&self) -> Watched {
        self.hub.watch().unwrap_or_else(|| Watched {
            network: self.founded.clone(),
            entries: Vec::new(),
            peers: Vec::new(),
            changes: self.hub.changes(),
        })
    }

    fn network(&self) -> SignedNetwork {
        self.hub.look(|network, _| network.cloned()).unwrap_or_else(|| self.founded.clone())
    }

    fn join<'a>(
        &'a self,
        client: NodeId,
        record: SignedRecord,
        token: TokenId,
        secret: &'a TokenSecret,
    ) -> Answer<'a, Result<SignedApproval, Refusal>> {
        Box::pin(self.let_in(client, record, token, secret))
    }

    fn publish(&self, client: NodeId, record: SignedRecord) -> Answer<'_, Result<(), Refusal>> {
        let released = BTreeMap::new();
        let decided = self.hub.look(|network, entries| {
            let network = network.unwrap_or(&self.founded).get();
            let known = Known { network, entries, released: &released, next_host: 1 };
            admission::decide_publish(known, client, record.get())
        });
        Box::pin(std::future::ready(match decided {
            Ok(new) => {
                if new {
                    self.hub.want(record);
                }
                Ok(())
            }
            Err(error) => Err(refuse(error.code(), &error.to_string())),
        }))
    }

    fn leave<'a>(&'a self, client: NodeId, name: &'a NodeName) -> Answer<'a, Result<(), Refusal>> {
        Box::pin(async move {
            let own =
                self.hub.look(|_, entries| entries.get(name).is_none_or(|entry| entry.record.get().identity == client));
            if !own {
                return Ok(());
            }
            let code = if self.hub.is_node(name) { "is-node" } else { "registry-unavailable" };
            members::leave(&self.hub, name, client).await.map_err(|message| refuse(code, &message))
        })
    }

    fn remove<'a>(&'a self, name: &'a NodeName) -> Answer<'a, Result<(), String>> {
        Box::pin(async move {
            let own = self
                .hub
                .look(|_, entries| entries.get(name).is_some_and(|entry| entry.record.get().identity == self.hub.id()));
            if own {
                return Err(format!("`{name}` is the control plane itself; it cannot be removed from its own network"));
            }
            members::remove(&self.hub, name).await
        })
    }

    fn create_token<'a>(
        &'a self,
        id: TokenId,
        secret: &'a TokenSecret,
        terms: TokenTerms,
    ) -> Answer<'a, Result<TokenRecord, String>> {
        Box::pin(members::within(async move {
            let now = unix_now();
            let record = TokenRecord {
                id,
                hash: secret.hash(),
                created: now,
                expires: terms.ttl.map(|ttl| now.saturating_add(ttl)),
                uses_left: terms.uses,
                names: terms.names,
                routes: terms.routes,
                revoked: false,
            };
            let params = PostParams { field_manager: Some(GATEWAY_MANAGER.into()), ..PostParams::default() };
            let created = self.tokens_api().await?.create(&params, &join_token(&record)?).await;
            created.map(|_| record).map_err(|error| words(&error))
        }))
    }

    fn tokens(&self) -> Answer<'_, Result<Vec<TokenRecord>, String>> {
        Box::pin(members::within(async {
            let list = self.tokens_api().await?.list(&ListParams::default()).await.map_err(|error| words(&error))?;
            let mut tokens: Vec<TokenRecord> = Vec::new();
            for token in list {
                match token_record(&token, None) {
                    Ok(record) => tokens.push(record),
                    Err(why) => tracing::warn!(token = token.metadata.name, why, "a JoinToken does not read"),
                }
            }
            tokens.sort_by_key(|token| token.created);
            Ok(tokens)
        }))
    }

    fn revoke_token(&self, id: TokenId) -> Answer<'_, Result<(), String>> {
        Box::pin(members::within(async move {
            let patch = Patch::Merge(json!({ "spec": { "revoked": true } }));
            let params = PatchParams { field_manager: Some(GATEWAY_MANAGER.into()), ..PatchParams::default() };
            match self.tokens_api().await?.patch(&id.to_string(), &params, &patch).await {
                Ok(_) => Ok(()),
                Err(error) if status_code(&error) == Some(NOT_FOUND) => {
                    Err(format!("there is no token `{id}`; `keystone-mesh token list` lists them"))
                }
                Err(error) => Err(words(&error)),
            }
        }))
    }
}

/// A token as an object.
pub(super) fn join_token(record: &TokenRecord) -> Result<JoinToken, String> {
    let time = |seconds: u64| {
        let seconds = i64::try_from(seconds).map_err(|_| "the token's end is beyond all time".to_owned())?;
        Timestamp::from_second(seconds).map(Time).map_err(|error| format!("the token's end: {error}"))
    };
    let spec = JoinTokenSpec {
        hash: record.hash.to_string(),
        expires: record.expires.map(time).transpose()?,
        uses: record.uses_left,
        name_pattern: record.names.as_ref().map(ToString::to_string),
        routes: record.routes.iter().map(ToString::to_string).collect(),
        revoked: record.revoked,
    };
    Ok(JoinToken::new(&record.id.to_string(), spec))
}

/// An object as a token. A machine that used it already uses no more of it.
fn token_record(token: &JoinToken, client: Option<NodeId>) -> Result<TokenRecord, String> {
    let (spec, status) = (&token.spec, token.status.clone().unwrap_or_default());
    let seconds = |time: &Time| u64::try_from(time.0.as_second()).unwrap_or(0);
    let again = client.is_some_and(|client| status.joined.contains(&client.to_string()));
    let used = status.used.max(u32::try_from(status.joined.len()).unwrap_or(u32::MAX));
    let left = |uses: u32| uses.saturating_sub(used).max(u32::from(again));
    let routes: Result<Vec<_>, _> = spec.routes.iter().map(|route| route.parse()).collect();
    Ok(TokenRecord {
        id: token.metadata.name.as_deref().unwrap_or_default().parse()?,
        hash: spec.hash.parse()?,
        created: token.metadata.creation_timestamp.as_ref().map(seconds).unwrap_or(0),
        expires: spec.expires.as_ref().map(seconds),
        uses_left: spec.uses.map(left),
        names: spec.name_pattern.as_deref().map(str::parse).transpose()?,
        routes: routes.map_err(|error| format!("`routes`: {error}"))?,
        revoked: spec.revoked,
    })
}

/// What the controller says against a Member.
fn refused(member: &Member) -> Option<Refusal> {
    let conditions = &member.status.as_ref()?.conditions;
    let Condition { reason, message, .. } =
        conditions.iter().find(|condition| condition.type_ == "Approved" && condition.status == "False")?;
    Some(refuse(&code_of(reason), message))
}

/// A condition's reason as a refusal's code: `TokenUsedUp` is `token-used-up`.
fn code_of(reason: &str) -> String {
    let mut code = String::with_capacity(reason.len() + 4);
    for c in reason.chars() {
        if c.is_ascii_uppercase() && !code.is_empty() {
            code.push('-');
        }
        code.push(c.to_ascii_lowercase());
    }
    code
}

fn refuse(code: &str, message: &str) -> Refusal {
    Refusal { code: code.to_owned(), message: message.to_owned() }
}

fn refusal(error: &JoinRefusal) -> Refusal {
    refuse(error.code(), &error.to_string())
}

fn unavailable(error: &kube::Error) -> Refusal {
    tracing::warn!(error = words(error), "a join came to nothing");
    refuse("registry-unavailable", &format!("{}; nobody is let in meanwhile, try again", words(error)))
}

#[cfg(test)]
mod tests {
    use keystone_mesh_core::token::SECRET_LEN;

    use super::*;

    #[test]
    fn reasons_of_conditions_are_codes() {
        assert_eq!(code_of("TokenUsedUp"), TokenRefusal::UsedUp.code());
        assert_eq!(code_of("NameNotAllowed"), "name-not-allowed");
    }

    #[test]
    fn a_token_survives_its_object_and_counts_what_was_used() {
        let secret = TokenSecret::from_bytes([2; SECRET_LEN]);
        let record = TokenRecord {
            id: TokenId::from_bytes([1; 8]),
            hash: secret.hash(),
            created: 0,
            expires: Some(1_764_000_000),
            uses_left: Some(2),
            names: Some("worker-*".parse().unwrap()),
            routes: vec!["10.42.0.0/16".parse().unwrap()],
            revoked: false,
        };
        let mut token = join_token(&record).unwrap();
        assert_eq!(token_record(&token, None), Ok(record.clone()));
        let mine = NodeId::from_bytes([9; 32]);
        token.status = Some(keystone_mesh_api::JoinTokenStatus { used: 2, joined: vec![mine.to_string()] });
        assert_eq!(token_record(&token, None).unwrap().uses_left, Some(0));
        assert_eq!(token_record(&token, Some(mine)).unwrap().uses_left, Some(1), "it has used it already");
        token.spec.hash = "nonsense".into();
        assert!(token_record(&token, None).is_err());
    }
}
