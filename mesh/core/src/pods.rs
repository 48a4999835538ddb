//! What a node's kernel does for its pods beside routing: masquerade.
//!
//! A packet of a pod that leaves the cluster gets the address of the node where it leaves, because nobody out there has a
//! route to pods. Inside the cluster it keeps its own. A packet for a network behind another node goes through the mesh
//! as it is and is masqueraded at that node.

use ipnet::IpNet;

use crate::kernel::Family;
use crate::nftables::{Action, Chain, DataType, Field, Hook, Match, Rule, Set, Table};
use crate::policy::prefixes;

/// The name of the table.
pub const TABLE: &str = "keystone-pods";

/// The table that masquerades what leaves the cluster.
///
/// `pods`: the prefixes of all pods of the mesh; `cluster`: everything that pods reach with their own address, which is
/// these prefixes and the mesh's; `interface`: the mesh's.
pub fn masquerade(pods: &[IpNet], cluster: &[IpNet], interface: &str) -> Table {
    let mut table = Table { name: TABLE.to_owned(), ..Table::default() };
    let mut rules = Vec::new();
    for (family, digit) in [(Family::V4, '4'), (Family::V6, '6')] {
        let [from, inside] = [format!("pods{digit}"), format!("cluster{digit}")];
        let key = vec![DataType::address(family)];
        let of_pods = Set::of_ranges(key.clone(), "pods of the mesh", prefixes(family, pods.iter().copied()));
        let of_cluster = Set::of_ranges(key, "the mesh and its pods", prefixes(family, cluster.iter().copied()));
        let matches = vec![
            Match::is_in(Field::Source(family), &from),
            Match::not_in(Field::Destination(family), &inside),
            Match::NotOutBy(interface.to_owned()),
        ];
        rules.push(Rule::new(matches, Action::Masquerade, "leaves the cluster"));
        table.sets.insert(from, of_pods);
        table.sets.insert(inside, of_cluster);
    }
    table.chains.insert("postrouting".to_owned(), Chain { hook: Some(Hook::SourceNat), rules });
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_reads_as_it_is_meant() {
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpNet>>();
        let pods = nets(&["10.42.1.0/24", "10.42.0.0/24", "fd00:42::/64"]);
        let cluster = nets(&["10.98.0.0/16", "10.42.0.0/24", "10.42.1.0/24", "fd00:42::/64", "fd00:98::/48"]);
        let text = masquerade(&pods, &cluster, "ksmesh0").to_string();
        for line in [
            "    type nat hook postrouting priority srcnat; policy accept;",
            "    ip saddr @pods4 ip daddr != @cluster4 oifname != \"ksmesh0\" masquerade comment \"leaves the cluster\"",
            "    ip6 saddr @pods6 ip6 daddr != @cluster6 oifname != \"ksmesh0\" masquerade comment \"leaves the cluster\"",
            "    10.42.0.0-10.42.1.255,",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
