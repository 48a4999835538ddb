//! `init`, `join`, `up`, `relay`, `remove` and `leave`.

use std::io::Read as _;
use std::time::Duration;

use anyhow::Context as _;
use keystone_mesh_core::token::Token;

use super::output::{print, print_json};
use super::{InitArgs, JoinArgs, RelayArgs, TokenArgs, UpArgs};
use crate::config::{Config, Places};
use crate::control::{self, ControlError, Request};
use crate::member::{self, Founding};
use crate::state::StateDir;
use crate::{daemon, join, relay};

pub(super) fn init(places: &Places, args: InitArgs) -> anyhow::Result<()> {
    let name = args.name.map_or_else(member::host_name, Ok)?;
    let founding = Founding { name, ipv4: args.ipv4, ipv6: args.ipv6, relays: args.relays, gateways: args.gateways };
    let lonely = founding.relays.is_empty() && founding.gateways.is_empty();
    let membership = member::init(&places.state_dir, founding)?;
    let addresses = membership.approval.as_ref().map(|approval| approval.get().addresses.clone()).unwrap_or_default();
    if args.json {
        return print_json(&serde_json::json!({
            "name": membership.name,
            "network": membership.network,
            "identity": membership.network,
            "addresses": addresses,
        }));
    }
    let addresses: Vec<String> = addresses.iter().map(|net| net.addr().to_string()).collect();
    let mut text = format!(
        "This host is the control plane `{}` of a new network.\n  network key  {}\n  addresses    {}\n",
        membership.name,
        membership.network,
        addresses.join("  ")
    );
    if lonely {
        text.push_str(&format!(
            "\nTo be reached from outside it needs a relay or a port-forward:\n  \
             on a public server:  keystone-mesh relay --network {}\n  \
             here:                keystone-mesh up --relay KEY@HOST:51840   (or --gateway HOST:51840)\n",
            membership.network
        ));
    } else {
        text.push_str("\nNext:  keystone-mesh up\nthen:  keystone-mesh token create\n");
    }
    print(&text)
}

pub(super) async fn join(places: &Places, args: JoinArgs) -> anyhow::Result<()> {
    let token = read_token(&args.token)?.context(
        "a token is needed: --token-file FILE (`-` for standard input), or KEYSTONE_MESH_TOKEN in the environment",
    )?;
    let name = args.name.map_or_else(member::host_name, Ok)?;
    let state = StateDir::open(&places.state_dir)?;
    let patience = Duration::from_secs(args.timeout.max(1));
    let membership = join::join(&state, &token, name, args.routes, patience).await?;
    let addresses = membership.approval.as_ref().map(|approval| approval.get().addresses.clone()).unwrap_or_default();
    if args.json {
        return print_json(&serde_json::json!({
            "name": membership.name,
            "network": membership.network,
            "addresses": addresses,
        }));
    }
    let addresses: Vec<String> = addresses.iter().map(|net| net.addr().to_string()).collect();
    print(&format!("joined as `{}`: {}\nNext:  keystone-mesh up\n", membership.name, addresses.join("  ")))
}

pub(super) async fn up(places: &Places, args: UpArgs) -> anyhow::Result<()> {
    let token = read_token(&args.token)?;
    let config = Config::load(args.options, args.config.as_deref())?;
    daemon::run(places, config, token).await
}

pub(super) async fn relay(places: &Places, args: &RelayArgs) -> anyhow::Result<()> {
    if args.print_key {
        let secret = match StateDir::open(&places.state_dir) {
            Ok(state) => state.secret_or_create()?,
            // A running relay holds the directory; its key can be read all the same.
            Err(locked) => StateDir::read_only(&places.state_dir).secret()?.ok_or(locked)?,
        };
        return print(&format!("{}\n", secret.identity().id()));
    }
    let state = StateDir::open(&places.state_dir)?;
    let secret = state.secret_or_create()?;
    let network = args.network.context("--network is missing")?;
    relay::run(secret.identity(), network, args.listen, &args.status_listen).await
}

pub(super) async fn remove(places: &Places, name: keystone_mesh_core::node::NodeName) -> anyhow::Result<()> {
    super::token::ask(places, Request::Remove { name: name.clone() }).await?;
    print(&format!("node `{name}` is removed; its addresses rest for a day before another node gets them\n"))
}

pub(super) async fn leave(
    places: &Places,
    interface: &str,
    cni_conf_dir: &std::path::Path,
    force: bool,
) -> anyhow::Result<()> {
    let asked = control::ask(&places.socket(), &Request::Leave { force }).await;
    if matches!(asked, Err(ControlError::NotRunning { .. })) {
        daemon::leave_offline(places, interface, cni_conf_dir, force).await?;
    } else {
        asked?;
    }
    print("left the network; interface, routes and state are gone\n")
}

fn read_token(args: &TokenArgs) -> anyhow::Result<Option<Token>> {
    /// A token is a few hundred characters.
    const LONGEST: u64 = 64 << 10;
    let text = match (&args.token_file, &args.token) {
        (Some(path), _) if path.as_os_str() == "-" => {
            let mut text = String::new();
            std::io::stdin().lock().take(LONGEST).read_to_string(&mut text)?;
            text
        }
        (Some(path), _) => {
            std::fs::read_to_string(path).with_context(|| format!("cannot read the token file {}", path.display()))?
        }
        (None, Some(text)) => text.clone(),
        (None, None) => return Ok(None),
    };
    Ok(Some(text.parse()?))
}
