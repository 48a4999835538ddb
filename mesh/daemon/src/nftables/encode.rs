//! Steps as messages of the kernel, and rules as programs of its packet filter's machine.

use keystone_mesh_core::kernel::Family;
use keystone_mesh_core::nftables::{
    Action, Chain, Change, DataType, Element, Field, Hook, Key, Mark, Match, Rule, Set, Shape, Verdict,
};

use super::wire::{Begun, Writer, attribute, flag, kind, set, verdict};

/// The most of a list of elements: an attribute's length has 16 bits, and one element takes less than 256 bytes.
const MAX_LIST: usize = 60_000;
/// The first of the 32-bit registers (`NFT_REG32_00`). Registers of 32 bits overlay the longer ones.
const FIRST_REGISTER: u32 = 8;
/// The register of verdicts (`NFT_REG_VERDICT`).
const VERDICT_REGISTER: u32 = 0;
/// `IFNAMSIZ`.
const INTERFACE_NAME: usize = 16;

/// Types of user data: of rules (`NFTNL_UDATA_RULE_COMMENT`), and of sets.
const RULE_COMMENT: u8 = 0;
const SET_COMMENT: u8 = 7;
/// And one of ours, which nft(8) passes over.
pub(super) const RULE_MARK: u8 = 0x4b;

/// One transaction.
#[derive(Debug)]
pub(super) struct Batch {
    writer: Writer,
    /// The step that each message is of.
    steps: Vec<usize>,
}

impl Batch {
    /// Steps of one table, to follow on this generation.
    pub(super) fn new(table: &str, generation: u32, steps: &[Change<'_>]) -> Self {
        let mut encoder = Encoder { table, writer: Writer::default(), steps: Vec::new(), at: 0, set_ids: 0 };
        encoder.writer.begin_batch(generation);
        for (at, step) in steps.iter().enumerate() {
            encoder.at = at;
            encoder.step(step, at + 1 == steps.len());
        }
        let Encoder { mut writer, steps, .. } = encoder;
        writer.end_batch(u32::try_from(steps.len()).unwrap_or(u32::MAX).saturating_add(1));
        Self { writer, steps }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.writer.bytes()
    }

    /// The step of the message with this number.
    pub(super) fn message(&self, sequence: u32) -> Option<usize> {
        self.steps.get(usize::try_from(sequence).ok()?.checked_sub(1)?).copied()
    }
}

struct Encoder<'a> {
    table: &'a str,
    writer: Writer,
    steps: Vec<usize>,
    at: usize,
    set_ids: u32,
}

