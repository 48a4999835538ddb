use proptest::prelude::*;

use super::*;
use crate::network::tests::network;
use crate::node::tests::secret;

fn node(name: &str, byte: u8) -> Holder {
    Holder::Node(name.parse().unwrap(), secret(byte).identity().id())
}

fn peer(name: &str) -> Holder {
    Holder::Peer(name.parse().unwrap())
}

/// A network of six host numbers.
fn small() -> Network {
    Network { ipv4: "10.98.0.0/29".parse().unwrap(), ..network(1) }
}

/// The ledger as another controller reads it.
fn reread(ledger: &Ledger) -> Ledger {
    let mut fresh = Ledger::default();
    for PageEdit { page, data } in ledger.edits_since(&Ledger::default()) {
        fresh.handle_page(page, &data);
    }
    fresh
}

#[test]
fn a_holder_keeps_its_number_while_away_and_over_a_restart() {
    let mut ledger = Ledger::default();
    assert_eq!(ledger.claim(&small(), &node("a", 1), 0), Ok(1));
    assert_eq!(ledger.claim(&small(), &node("b", 2), 0), Ok(2));
    assert_eq!(ledger.claim(&small(), &node("a", 1), 5), Ok(1), "asking again costs nothing");
    ledger.release(&node("a", 1), 10);
    assert_eq!(ledger.held_by(&node("a", 1)), None);
    let mut ledger = reread(&ledger);
    assert_eq!(ledger.claim(&small(), &peer("laptop"), 11), Ok(3));
    assert_eq!(ledger.claim(&small(), &node("a", 1), 12), Ok(1));
    assert_eq!(ledger.pinned(&"a".parse().unwrap()), Some((1, secret(1).identity().id())));
}

#[test]
fn another_identity_under_a_name_is_another_holder() {
    let mut ledger = Ledger::default();
    ledger.claim(&small(), &node("a", 1), 0).unwrap();
    ledger.release(&node("a", 1), 1);
    assert_eq!(ledger.pinned(&"a".parse().unwrap()), None);
    assert_eq!(ledger.claim(&small(), &node("a", 2), 2), Ok(2));
    assert_eq!(ledger.pinned(&"a".parse().unwrap()), Some((2, secret(2).identity().id())));
}

#[test]
fn a_released_number_rests_and_the_longest_rested_comes_first() {
    let mut ledger = Ledger::default();
    for i in 1..=6 {
        assert_eq!(ledger.claim(&small(), &node(&format!("n{i}"), i), 0), Ok(i.into()));
    }
    assert_eq!(ledger.claim(&small(), &node("late", 9), 0), Err(Exhausted(small().ipv4)));
    ledger.release(&node("n4", 4), 100);
    ledger.release(&node("n2", 2), 200);
    assert!(ledger.claim(&small(), &node("late", 9), 100 + QUARANTINE - 1).is_err());
    assert!(ledger.claim(&small(), &node("late", 9), 0).is_err(), "a clock that went back ends no quarantine");
    assert_eq!(ledger.claim(&small(), &node("late", 9), 200 + QUARANTINE), Ok(4));
    assert_eq!(ledger.claim(&small(), &node("later", 10), 200 + QUARANTINE), Ok(2));
}

#[test]
fn an_approval_of_old_is_adopted_where_nobody_else_has_its_number() {
    let mut ledger = Ledger::default();
    assert!(ledger.adopt(5, &node("a", 1)));
    assert!(ledger.adopt(5, &node("a", 1)));
    assert!(!ledger.adopt(5, &node("b", 2)));
    assert!(!ledger.adopt(6, &node("a", 1)), "one holder, one number");
    assert!(!ledger.adopt(0, &node("b", 2)));
}

