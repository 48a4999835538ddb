//! Messages and attributes of netlink (netlink(7), RFC 3549), as nf_tables uses them.
//!
//! Numbers are those of `linux/netlink.h`, `linux/netfilter/nfnetlink.h` and `linux/netfilter/nf_tables.h`. Integers in
//! attributes are in network byte order, those of the header in the machine's.

/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u16 = 10;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;
/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct nfgenmsg`.
const GENERIC_HEADER: usize = 4;
/// `NFPROTO_INET`.
const INET: u8 = 1;

/// Flags of a message (`NLM_F_*`).
pub(super) mod flag {
    pub(in super::super) const REQUEST: u16 = 0x01;
    pub(in super::super) const ACK: u16 = 0x04;
    pub(in super::super) const DUMP_INTERRUPTED: u16 = 0x10;
    pub(in super::super) const DUMP: u16 = 0x300;
    pub(in super::super) const CREATE: u16 = 0x400;
    pub(in super::super) const APPEND: u16 = 0x800;
}

/// Types of messages.
pub(super) mod kind {
    /// `NLMSG_ERROR`: an error, or with 0 an acknowledgement.
    pub(in super::super) const ERROR: u16 = 2;
    /// `NLMSG_DONE`: the end of a dump.
    pub(in super::super) const DONE: u16 = 3;
    /// `NFNL_MSG_BATCH_BEGIN`.
    pub(super) const BATCH_BEGIN: u16 = 16;
    /// `NFNL_MSG_BATCH_END`.
    pub(super) const BATCH_END: u16 = 17;

    // `NFT_MSG_*`
    pub(in super::super) const NEW_TABLE: u16 = 0;
    pub(in super::super) const GET_TABLE: u16 = 1;
    pub(in super::super) const DELETE_TABLE: u16 = 2;
    pub(in super::super) const NEW_CHAIN: u16 = 3;
    pub(in super::super) const GET_CHAIN: u16 = 4;
    pub(in super::super) const DELETE_CHAIN: u16 = 5;
    pub(in super::super) const NEW_RULE: u16 = 6;
    pub(in super::super) const GET_RULE: u16 = 7;
    pub(in super::super) const DELETE_RULE: u16 = 8;
    pub(in super::super) const NEW_SET: u16 = 9;
    pub(in super::super) const GET_SET: u16 = 10;
    pub(in super::super) const DELETE_SET: u16 = 11;
    pub(in super::super) const NEW_ELEMENTS: u16 = 12;
    pub(in super::super) const GET_ELEMENTS: u16 = 13;
    pub(in super::super) const DELETE_ELEMENTS: u16 = 14;
    pub(in super::super) const GET_GENERATION: u16 = 16;
}

/// Numbers of attributes, each group for itself (`NFTA_*`).
pub(super) mod attribute {
    pub(in super::super) const LIST_ELEMENT: u16 = 1;
    pub(in super::super) const TABLE_NAME: u16 = 1;
    pub(in super::super) const TABLE_FLAGS: u16 = 2;

    pub(in super::super) const CHAIN_TABLE: u16 = 1;
    pub(in super::super) const CHAIN_NAME: u16 = 3;
    pub(in super::super) const CHAIN_HOOK: u16 = 4;
    pub(in super::super) const CHAIN_POLICY: u16 = 5;
    pub(in super::super) const CHAIN_TYPE: u16 = 7;
    pub(in super::super) const HOOK_NUMBER: u16 = 1;
    pub(in super::super) const HOOK_PRIORITY: u16 = 2;

    pub(in super::super) const RULE_TABLE: u16 = 1;
    pub(in super::super) const RULE_CHAIN: u16 = 2;
    pub(in super::super) const RULE_EXPRESSIONS: u16 = 4;
    pub(in super::super) const RULE_USERDATA: u16 = 7;

    pub(in super::super) const SET_TABLE: u16 = 1;
    pub(in super::super) const SET_NAME: u16 = 2;
    pub(in super::super) const SET_FLAGS: u16 = 3;
    pub(in super::super) const SET_KEY_TYPE: u16 = 4;
    pub(in super::super) const SET_KEY_LENGTH: u16 = 5;
    pub(in super::super) const SET_DATA_TYPE: u16 = 6;
    pub(in super::super) const SET_DATA_LENGTH: u16 = 7;
    pub(in super::super) const SET_DESCRIPTION: u16 = 9;
    pub(in super::super) const SET_ID: u16 = 10;
    pub(in super::super) const SET_USERDATA: u16 = 13;
    pub(in super::super) const DESCRIPTION_FIELDS: u16 = 2;
    pub(in super::super) const FIELD_LENGTH: u16 = 1;

    pub(in super::super) const ELEMENTS_TABLE: u16 = 1;
    pub(in super::super) const ELEMENTS_SET: u16 = 2;
    pub(in super::super) const ELEMENTS_LIST: u16 = 3;
    pub(in super::super) const ELEMENT_KEY: u16 = 1;
    pub(in super::super) const ELEMENT_DATA: u16 = 2;
    pub(in super::super) const ELEMENT_FLAGS: u16 = 3;
    pub(in super::super) const ELEMENT_KEY_END: u16 = 10;

    pub(in super::super) const DATA_VALUE: u16 = 1;
    pub(in super::super) const DATA_VERDICT: u16 = 2;
    pub(in super::super) const VERDICT_CODE: u16 = 1;
    pub(in super::super) const VERDICT_CHAIN: u16 = 2;

    pub(in super::super) const GENERATION_ID: u16 = 1;
}

/// Flags of sets and elements (`NFT_SET_*`, `NFT_SET_ELEM_*`), and the type of verdicts.
pub(super) mod set {
    pub(in super::super) const INTERVAL: u32 = 0x04;
    pub(in super::super) const MAP: u32 = 0x08;
    pub(in super::super) const CONCATENATION: u32 = 0x80;
    pub(in super::super) const INTERVAL_END: u32 = 1;
    /// `NFT_DATA_VERDICT`.
    pub(in super::super) const VERDICTS: u32 = 0xffff_ff00;
}

/// Verdicts (`NF_*`, `NFT_*`).
pub(super) mod verdict {
    pub(in super::super) const DROP: i32 = 0;
    pub(in super::super) const ACCEPT: i32 = 1;
    pub(in super::super) const JUMP: i32 = -3;
    pub(in super::super) const RETURN: i32 = -5;
}

/// Messages, one after the other.
#[derive(Debug, Default)]
pub(super) struct Writer(Vec<u8>);

/// An attribute or message that has begun.
#[derive(Debug)]
#[must_use]
pub(super) struct Begun(usize);

impl Writer {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Begins a message of nf_tables.
    pub(super) fn message(&mut self, kind: u16, flags: u16, sequence: u32) -> Begun {
        self.header(SUBSYSTEM << 8 | kind, flags, sequence, INET, 0)
    }

    /// Begins a transaction that is to follow on this generation.
    pub(super) fn begin_batch(&mut self, generation: u32) {
        let begun = self.header(kind::BATCH_BEGIN, flag::REQUEST, 0, 0, SUBSYSTEM);
        self.number(attribute::GENERATION_ID, generation);
        self.end_message(begun);
    }

    pub(super) fn end_batch(&mut self, sequence: u32) {
        let begun = self.header(kind::BATCH_END, flag::REQUEST, sequence, 0, SUBSYSTEM);
        self.end_message(begun);
    }

    fn header(&mut self, kind: u16, flags: u16, sequence: u32, family: u8, resource: u16) -> Begun {
        let start = self.0.len();
        self.0.extend([0; 4]);
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(flags.to_ne_bytes());
        self.0.extend(sequence.to_ne_bytes());
        self.0.extend([0; 4]);
        self.0.extend([family, 0]);
        self.0.extend(resource.to_be_bytes());
        Begun(start)
    }

    pub(super) fn end_message(&mut self, Begun(start): Begun) {
        let length = u32::try_from(self.0.len() - start).expect("a message is far below 4 GiB");
        self.0[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// Asks for an acknowledgement of a message that has begun.
    pub(super) fn acknowledged(&mut self, message: &Begun) {
        let flags = &mut self.0[message.0 + 6..message.0 + 8];
        let with = u16::from_ne_bytes([flags[0], flags[1]]) | flag::ACK;
        flags.copy_from_slice(&with.to_ne_bytes());
    }

    pub(super) fn attribute(&mut self, number: u16, value: &[u8]) {
        let length = u16::try_from(4 + value.len()).expect("an attribute of ours is short");
        self.0.extend(length.to_ne_bytes());
        self.0.extend(number.to_ne_bytes());
        self.0.extend(value);
        self.pad();
    }

    pub(super) fn number(&mut self, number: u16, value: u32) {
        self.attribute(number, &value.to_be_bytes());
    }

    /// A text with the zero byte at its end.
    pub(super) fn text(&mut self, number: u16, value: &str) {
        let bytes: Vec<u8> = value.bytes().chain([0]).collect();
        self.attribute(number, &bytes);
    }

    /// Begins an attribute that consists of others.
    pub(super) fn begin(&mut self, number: u16) -> Begun {
        let start = self.0.len();
        self.0.extend([0, 0]);
        self.0.extend((number | NESTED).to_ne_bytes());
        Begun(start)
    }

    pub(super) fn end(&mut self, Begun(start): Begun) {
        let length = u16::try_from(self.0.len() - start).expect("lists are split before they are too long");
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    /// How long an attribute is by now.
    pub(super) fn length_of(&self, begun: &Begun) -> usize {
        self.0.len() - begun.0
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

/// A message of the kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) sequence: u32,
    body: &'a [u8],
}

impl<'a> Message<'a> {
    /// The attributes of a message of nf_tables.
    pub(super) fn attributes(&self) -> Attributes<'a> {
        Attributes(self.body.get(GENERIC_HEADER..).unwrap_or_default())
    }

    /// The code of an error or acknowledgement, as in errno(3); 0 for an acknowledgement.
    pub(super) fn error(&self) -> Option<i32> {
        let code = self.body.get(..4)?.try_into().map(i32::from_ne_bytes).ok()?;
        Some(code.wrapping_neg())
    }
}

/// The messages of a datagram. What is cut off is left out.
pub(super) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let number = |at: usize| datagram.get(at..at + 4)?.try_into().map(u32::from_ne_bytes).ok();
        let short = |at: usize| datagram.get(at..at + 2)?.try_into().map(u16::from_ne_bytes).ok();
        let length = usize::try_from(number(0)?).ok()?;
        let (kind, flags, sequence) = (short(4)?, short(6)?, number(8)?);
        let body = datagram.get(HEADER..length)?;
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message { kind, flags, sequence, body })
    })
}

/// Attributes, one after the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    /// Each with its number.
    pub(super) fn each(self) -> impl Iterator<Item = (u16, &'a [u8])> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let short = |at: usize| rest.get(at..at + 2)?.try_into().map(u16::from_ne_bytes).ok();
            let (length, number) = (usize::from(short(0)?), short(2)? & !NESTED & !NET_ORDER);
            let value = rest.get(4..length)?;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            Some((number, value))
        })
    }

    pub(super) fn get(self, number: u16) -> Option<&'a [u8]> {
        self.each().find(|(found, _)| *found == number).map(|(_, value)| value)
    }

    pub(super) fn nested(self, number: u16) -> Option<Self> {
        self.get(number).map(Self)
    }

    pub(super) fn number(self, number: u16) -> Option<u32> {
        self.get(number)?.try_into().map(u32::from_be_bytes).ok()
    }

    pub(super) fn text(self, number: u16) -> Option<&'a str> {
        let bytes = self.get(number)?;
        std::str::from_utf8(bytes.strip_suffix(&[0]).unwrap_or(bytes)).ok()
    }

    /// Attributes that are the value of another.
    pub(super) fn of(value: &'a [u8]) -> Self {
        Self(value)
    }
}

/// `NLA_F_NET_BYTEORDER`.
const NET_ORDER: u16 = 0x4000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let mut writer = Writer::default();
        writer.begin_batch(7);
        let message = writer.message(kind::NEW_SET, flag::REQUEST, 3);
        writer.text(attribute::SET_NAME, "pods");
        let nested = writer.begin(attribute::SET_DESCRIPTION);
        writer.number(attribute::FIELD_LENGTH, 0x0102_0304);
        writer.end(nested);
        writer.acknowledged(&message);
        writer.end_message(message);
        let read: Vec<_> = messages(writer.bytes()).collect();
        assert_eq!(read.len(), 2);
        let attributes = read[1].attributes();
        assert_eq!((read[1].kind, read[1].flags, read[1].sequence), (10 << 8 | kind::NEW_SET, 5, 3));
        assert_eq!(attributes.text(attribute::SET_NAME), Some("pods"));
        let nested = attributes.nested(attribute::SET_DESCRIPTION).unwrap();
        assert_eq!(nested.number(attribute::FIELD_LENGTH), Some(0x0102_0304));
    }

    #[test]
    fn what_is_cut_off_is_left_out() {
        let mut writer = Writer::default();
        let message = writer.message(kind::NEW_SET, 0, 1);
        writer.text(1, "a name");
        writer.end_message(message);
        for length in 0..writer.bytes().len() {
            assert_eq!(messages(&writer.bytes()[..length]).count(), 0, "{length}");
            assert!(Attributes::of(&writer.bytes()[..length]).each().count() < 30);
        }
        assert_eq!(messages(&[0; 64]).count(), 0);
    }
}