impl Encoder<'_> {
    fn step(&mut self, step: &Change<'_>, last: bool) {
        match step {
            Change::AddTable => self.message(kind::NEW_TABLE, flag::CREATE, last, |writer, table| {
                writer.text(attribute::TABLE_NAME, table);
                writer.number(attribute::TABLE_FLAGS, 0);
            }),
            Change::DeleteTable => self.message(kind::DELETE_TABLE, 0, last, |writer, table| {
                writer.text(attribute::TABLE_NAME, table);
            }),
            Change::AddSet(name, set) => self.add_set(name, set, last),
            Change::DeleteSet(name) => self.message(kind::DELETE_SET, 0, last, |writer, table| {
                writer.text(attribute::SET_TABLE, table);
                writer.text(attribute::SET_NAME, name);
            }),
            Change::AddElements(name, shape, elements) => {
                self.elements(kind::NEW_ELEMENTS, name, shape, elements, last);
            }
            Change::DeleteElements(name, shape, elements) => {
                self.elements(kind::DELETE_ELEMENTS, name, shape, elements, last);
            }
            Change::AddChain(name, chain) => self.message(kind::NEW_CHAIN, flag::CREATE, last, |writer, table| {
                writer.text(attribute::CHAIN_TABLE, table);
                writer.text(attribute::CHAIN_NAME, name);
                base_chain(writer, chain);
            }),
            Change::DeleteChain(name) => self.message(kind::DELETE_CHAIN, 0, last, |writer, table| {
                writer.text(attribute::CHAIN_TABLE, table);
                writer.text(attribute::CHAIN_NAME, name);
            }),
            Change::FlushChain(name) => self.message(kind::DELETE_RULE, 0, last, |writer, table| {
                writer.text(attribute::RULE_TABLE, table);
                writer.text(attribute::RULE_CHAIN, name);
            }),
            Change::AddRule(name, rule) => {
                self.message(kind::NEW_RULE, flag::CREATE | flag::APPEND, last, |writer, table| {
                    writer.text(attribute::RULE_TABLE, table);
                    writer.text(attribute::RULE_CHAIN, name);
                    let list = writer.begin(attribute::RULE_EXPRESSIONS);
                    program(writer, rule);
                    writer.end(list);
                    writer.attribute(attribute::RULE_USERDATA, &user_data(rule));
                });
            }
        }
    }

    fn message(&mut self, kind: u16, flags: u16, last: bool, body: impl FnOnce(&mut Writer, &str)) {
        self.steps.push(self.at);
        let sequence = u32::try_from(self.steps.len()).unwrap_or(u32::MAX);
        let begun = self.writer.message(kind, flag::REQUEST | flags, sequence);
        body(&mut self.writer, self.table);
        // One word that it went well, from the last message; errors come without being asked for.
        if last {
            self.writer.acknowledged(&begun);
        }
        self.writer.end_message(begun);
    }

    fn add_set(&mut self, name: &str, set: &Set, last: bool) {
        self.set_ids += 1;
        let id = self.set_ids;
        let key = &set.shape.key;
        self.message(kind::NEW_SET, flag::CREATE, last, |writer, table| {
            writer.text(attribute::SET_TABLE, table);
            writer.text(attribute::SET_NAME, name);
            writer.number(attribute::SET_FLAGS, flags(&set.shape));
            writer.number(attribute::SET_KEY_TYPE, key_type(key));
            writer.number(attribute::SET_KEY_LENGTH, key_length(key));
            if set.shape.verdicts {
                writer.number(attribute::SET_DATA_TYPE, set::VERDICTS);
                writer.number(attribute::SET_DATA_LENGTH, 0);
            }
            if flags(&set.shape) & set::CONCATENATION != 0 {
                let description = writer.begin(attribute::SET_DESCRIPTION);
                let fields = writer.begin(attribute::DESCRIPTION_FIELDS);
                for part in key {
                    let field = writer.begin(attribute::LIST_ELEMENT);
                    writer.number(attribute::FIELD_LENGTH, u32::try_from(part.length()).unwrap_or(0));
                    writer.end(field);
                }
                writer.end(fields);
                writer.end(description);
            }
            writer.number(attribute::SET_ID, id);
            if !set.comment.is_empty() {
                writer.attribute(attribute::SET_USERDATA, &tagged_text(SET_COMMENT, &set.comment));
            }
        });
    }

    /// Elements, in as many messages as they need.
    fn elements(&mut self, kind: u16, name: &str, shape: &Shape, elements: &[(Element, Option<&Verdict>)], last: bool) {
        let flags = if kind == kind::NEW_ELEMENTS { flag::CREATE } else { 0 };
        let mut rest = elements;
        while !rest.is_empty() {
            self.steps.push(self.at);
            let sequence = u32::try_from(self.steps.len()).unwrap_or(u32::MAX);
            let begun = self.writer.message(kind, flag::REQUEST | flags, sequence);
            self.writer.text(attribute::ELEMENTS_TABLE, self.table);
            self.writer.text(attribute::ELEMENTS_SET, name);
            let list = self.writer.begin(attribute::ELEMENTS_LIST);
            while let Some(((element, verdict), others)) = rest.split_first()
                && self.writer.length_of(&list) < MAX_LIST
            {
                element_of(&mut self.writer, shape, element, *verdict);
                rest = others;
            }
            self.writer.end(list);
            if last && rest.is_empty() {
                self.writer.acknowledged(&begun);
            }
            self.writer.end_message(begun);
        }
    }
}