#[test]
fn faulty_lines_are_told_kept_and_block_their_numbers() {
    let lines = [
        ("1", node("a", 1).to_string()),
        ("2", "rubbish".to_owned()),
        ("03", node("b", 2).to_string()),
        ("300", node("c", 3).to_string()),
        ("README", "by hand".to_owned()),
        ("0", peer("zero").to_string()),
    ];
    let data: BTreeMap<String, String> = lines.into_iter().map(|(key, text)| (key.to_owned(), text)).collect();
    let mut ledger = Ledger::default();
    let faults = ledger.handle_page(0, &data);
    assert_eq!(faults.len(), 5, "{faults:?}");
    assert!(faults.iter().any(|fault| fault.to_string().contains("page 0, `2`: `rubbish` is not a claim")));
    assert_eq!(ledger.claim(&small(), &node("d", 4), 0), Ok(4), "neither 2 nor 3");
    assert!(!ledger.adopt(2, &node("e", 5)));
    let edits = ledger.edits_since(&Ledger::default());
    assert_eq!(edits.len(), 1);
    for (key, text) in &data {
        assert_eq!(edits[0].data.get(key), Some(text), "lines that do not read are written back as they are");
    }
    let mended = BTreeMap::from([("1".to_owned(), node("a", 1).to_string())]);
    assert!(ledger.handle_page(0, &mended).is_empty());
    assert_eq!(ledger.claim(&small(), &node("d", 4), 0), Ok(2));
}

#[test]
fn edits_are_of_the_pages_that_changed_alone() {
    let mut ledger = Ledger::default();
    assert!(ledger.adopt(1, &node("a", 1)) && ledger.adopt(PAGE + 1, &node("b", 2)));
    let acknowledged = ledger.clone();
    assert!(ledger.edits_since(&acknowledged).is_empty());
    ledger.release(&node("b", 2), 7);
    let edits = ledger.edits_since(&acknowledged);
    assert_eq!(edits.len(), 1);
    assert_eq!((edits[0].page, edits[0].data.len()), (1, 1));
    assert_eq!(edits[0].data[&(PAGE + 1).to_string()], format!("{} released 7", node("b", 2)));
}

#[test]
fn one_holder_with_two_numbers_has_the_lower_one_and_gives_back_both() {
    let mut ledger = Ledger::default();
    ledger.handle_page(1, &BTreeMap::from([("256".to_owned(), node("a", 1).to_string())]));
    ledger.handle_page(0, &BTreeMap::from([("7".to_owned(), node("a", 2).to_string())]));
    assert_eq!(ledger.pinned(&"a".parse().unwrap()), Some((7, secret(2).identity().id())));
    ledger.handle_page(0, &BTreeMap::from([("7".to_owned(), node("a", 1).to_string())]));
    assert_eq!(ledger.held_by(&node("a", 1)), Some(7));
    ledger.release(&node("a", 1), 1);
    assert_eq!(ledger.live().count(), 0);
}

/// The API server: pages under optimistic concurrency.
#[derive(Default)]
struct Server {
    pages: BTreeMap<u32, (u64, BTreeMap<String, String>)>,
}

impl Server {
    /// Writes a page where it still has the version that the writer knows. Checks what must hold of every write.
    fn swap(&mut self, edit: &PageEdit, known: u64, now: u64) -> bool {
        let (version, data) = self.pages.entry(edit.page).or_default();
        if *version != known {
            return false;
        }
        for (host, before) in &*data {
            let before: Claim = before.parse().unwrap();
            let after: Claim = edit.data[host].parse().unwrap();
            let rested = before.released.is_some_and(|at| now >= at + QUARANTINE);
            assert!(after.holder == before.holder || rested, "{host}: {before} became {after} at {now}");
        }
        (*version, *data) = (*version + 1, edit.data.clone());
        true
    }
}

#[derive(Default)]
struct Controller {
    acknowledged: Ledger,
    working: Ledger,
    versions: BTreeMap<u32, u64>,
}

