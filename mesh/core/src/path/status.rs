//! What a path agent says about itself, to people and as JSON.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Serialize, Serializer};

use super::way::Origin;
use crate::io::Via;

/// How a peer is reached, and why not better.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Status {
    /// In one word.
    pub state: State,
    /// Where its packets go.
    #[serde(serialize_with = "as_text")]
    pub via: Option<Via>,
    /// Smoothed round trip of that way; milliseconds in JSON.
    #[serde(rename = "rtt_ms", serialize_with = "as_millis")]
    pub rtt: Option<Duration>,
    /// Where the peer sees this node from on the direct way.
    pub seen_as: Option<SocketAddr>,
    /// Why it is not direct; none where it is.
    pub reason: Option<Reason>,
    /// Every way that is known, relays first.
    pub tried: Vec<Tried>,
}

/// The state of a path in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// No traffic: nothing is probed.
    Idle,
    /// Wanted, and there is no way yet.
    Connecting,
    /// Through a relay.
    Relayed,
    /// Straight.
    Direct,
}

impl State {
    /// The word in tables and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Connecting => "connecting",
            Self::Relayed => "relayed",
            Self::Direct => "direct",
        }
    }
}

/// Why a peer is not reached directly. `Display` is a sentence for people, [`Reason::label`] is stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Nothing was sent to the peer or came from it lately.
    NoDemand,
    /// The first round of probes is under way.
    Probing {
        /// How long already.
        since: Duration,
        /// How many addresses.
        addresses: usize,
    },
    /// The peer names no address, and was not heard from any.
    NoCandidates,
    /// None of the peer's addresses answers.
    NoAnswer {
        /// How many there are.
        addresses: usize,
        /// Since the last of them was given up.
        ago: Duration,
    },
    /// The peer answers small probes at this address, but no full-size ones.
    LargeProbesLost {
        /// The address.
        addr: SocketAddr,
        /// The size that does not pass, UDP payload in bytes.
        len: u16,
    },
    /// The direct way died, and is being probed.
    Died {
        /// The address that answers no more.
        addr: SocketAddr,
        /// Since when.
        ago: Duration,
    },
    /// No direct way, and no relay is connected.
    NoPath,
    /// A plain WireGuard peer without a configured endpoint that has not called yet.
    WaitsForPeer,
}

impl Reason {
    /// The stable word in metrics and JSON.
    pub fn label(&self) -> &'static str {
        match self {
            Self::NoDemand => "no_demand",
            Self::Probing { .. } => "probing",
            Self::NoCandidates => "no_candidates",
            Self::NoAnswer { .. } => "no_answer",
            Self::LargeProbesLost { .. } => "large_probes_lost",
            Self::Died { .. } => "died",
            Self::NoPath => "no_path",
            Self::WaitsForPeer => "waits_for_peer",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDemand => f.write_str("no traffic, so nothing is probed"),
            Self::Probing { since, addresses } => {
                write!(f, "probing {} since {}", Addresses(*addresses), Ago(*since))
            }
            Self::NoCandidates => f.write_str("the peer names no address at which it might be reached"),
            Self::NoAnswer { addresses, ago } => {
                write!(f, "no answer from {} (hard NAT at both ends?), tried {} ago", Addresses(*addresses), Ago(*ago))
            }
            Self::LargeProbesLost { addr, len } => write!(
                f,
                "{addr} answers small probes but none of {len} bytes: the path's MTU is smaller than the mesh needs \
                 (lower the mesh MTU, or let ICMP \"fragmentation needed\" pass)"
            ),
            Self::Died { addr, ago } => write!(f, "the direct path by {addr} died {} ago", Ago(*ago)),
            Self::NoPath => f.write_str("no direct path, and no relay is connected"),
            Self::WaitsForPeer => f.write_str("a plain WireGuard peer without an endpoint: waits for its first packet"),
        }
    }
}

impl Serialize for Reason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct as _;
        let mut out = serializer.serialize_struct("Reason", 2)?;
        out.serialize_field("code", self.label())?;
        out.serialize_field("text", &self.to_string())?;
        out.end()
    }
}

/// One way, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Tried {
    /// The way.
    #[serde(serialize_with = "way_as_text")]
    pub via: Via,
    /// Where its address comes from.
    #[serde(serialize_with = "as_label")]
    pub origin: Origin,
    /// What came of it.
    pub outcome: Outcome,
    /// Since the outcome was known; milliseconds in JSON. None while it is open.
    #[serde(rename = "ago_ms", serialize_with = "as_millis")]
    pub ago: Option<Duration>,
    /// Smoothed round trip; milliseconds in JSON.
    #[serde(rename = "rtt_ms", serialize_with = "as_millis")]
    pub rtt: Option<Duration>,
}

/// What came of probing a way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Known, not probed.
    Untried,
    /// Being probed.
    Probing,
    /// No answer.
    Silent,
    /// Small probes are answered, full-size ones are not.
    LargeProbesLost,
    /// It worked and stopped working.
    Died,
    /// It works.
    Works,
}

/// `1 address`, `3 addresses`.
struct Addresses(usize);

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} address{}", self.0, if self.0 == 1 { "" } else { "es" })
    }
}

/// A duration as people say it: `0.4 s`, `12 s`, `3 min`.
struct Ago(Duration);

impl fmt::Display for Ago {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_secs() {
            0..10 => write!(f, "{:.1} s", self.0.as_secs_f64()),
            secs @ 10..120 => write!(f, "{secs} s"),
            secs => write!(f, "{} min", secs / 60),
        }
    }
}

#[expect(clippy::ref_option, reason = "serde passes the field by reference")]
fn as_text<S: Serializer>(via: &Option<Via>, serializer: S) -> Result<S::Ok, S::Error> {
    match via {
        Some(via) => serializer.collect_str(via),
        None => serializer.serialize_none(),
    }
}

fn way_as_text<S: Serializer>(via: &Via, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(via)
}

#[expect(clippy::ref_option, reason = "serde passes the field by reference")]
fn as_millis<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    match duration {
        Some(duration) => serializer.serialize_f64(duration.as_micros() as f64 / 1000.0),
        None => serializer.serialize_none(),
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes the field by reference")]
fn as_label<S: Serializer>(origin: &Origin, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(origin.label())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_sentences_with_their_figures() {
        let addr = "203.0.113.5:4000".parse().unwrap();
        let cases = [
            (Reason::Probing { since: Duration::from_millis(420), addresses: 1 }, "probing 1 address since 0.4 s"),
            (
                Reason::NoAnswer { addresses: 4, ago: Duration::from_secs(185) },
                "no answer from 4 addresses (hard NAT at both ends?), tried 3 min ago",
            ),
            (Reason::Died { addr, ago: Duration::from_secs(12) }, "the direct path by 203.0.113.5:4000 died 12 s ago"),
        ];
        for (reason, text) in cases {
            assert_eq!(reason.to_string(), text);
        }
    }

    #[test]
    fn json_has_words_and_milliseconds() {
        let status = Status {
            state: State::Relayed,
            via: Some(Via::Direct("203.0.113.5:4000".parse().unwrap())),
            rtt: Some(Duration::from_micros(12_500)),
            seen_as: None,
            reason: Some(Reason::NoCandidates),
            tried: vec![],
        };
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["state"], "relayed");
        assert_eq!(json["via"], "203.0.113.5:4000");
        assert_eq!(json["rtt_ms"], 12.5);
        assert_eq!(json["reason"]["code"], "no_candidates");
    }
}