fn base_chain(writer: &mut Writer, chain: &Chain) {
    let Some(hook) = chain.hook else { return };
    let (number, priority, kind) = hook_numbers(hook);
    let nested = writer.begin(attribute::CHAIN_HOOK);
    writer.number(attribute::HOOK_NUMBER, number);
    writer.attribute(attribute::HOOK_PRIORITY, &priority.to_be_bytes());
    writer.end(nested);
    writer.number(attribute::CHAIN_POLICY, verdict::ACCEPT.cast_unsigned());
    writer.text(attribute::CHAIN_TYPE, kind);
}

/// The kernel's number of a hook (`NF_INET_*`), the priority there (`NF_IP_PRI_*`), and the type of chain.
pub(super) fn hook_numbers(hook: Hook) -> (u32, i32, &'static str) {
    match hook {
        Hook::Forward => (2, 0, "filter"),
        Hook::SourceNat => (4, 100, "nat"),
    }
}

// --- sets ---

pub(super) fn flags(shape: &Shape) -> u32 {
    let ranges = if shape.ranges { set::INTERVAL } else { 0 };
    let verdicts = if shape.verdicts { set::MAP } else { 0 };
    let fields = if shape.ranges && shape.key.len() > 1 { set::CONCATENATION } else { 0 };
    ranges | verdicts | fields
}

/// The number of a type in nft(8), which shows keys by it. In a concatenation each has six bits.
pub(super) fn key_type(key: &[DataType]) -> u32 {
    key.iter().fold(0, |all, part| all << 6 | type_number(*part))
}

pub(super) fn type_number(part: DataType) -> u32 {
    match part {
        DataType::Ipv4 => 7,
        DataType::Ipv6 => 8,
        DataType::Protocol => 12,
        DataType::Port => 13,
    }
}

pub(super) fn key_length(key: &[DataType]) -> u32 {
    let length = match key {
        [only] => only.length(),
        parts => parts.iter().map(|part| part.padded()).sum(),
    };
    u32::try_from(length).unwrap_or(0)
}

fn element_of(writer: &mut Writer, shape: &Shape, element: &Element, verdict: Option<&Verdict>) {
    let one = writer.begin(attribute::LIST_ELEMENT);
    key(writer, attribute::ELEMENT_KEY, &element.low);
    if shape.ranges && shape.key.len() > 1 {
        key(writer, attribute::ELEMENT_KEY_END, &element.high);
    }
    if let Some(verdict) = verdict {
        let data = writer.begin(attribute::ELEMENT_DATA);
        verdict_of(writer, verdict);
        writer.end(data);
    }
    writer.end(one);
    // A range of single keys is its first key, and the first key behind it; that of the last key has no end.
    if shape.ranges
        && shape.key.len() == 1
        && let Some(end) = element.high.next()
    {
        let behind = writer.begin(attribute::LIST_ELEMENT);
        writer.number(attribute::ELEMENT_FLAGS, set::INTERVAL_END);
        key(writer, attribute::ELEMENT_KEY, &end);
        writer.end(behind);
    }
}

fn key(writer: &mut Writer, number: u16, key: &Key) {
    let data = writer.begin(number);
    writer.attribute(attribute::DATA_VALUE, key.bytes());
    writer.end(data);
}

fn verdict_of(writer: &mut Writer, verdict: &Verdict) {
    let code = match verdict {
        Verdict::Accept => verdict::ACCEPT,
        Verdict::Drop => verdict::DROP,
        Verdict::Return => verdict::RETURN,
        Verdict::Jump(_) => verdict::JUMP,
    };
    let nested = writer.begin(attribute::DATA_VERDICT);
    writer.attribute(attribute::VERDICT_CODE, &code.to_be_bytes());
    if let Some(chain) = verdict.chain() {
        writer.text(attribute::VERDICT_CHAIN, chain);
    }
    writer.end(nested);
}

// --- rules ---

/// What the kernel keeps of a rule for us: its comment and its mark.
fn user_data(rule: &Rule) -> Vec<u8> {
    let Mark(mark) = rule.mark();
    let mut data = if rule.comment.is_empty() { vec![] } else { tagged_text(RULE_COMMENT, &rule.comment) };
    data.extend([RULE_MARK, u8::try_from(mark.len()).unwrap_or(0)]);
    data.extend(mark);
    data
}