impl Controller {
    fn read(&mut self, server: &Server) {
        let mut ledger = Ledger::default();
        for (page, (version, data)) in &server.pages {
            assert!(ledger.handle_page(*page, data).is_empty());
            self.versions.insert(*page, *version);
        }
        (self.acknowledged, self.working) = (ledger.clone(), ledger);
    }

    /// Whether every page was acknowledged; where one was not, everything is read again.
    fn write(&mut self, server: &mut Server, now: u64) -> bool {
        for edit in self.working.edits_since(&self.acknowledged) {
            let version = self.versions.entry(edit.page).or_default();
            if !server.swap(&edit, *version, now) {
                self.read(server);
                return false;
            }
            *version += 1;
        }
        self.acknowledged = self.working.clone();
        true
    }
}

#[derive(Clone, Debug)]
enum Step {
    Read(usize),
    Claim(usize, usize),
    Release(usize, usize),
    Write(usize),
    Crash(usize),
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..2_usize).prop_map(Step::Read),
        (0..2_usize, 0..8_usize).prop_map(|(who, what)| Step::Claim(who, what)),
        (0..2_usize, 0..8_usize).prop_map(|(who, what)| Step::Release(who, what)),
        (0..2_usize).prop_map(Step::Write),
        (0..2_usize).prop_map(Step::Crash),
        (0..QUARANTINE).prop_map(Step::Pass),
    ]
}

proptest! {
    #[test]
    fn two_racing_controllers_never_give_a_number_twice(steps in proptest::collection::vec(step(), 0..120)) {
        let holders: Vec<Holder> = (0..8_u8).map(|i| node(&format!("n{}", i / 2), 1 + i)).collect();
        let (mut server, mut now) = (Server::default(), 0);
        let mut controllers = [Controller::default(), Controller::default()];
        for step in steps {
            match step {
                Step::Read(who) => controllers[who].read(&server),
                Step::Claim(who, what) => drop(controllers[who].working.claim(&small(), &holders[what], now)),
                Step::Release(who, what) => controllers[who].working.release(&holders[what], now),
                Step::Write(who) => drop(controllers[who].write(&mut server, now)),
                Step::Crash(who) => controllers[who] = Controller::default(),
                Step::Pass(seconds) => now += seconds,
            }
        }
        let mut last = Controller::default();
        last.read(&server);
        let mut numbers = BTreeSet::new();
        for holder in &holders {
            if let Some(host) = last.working.held_by(holder) {
                prop_assert!(numbers.insert(host), "{} for two holders", host);
            }
        }
    }

    #[test]
    fn a_claim_reads_back_and_nothing_else_reads(
        text in prop_oneof![".{0,80}", "(node|peer) [a-z]{1,4}( [a-z2-7]{0,60})?( released \\+?[0-9]{1,22})? ?"],
        released in proptest::option::of(any::<u64>()),
    ) {
        for holder in [node("a.b", 1), peer("laptop")] {
            let claim = Claim { holder, released };
            prop_assert_eq!(claim.to_string().parse(), Ok(claim));
        }
        if let Ok(claim) = text.parse::<Claim>() {
            prop_assert_eq!(claim.to_string(), text);
        }
    }

    #[test]
    fn any_page_reads_and_is_written_back_whole(
        page in prop_oneof![0..3_u32, any::<u32>()],
        lines in proptest::collection::btree_map("[0-9]{1,4}|.{0,6}", prop_oneof![Just("peer a".to_owned()), ".{0,20}".prop_map(|t| t)], 0..12),
    ) {
        let mut ledger = Ledger::default();
        let faults = ledger.handle_page(page, &lines);
        prop_assert!(faults.len() <= lines.len());
        let edits = ledger.edits_since(&Ledger::default());
        match edits.as_slice() {
            [] => prop_assert!(lines.is_empty()),
            [edit] => prop_assert_eq!((edit.page, &edit.data), (page, &lines)),
            _ => prop_assert!(false, "more than one page: {:?}", edits),
        }
    }
}
