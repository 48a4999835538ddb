//! The life of a node, from its first record to the end of its Node.

use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::events::v1::Event;
use keystone_mesh_core::ledger::Holder;
use kube::api::{Api, ListParams};

use crate::world::{Machine, PATIENCE, create, delete, in_world};

const AUTO: &[&str] = &["--approval=auto"];

#[test]
fn a_node_is_approved_and_its_address_given_back_when_it_goes() {
    in_world("approval::a_node_is_approved_and_its_address_given_back_when_it_goes", |world| {
        let controller = world.controller("a", 9001, AUTO)?;
        let machines = Machine::many("w", 1);
        let machine = &machines[0];
        world.with_client(async |client| create(&client, &machines).await)?;
        let approvals = world.until_approved(&machines, PATIENCE)?;
        let approval = &approvals[machine.name()];
        assert_eq!((approval.identity, approval.addresses.len()), (machine.id(), 2));
        assert!(
            approval
                .addresses
                .iter()
                .all(|address| { world.network.prefixes().iter().any(|prefix| prefix.contains(address)) })
        );

        let node = world.with_client(async |client| Ok(Api::<Node>::all(client).get(machine.name()).await?))?;
        let taints = node.spec.unwrap().taints.unwrap_or_default();
        assert!(taints.iter().any(|taint| taint.key == "someone.else/starting"), "{taints:?}");
        let managers = node.metadata.managed_fields.unwrap_or_default();
        assert!(managers.iter().any(|entry| entry.manager.as_deref() == Some("keystone-controller")));
        world.until("an event tells of it", PATIENCE, async |client| {
            let events = Api::<Event>::namespaced(client.clone(), "default").list(&ListParams::default()).await?;
            let about = |event: &Event| event.regarding.as_ref().and_then(|object| object.name.clone());
            Ok(events.into_iter().find(|event| about(event).as_deref() == Some(machine.name())))
        })?;

        world.with_client(async |client| delete(&client, &machines).await)?;
        world.until_approved(&[], PATIENCE)?;
        let holder = Holder::Node(machine.name().parse()?, machine.id());
        let ledger = world.with_client(async |client| world.ledger(&client).await)?;
        assert_eq!(ledger.held_by(&holder), None);

        // Nothing is left to do, so nothing is written.
        let writes = |server: &keystone_kubelab::ApiServer| {
            server.metrics().map(|metrics| metrics.writes("nodes") + metrics.writes("configmaps"))
        };
        let before = writes(world.server)?;
        std::thread::sleep(Duration::from_secs(2));
        assert_eq!(writes(world.server)?, before);
        assert!(controller.process.terminate(PATIENCE)?.success());
        Ok(())
    });
}