fn tagged_text(tag: u8, text: &str) -> Vec<u8> {
    // Comments are cut to what a length in one byte can say, with the zero byte.
    let length = u8::try_from(text.len() + 1).unwrap_or(u8::MAX);
    [tag, length].into_iter().chain(text.bytes().take(usize::from(length) - 1)).chain([0]).collect()
}

/// A rule's expressions. Each condition ends the rule where it does not hold.
fn program(writer: &mut Writer, rule: &Rule) {
    let mut known_family = None;
    for matched in &rule.matches {
        match matched {
            Match::Replies => {
                ct_state(writer, FIRST_REGISTER);
                // `established` and `related` (`NF_CT_STATE_BIT`), in the machine's byte order as the state is.
                let wanted: u32 = 1 << 1 | 1 << 2;
                masked(writer, FIRST_REGISTER, &wanted.to_ne_bytes());
                compared(writer, FIRST_REGISTER, NOT_EQUAL, &[0; 4]);
            }
            Match::NotOutBy(name) => {
                let mut padded = [0; INTERFACE_NAME];
                let length = name.len().min(INTERFACE_NAME - 1);
                padded[..length].copy_from_slice(&name.as_bytes()[..length]);
                meta(writer, META_OUT_NAME, FIRST_REGISTER);
                compared(writer, FIRST_REGISTER, NOT_EQUAL, &padded);
            }
            Match::Ports { protocol, low, high } => {
                meta(writer, META_PROTOCOL, FIRST_REGISTER);
                compared(writer, FIRST_REGISTER, EQUAL, &[*protocol]);
                if (*low, *high) != (0, u16::MAX) {
                    payload(writer, TRANSPORT_HEADER, 2, 2, FIRST_REGISTER);
                    between(writer, FIRST_REGISTER, *low, *high);
                }
            }
            Match::In { fields, set, negated } => {
                load(writer, fields, &mut known_family);
                lookup(writer, set, *negated, None);
            }
        }
    }
    match &rule.action {
        Action::Verdict(verdict) => immediate(writer, verdict),
        Action::CountedDrop => {
            expression(writer, "counter", |_| {});
            immediate(writer, &Verdict::Drop);
        }
        Action::AsMapped(field, map) => {
            load(writer, &[*field], &mut known_family);
            lookup(writer, map, false, Some(VERDICT_REGISTER));
        }
        Action::Masquerade => expression(writer, "masq", |_| {}),
    }
}

/// Loads fields into registers, one after the other, each beginning at a register of its own.
fn load(writer: &mut Writer, fields: &[Field], known_family: &mut Option<Family>) {
    for field in fields {
        // In a table of both families an address is one only in packets of its own.
        if let Field::Source(family) | Field::Destination(family) = field
            && *known_family != Some(*family)
        {
            let number = match family {
                Family::V4 => libc::NFPROTO_IPV4,
                Family::V6 => libc::NFPROTO_IPV6,
            };
            meta(writer, META_FAMILY, FIRST_REGISTER);
            compared(writer, FIRST_REGISTER, EQUAL, &[u8::try_from(number).unwrap_or(0)]);
            *known_family = Some(*family);
        }
    }
    let mut register = FIRST_REGISTER;
    for field in fields {
        match field {
            Field::Source(Family::V4) => payload(writer, NETWORK_HEADER, 12, 4, register),
            Field::Destination(Family::V4) => payload(writer, NETWORK_HEADER, 16, 4, register),
            Field::Source(Family::V6) => payload(writer, NETWORK_HEADER, 8, 16, register),
            Field::Destination(Family::V6) => payload(writer, NETWORK_HEADER, 24, 16, register),
            Field::Protocol => meta(writer, META_PROTOCOL, register),
            Field::DestinationPort => payload(writer, TRANSPORT_HEADER, 2, 2, register),
        }
        register += u32::try_from(field.data_type().padded() / 4).unwrap_or(0);
    }
}

