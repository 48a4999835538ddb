//! What the kernel has of a table.

use std::collections::BTreeMap;

use keystone_mesh_core::nftables::{
    DataType, Element, Hook, Key, Mark, Present, PresentChain, PresentSet, Shape, Verdict,
};

use super::NftError;
use super::encode::{RULE_MARK, flags, hook_numbers, key_length, type_number};
use super::socket::Socket;
use super::wire::{Attributes, Writer, attribute, flag, kind, set, verdict};

/// The packet filter's generation.
pub(super) fn generation(socket: &mut Socket) -> Result<u32, NftError> {
    let mut found = None;
    // An acknowledgement, because what is no dump has no end of its own.
    ask(socket, "read the generation", kind::GET_GENERATION, flag::ACK, &[], |attributes| {
        found = attributes.number(attribute::GENERATION_ID);
        Ok(())
    })?;
    found.ok_or(NftError::Answer("its generation"))
}

/// A table with everything in it; none where there is no such table.
pub(super) fn table(socket: &mut Socket, name: &str) -> Result<Option<Present>, NftError> {
    let there = ask(socket, "read the table", kind::GET_TABLE, flag::ACK, &[(1, name)], |_| Ok(()));
    match there {
        Err(NftError::Socket { error, .. }) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        other => other?,
    }
    let mut present = Present::default();
    chains(socket, name, &mut present)?;
    rules(socket, name, &mut present)?;
    sets(socket, name, &mut present)?;
    elements(socket, name, &mut present)?;
    Ok(Some(present))
}

fn chains(socket: &mut Socket, table: &str, present: &mut Present) -> Result<(), NftError> {
    ask(socket, "read chains", kind::GET_CHAIN, flag::DUMP, &[(attribute::CHAIN_TABLE, table)], |chain| {
        if chain.text(attribute::CHAIN_TABLE) != Some(table) {
            return Ok(());
        }
        let name = chain.text(attribute::CHAIN_NAME).ok_or(NftError::Answer("a chain"))?;
        let hook = match chain.nested(attribute::CHAIN_HOOK) {
            None => None,
            Some(nested) => {
                let known = hook_of(chain, nested);
                present.foreign |= known.is_none();
                known
            }
        };
        present.chains.insert(name.to_owned(), PresentChain { hook, rules: vec![] });
        Ok(())
    })
}

fn hook_of(chain: Attributes<'_>, nested: Attributes<'_>) -> Option<Hook> {
    let accepts = chain.number(attribute::CHAIN_POLICY) == Some(verdict::ACCEPT.cast_unsigned());
    [Hook::Forward, Hook::SourceNat].into_iter().filter(|_| accepts).find(|hook| {
        let (number, priority, kind) = hook_numbers(*hook);
        nested.number(attribute::HOOK_NUMBER) == Some(number)
            && nested.get(attribute::HOOK_PRIORITY) == Some(&priority.to_be_bytes()[..])
            && chain.text(attribute::CHAIN_TYPE) == Some(kind)
    })
}

fn rules(socket: &mut Socket, table: &str, present: &mut Present) -> Result<(), NftError> {
    ask(socket, "read rules", kind::GET_RULE, flag::DUMP, &[(attribute::RULE_TABLE, table)], |rule| {
        if rule.text(attribute::RULE_TABLE) != Some(table) {
            return Ok(());
        }
        let chain = rule.text(attribute::RULE_CHAIN).ok_or(NftError::Answer("a rule"))?;
        let mark = rule.get(attribute::RULE_USERDATA).and_then(mark_in).unwrap_or_default();
        if let Some(chain) = present.chains.get_mut(chain) {
            chain.rules.push(mark);
        }
        Ok(())
    })
}

/// Our mark in a rule's user data, which is a list of tag, length and value.
fn mark_in(mut data: &[u8]) -> Option<Mark> {
    loop {
        let (tag, length) = (*data.first()?, usize::from(*data.get(1)?));
        let value = data.get(2..2 + length)?;
        if tag == RULE_MARK {
            return value.try_into().map(Mark).ok();
        }
        data = &data[2 + length..];
    }
}

fn sets(socket: &mut Socket, table: &str, present: &mut Present) -> Result<(), NftError> {
    ask(socket, "read sets", kind::GET_SET, flag::DUMP, &[(attribute::SET_TABLE, table)], |set| {
        if set.text(attribute::SET_TABLE) != Some(table) {
            return Ok(());
        }
        let name = set.text(attribute::SET_NAME).ok_or(NftError::Answer("a set"))?;
        match shape_of(set) {
            Some(shape) => {
                present.sets.insert(name.to_owned(), PresentSet { shape, elements: BTreeMap::new() });
            }
            None => present.foreign = true,
        }
        Ok(())
    })
}

