//! From what the kernel has to what it should have.

use std::collections::BTreeMap;

use super::{Chain, Element, Hook, Mark, Rule, Set, Shape, Table, Verdict};

/// What the kernel has of one table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Present {
    /// Its sets and maps, by name.
    pub sets: BTreeMap<String, PresentSet>,
    /// Its chains, by name.
    pub chains: BTreeMap<String, PresentChain>,
    /// Whether there is something that is not of our making (an object, a set of a type that we do not use).
    pub foreign: bool,
}

/// A set in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PresentSet {
    /// What its elements are.
    pub shape: Shape,
    /// Its elements.
    pub elements: BTreeMap<Element, Option<Verdict>>,
}

/// A chain in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PresentChain {
    /// Where the kernel enters it.
    pub hook: Option<Hook>,
    /// Its rules' marks; a rule that is not ours has the mark of zeros.
    pub rules: Vec<Mark>,
}

impl From<Table> for Present {
    fn from(table: Table) -> Self {
        let sets = table.sets.into_iter();
        let chains = table.chains.into_iter();
        Self {
            sets: sets.map(|(name, set)| (name, PresentSet { shape: set.shape, elements: set.elements })).collect(),
            chains: chains
                .map(|(name, chain)| {
                    let rules = chain.rules.iter().map(Rule::mark).collect();
                    (name, PresentChain { hook: chain.hook, rules })
                })
                .collect(),
            foreign: false,
        }
    }
}

/// One step of a transaction. The table goes without saying.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// Makes the table.
    AddTable,
    /// Takes the table away with everything in it.
    DeleteTable,
    /// Makes an empty set.
    AddSet(&'a str, &'a Set),
    /// Takes a set away.
    DeleteSet(&'a str),
    /// Adds elements to a set of this shape.
    AddElements(&'a str, &'a Shape, Vec<(Element, Option<&'a Verdict>)>),
    /// Takes elements away from a set of this shape.
    DeleteElements(&'a str, &'a Shape, Vec<(Element, Option<&'a Verdict>)>),
    /// Makes an empty chain.
    AddChain(&'a str, &'a Chain),
    /// Takes a chain away with its rules.
    DeleteChain(&'a str),
    /// Takes a chain's rules away.
    FlushChain(&'a str),
    /// Adds a rule at the end of a chain.
    AddRule(&'a str, &'a Rule),
}

/// The steps from `present` (none: there is no such table) to `desired`, in an order that the kernel accepts: whatever is
/// referred to is made before and taken away after.
pub fn changes<'a>(present: Option<&'a Present>, desired: &'a Table) -> Vec<Change<'a>> {
    match present {
        Some(present) if can_become(present, desired) => step_by_step(present, desired),
        Some(_) => [vec![Change::DeleteTable], from_nothing(desired)].concat(),
        None => from_nothing(desired),
    }
}

/// The steps that take a table away.
pub fn removal(present: Option<&Present>) -> Vec<Change<'static>> {
    present.map(|_| Change::DeleteTable).into_iter().collect()
}

/// Whether nothing has to change that only a new table can have.
fn can_become(present: &Present, desired: &Table) -> bool {
    let sets = desired.sets.iter().all(|(name, set)| match present.sets.get(name) {
        Some(there) => there.shape == set.shape,
        None => true,
    });
    let chains = desired.chains.iter().all(|(name, chain)| match present.chains.get(name) {
        Some(there) => there.hook == chain.hook,
        None => true,
    });
    sets && chains && !present.foreign
}

fn from_nothing(desired: &Table) -> Vec<Change<'_>> {
    static NOTHING: Present = Present { sets: BTreeMap::new(), chains: BTreeMap::new(), foreign: false };
    let mut steps = vec![Change::AddTable];
    steps.extend(step_by_step(&NOTHING, desired));
    steps
}

fn step_by_step<'a>(present: &'a Present, desired: &'a Table) -> Vec<Change<'a>> {
    let mut steps = Vec::new();
    for (name, set) in &desired.sets {
        if !present.sets.contains_key(name) {
            steps.push(Change::AddSet(name, set));
        }
    }
    for (name, chain) in &desired.chains {
        if !present.chains.contains_key(name) {
            steps.push(Change::AddChain(name, chain));
        }
    }
    rules(present, desired, &mut steps);
    elements(present, desired, &mut steps);
    for name in present.chains.keys().filter(|name| !desired.chains.contains_key(*name)) {
        steps.push(Change::DeleteChain(name));
    }
    for name in present.sets.keys().filter(|name| !desired.sets.contains_key(*name)) {
        steps.push(Change::DeleteSet(name));
    }
    steps
}

fn rules<'a>(present: &'a Present, desired: &'a Table, steps: &mut Vec<Change<'a>>) {
    for (name, chain) in &desired.chains {
        let there = present.chains.get(name).map_or(&[][..], |chain| &chain.rules);
        if there.iter().copied().eq(chain.rules.iter().map(Rule::mark)) {
            continue;
        }
        if !there.is_empty() {
            steps.push(Change::FlushChain(name));
        }
        steps.extend(chain.rules.iter().map(|rule| Change::AddRule(name, rule)));
    }
}

/// Elements go before others come: a range that grows would overlap its former self, and a key has one verdict.
fn elements<'a>(present: &'a Present, desired: &'a Table, steps: &mut Vec<Change<'a>>) {
    for (name, there) in &present.sets {
        let wanted = desired.sets.get(name);
        // A set that goes as a whole may hold the last reference to a chain.
        let stays = |element: &Element, verdict: &Option<Verdict>| match wanted {
            Some(wanted) => wanted.elements.get(element) == Some(verdict),
            None => !there.shape.verdicts,
        };
        let gone: Vec<_> = there.elements.iter().filter(|(e, v)| !stays(e, v)).map(borrowed).collect();
        if !gone.is_empty() {
            steps.push(Change::DeleteElements(name, &there.shape, gone));
        }
    }
    for (name, set) in &desired.sets {
        let there = present.sets.get(name);
        let is_there = |element: &Element, verdict: &Option<Verdict>| {
            there.is_some_and(|there| there.elements.get(element) == Some(verdict))
        };
        let new: Vec<_> = set.elements.iter().filter(|(e, v)| !is_there(e, v)).map(borrowed).collect();
        if !new.is_empty() {
            steps.push(Change::AddElements(name, &set.shape, new));
        }
    }
}

fn borrowed<'a>((element, verdict): (&'a Element, &'a Option<Verdict>)) -> (Element, Option<&'a Verdict>) {
    (*element, verdict.as_ref())
}
