//! Metrics by the Prometheus conventions: base units, `_total` for counters, one meaning for each name.
//!
//! A page of metrics is made from one value that says everything ([`crate::status::Status`], a relay's snapshot) when it is
//! asked for: nothing is counted twice, and nothing is kept for metrics alone. The tables in docs/metrics.md are held to
//! the descriptions here.

pub mod daemon;
pub mod gateway;
pub mod policy;
pub mod process;
pub mod relay;

use std::collections::BTreeSet;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

/// What a metric does over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows while the process lives.
    Counter,
    /// Goes up and down.
    Gauge,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
        })
    }
}

/// One metric's description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// Its whole name, a counter's with `_total`.
    pub name: &'static str,
    /// Counter or gauge.
    pub kind: Kind,
    /// Its labels, in the order in which samples give their values.
    pub labels: &'static [&'static str],
    /// What it means, for `# HELP` and the table.
    pub help: &'static str,
}

impl Metric {
    /// A counter; its name ends with `_total`.
    pub const fn counter(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Self {
        Self { name, kind: Kind::Counter, labels, help }
    }

    /// A gauge.
    pub const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Self {
        Self { name, kind: Kind::Gauge, labels, help }
    }
}

/// How a page is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Prometheus' own text format, version 0.0.4.
    Text,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl Format {
    /// What a client that accepts `accept` (the header's text) is given: OpenMetrics where it names it.
    pub fn negotiate(accept: Option<&str>) -> Self {
        match accept {
            Some(accept) if accept.contains("application/openmetrics-text") => Self::OpenMetrics,
            Some(_) | None => Self::Text,
        }
    }

    /// The page's media type.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// Metrics with their samples, in the order in which they were added.
#[derive(Debug, Default)]
pub struct Page {
    families: Vec<(Metric, Vec<Sample>)>,
}

#[derive(Debug)]
struct Sample {
    labels: Vec<(&'static str, String)>,
    value: f64,
}

impl Page {
    /// Adds the one sample of a metric without labels.
    pub fn add(&mut self, metric: &Metric, value: f64) {
        self.add_each(metric, [([], value)]);
    }

    /// Adds samples of a metric: the labels' values, in the metric's order, and the value. Of samples with the same labels
    /// the first one counts: a second one would make Prometheus refuse the whole page.
    pub fn add_each<const N: usize>(&mut self, metric: &Metric, samples: impl IntoIterator<Item = ([String; N], f64)>) {
        assert_eq!(metric.labels.len(), N, "{}: labels are as described", metric.name);
        let mut seen = BTreeSet::new();
        let first = |(values, value): ([String; N], f64)| {
            let labels = metric.labels.iter().copied().zip(values.clone()).collect();
            seen.insert(values).then_some(Sample { labels, value })
        };
        let samples: Vec<Sample> = samples.into_iter().filter_map(first).collect();
        if !samples.is_empty() {
            self.families.push((*metric, samples));
        }
    }

    /// The page's text.
    pub fn render(self, format: Format) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Formatted { page: self, format }));
        let mut out = String::new();
        let written = match format {
            Format::Text => text::encode_registry(&mut out, &registry),
            Format::OpenMetrics => text::encode(&mut out, &registry),
        };
        written.expect("writing to a String does not fail");
        out
    }
}

#[derive(Debug)]
struct Formatted {
    page: Page,
    format: Format,
}

impl Collector for Formatted {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        for (metric, samples) in &self.page.families {
            // OpenMetrics names a counter without the suffix, which its encoder appends to every sample.
            let name = match self.format {
                Format::Text => metric.name,
                Format::OpenMetrics => metric.name.strip_suffix("_total").unwrap_or(metric.name),
            };
            let kind = match metric.kind {
                Kind::Counter => MetricType::Counter,
                Kind::Gauge => MetricType::Gauge,
            };
            let mut family = encoder.encode_descriptor(name, metric.help, None, kind)?;
            for Sample { labels, value } in samples {
                if labels.is_empty() {
                    self.encode_value(metric.kind, *value, &mut family)?;
                } else {
                    let labels = labels.as_slice();
                    self.encode_value(metric.kind, *value, &mut family.encode_family(&labels)?)?;
                }
            }
        }
        Ok(())
    }
}

impl Formatted {
    fn encode_value(&self, kind: Kind, value: f64, encoder: &mut MetricEncoder<'_>) -> fmt::Result {
        match (kind, self.format) {
            (Kind::Counter, Format::OpenMetrics) => encoder.encode_counter::<NoLabelSet, _, f64>(&value, None),
            (Kind::Counter, Format::Text) | (Kind::Gauge, _) => encoder.encode_gauge(&value),
        }
    }
}

#[cfg(test)]
mod tests;