// `NFT_META_*`
const META_OUT_NAME: u32 = 7;
const META_FAMILY: u32 = 15;
const META_PROTOCOL: u32 = 16;
// `NFT_PAYLOAD_*`
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
// `NFT_CMP_*`
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;
/// `NFT_LOOKUP_F_INV`.
const INVERTED: u32 = 1;

/// One expression: `NFTA_EXPR_NAME`, and `NFTA_EXPR_DATA` with the attributes of its kind.
fn expression(writer: &mut Writer, name: &str, data: impl FnOnce(&mut Writer)) {
    let one = writer.begin(attribute::LIST_ELEMENT);
    writer.text(1, name);
    let nested: Begun = writer.begin(2);
    data(writer);
    writer.end(nested);
    writer.end(one);
}

/// `NFTA_META_DREG`, `NFTA_META_KEY`.
fn meta(writer: &mut Writer, what: u32, register: u32) {
    expression(writer, "meta", |writer| {
        writer.number(1, register);
        writer.number(2, what);
    });
}

/// `NFTA_PAYLOAD_DREG`, `_BASE`, `_OFFSET`, `_LEN`; the last two in bytes.
fn payload(writer: &mut Writer, base: u32, offset: u32, length: u32, register: u32) {
    expression(writer, "payload", |writer| {
        for (number, value) in (1..).zip([register, base, offset, length]) {
            writer.number(number, value);
        }
    });
}

/// `NFTA_CT_DREG`, `NFTA_CT_KEY`, which is `NFT_CT_STATE`.
fn ct_state(writer: &mut Writer, register: u32) {
    expression(writer, "ct", |writer| {
        writer.number(1, register);
        writer.number(2, 0);
    });
}

/// `NFTA_BITWISE_SREG`, `_DREG`, `_LEN`, `_MASK`, `_XOR`: in place.
fn masked(writer: &mut Writer, register: u32, mask: &[u8; 4]) {
    expression(writer, "bitwise", |writer| {
        writer.number(1, register);
        writer.number(2, register);
        writer.number(3, 4);
        value(writer, 4, mask);
        value(writer, 5, &[0; 4]);
    });
}

/// `NFTA_CMP_SREG`, `_OP`, `_DATA`.
fn compared(writer: &mut Writer, register: u32, operator: u32, with: &[u8]) {
    expression(writer, "cmp", |writer| {
        writer.number(1, register);
        writer.number(2, operator);
        value(writer, 3, with);
    });
}

/// `NFTA_RANGE_SREG`, `_OP`, `_FROM_DATA`, `_TO_DATA`; for one number a comparison.
fn between(writer: &mut Writer, register: u32, low: u16, high: u16) {
    if low == high {
        return compared(writer, register, EQUAL, &low.to_be_bytes());
    }
    expression(writer, "range", |writer| {
        writer.number(1, register);
        writer.number(2, EQUAL);
        value(writer, 3, &low.to_be_bytes());
        value(writer, 4, &high.to_be_bytes());
    });
}

/// `NFTA_LOOKUP_SET`, `_SREG`, `_DREG`, `_FLAGS`.
fn lookup(writer: &mut Writer, set: &str, negated: bool, into: Option<u32>) {
    expression(writer, "lookup", |writer| {
        writer.text(1, set);
        writer.number(2, FIRST_REGISTER);
        if let Some(register) = into {
            writer.number(3, register);
        }
        if negated {
            writer.number(5, INVERTED);
        }
    });
}

/// `NFTA_IMMEDIATE_DREG`, `_DATA`.
fn immediate(writer: &mut Writer, verdict: &Verdict) {
    expression(writer, "immediate", |writer| {
        writer.number(1, VERDICT_REGISTER);
        let data = writer.begin(2);
        verdict_of(writer, verdict);
        writer.end(data);
    });
}

fn value(writer: &mut Writer, number: u16, bytes: &[u8]) {
    let data = writer.begin(number);
    writer.attribute(attribute::DATA_VALUE, bytes);
    writer.end(data);
}
