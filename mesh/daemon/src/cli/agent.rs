//! `agent`: the DaemonSet's pod on a Node.

use anyhow::Context as _;

use super::AgentArgs;
use crate::agent::{self, Agent};
use crate::cni::installer::Installer;
use crate::cni::service::PodService;
use crate::config::{Config, Places, RegistryKind};
use crate::kube_api::access::ServiceAccount;
use crate::{daemon, member};

pub(super) async fn run(places: &Places, args: AgentArgs) -> anyhow::Result<()> {
    let mut config = Config::load(args.options, args.config.as_deref())?;
    let name = config.name.clone().map_or_else(member::host_name, Ok).context("which Node is this?")?;
    config.name = Some(name.clone());
    let account = ServiceAccount::in_directory(&args.service_account)?;
    let patience = std::time::Duration::from_secs(args.host_patience);
    let installer = Installer::start(&config.cni, places.facts());
    let agent =
        Agent { places: places.clone(), account: account.clone(), name, pods: PodService::of(&config), patience };
    match agent.serve(&config).await? {
        agent::End::Stopped => Ok(()),
        agent::End::NoHost => {
            drop(installer);
            tracing::info!("no daemon runs on this host; it is run here");
            config.registry = Some(RegistryKind::Kubernetes);
            config.service_account = Some(account);
            daemon::run(places, config, None).await
        }
    }
}