fn shape_of(set: Attributes<'_>) -> Option<Shape> {
    const ALL: [DataType; 4] = [DataType::Ipv4, DataType::Ipv6, DataType::Protocol, DataType::Port];
    let mut rest = set.number(attribute::SET_KEY_TYPE)?;
    let mut key = Vec::new();
    while rest != 0 {
        key.insert(0, ALL.into_iter().find(|part| type_number(*part) == rest & 0x3f)?);
        rest >>= 6;
    }
    // No flags are not told.
    let found = set.number(attribute::SET_FLAGS).unwrap_or(0);
    let shape = Shape { key, ranges: found & set::INTERVAL != 0, verdicts: found & set::MAP != 0 };
    let same = flags(&shape) == found && set.number(attribute::SET_KEY_LENGTH) == Some(key_length(&shape.key));
    let verdicts = !shape.verdicts || set.number(attribute::SET_DATA_TYPE) == Some(set::VERDICTS);
    (same && verdicts).then_some(shape)
}

fn elements(socket: &mut Socket, table: &str, present: &mut Present) -> Result<(), NftError> {
    for (name, set) in &mut present.sets {
        let named = [(attribute::ELEMENTS_TABLE, table), (attribute::ELEMENTS_SET, name.as_str())];
        let single = set.shape.ranges && set.shape.key.len() == 1;
        let mut bounds: Vec<(Key, bool)> = Vec::new();
        ask(socket, "read elements", kind::GET_ELEMENTS, flag::DUMP, &named, |message| {
            let Some(list) = message.get(attribute::ELEMENTS_LIST) else { return Ok(()) };
            for (_, one) in Attributes::of(list).each() {
                let one = Attributes::of(one);
                let low = key_in(one, attribute::ELEMENT_KEY).ok_or(NftError::Answer("an element"))?;
                if single {
                    let end = one.number(attribute::ELEMENT_FLAGS).unwrap_or(0) & set::INTERVAL_END != 0;
                    bounds.push((low, end));
                    continue;
                }
                let high = key_in(one, attribute::ELEMENT_KEY_END).unwrap_or(low);
                let verdict = one.nested(attribute::ELEMENT_DATA).and_then(verdict_in);
                set.elements.insert(Element { low, high }, verdict);
            }
            Ok(())
        })?;
        set.elements.extend(ranges(bounds).map(|element| (element, None)));
    }
    Ok(())
}

/// Ranges from their bounds: where each begins, and where it has ended.
fn ranges(mut bounds: Vec<(Key, bool)>) -> impl Iterator<Item = Element> {
    // At one key the end of a range comes before the beginning of the next.
    bounds.sort_unstable_by_key(|(key, end)| (*key, !*end));
    let mut bounds = bounds.into_iter().peekable();
    std::iter::from_fn(move || {
        let (low, _) = bounds.find(|(_, end)| !end)?;
        let high = match bounds.peek() {
            Some((end, _)) => end.previous(),
            None => Key::last(low.bytes().len()),
        };
        Some(Element { low, high: high? })
    })
}

fn key_in(element: Attributes<'_>, number: u16) -> Option<Key> {
    Key::new(element.nested(number)?.get(attribute::DATA_VALUE)?)
}

fn verdict_in(data: Attributes<'_>) -> Option<Verdict> {
    let nested = data.nested(attribute::DATA_VERDICT)?;
    match nested.number(attribute::VERDICT_CODE)?.cast_signed() {
        verdict::ACCEPT => Some(Verdict::Accept),
        verdict::DROP => Some(Verdict::Drop),
        verdict::RETURN => Some(Verdict::Return),
        verdict::JUMP => nested.text(attribute::VERDICT_CHAIN).map(|chain| Verdict::Jump(chain.to_owned())),
        _ => None,
    }
}

fn ask(
    socket: &mut Socket,
    doing: &'static str,
    kind: u16,
    flags: u16,
    named: &[(u16, &str)],
    mut each: impl FnMut(Attributes<'_>) -> Result<(), NftError>,
) -> Result<(), NftError> {
    let mut request = Writer::default();
    let begun = request.message(kind, flag::REQUEST | flags, socket.next_sequence());
    for (number, name) in named {
        request.text(*number, name);
    }
    request.end_message(begun);
    socket.request(doing, request.bytes(), |message| each(message.attributes()))
}
