//! What a program says about itself on /metrics, in Prometheus' text format.

use std::collections::BTreeMap;

/// One reading.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Vec<Sample>);

/// One line.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Name of the metric.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

/// Verbs of `apiserver_request_total` that change something.
const WRITING_VERBS: [&str; 6] = ["APPLY", "DELETE", "DELETECOLLECTION", "PATCH", "POST", "PUT"];

impl Metrics {
    /// Reads the lines that can be read; others are left out.
    pub fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(parse_line).collect())
    }

    /// All samples of the metric `name`.
    pub fn samples<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Sample> {
        self.0.iter().filter(move |sample| sample.name == name)
    }

    /// The sum of all samples of `name` whose labels have these values.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let fits = |sample: &&Sample| labels.iter().all(|(label, value)| sample.label(label) == *value);
        self.samples(name).filter(fits).map(|sample| sample.value).sum()
    }

    /// How many requests that change something the API server has answered for this kind (plural, as in a path: `nodes`),
    /// subresources such as `nodes/status` included, whatever the answer was.
    pub fn writes(&self, resource: &str) -> u64 {
        let requests = |verb| self.sum("apiserver_request_total", &[("resource", resource), ("verb", verb)]);
        // Counters hold whole numbers far below 2^53.
        WRITING_VERBS.map(requests).iter().sum::<f64>() as u64
    }
}

impl Sample {
    /// The value of a label; empty if it has none, which means the same in Prometheus.
    pub fn label(&self, label: &str) -> &str {
        self.labels.get(label).map_or("", String::as_str)
    }
}

/// `name{label="value",..} value`, or without labels.
fn parse_line(line: &str) -> Option<Sample> {
    let (series, value) = line.rsplit_once(' ').filter(|_| !line.starts_with('#'))?;
    let value = value.parse().ok()?;
    let Some((name, labels)) = series.split_once('{') else {
        return Some(Sample { name: series.to_owned(), labels: BTreeMap::new(), value });
    };
    let mut rest = labels.strip_suffix('}')?;
    let mut labels = BTreeMap::new();
    while let Some((label, quoted)) = rest.split_once("=\"") {
        let (text, after) = unquote(quoted)?;
        labels.insert(label.trim_start_matches(',').to_owned(), text);
        rest = after;
    }
    Some(Sample { name: name.to_owned(), labels, value })
}

/// The text up to the closing quote, and what follows it.
fn unquote(quoted: &str) -> Option<(String, &str)> {
    let mut text = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((text, &quoted[at + 1..])),
            '\\' => match characters.next()?.1 {
                'n' => text.push('\n'),
                other => text.push(other),
            },
            other => text.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_samples_and_what_is_no_line_is_left_out() {
        let text = "# HELP up Is it up?\nup 1\nnot a line\nx{a=\"b, c\",d=\"e\\\"f\\\\\"} 2.5\nx{a=\"g\"} 1e3\n";
        let metrics = Metrics::parse(text);
        assert_eq!(metrics.sum("up", &[]), 1.0);
        assert_eq!(metrics.sum("x", &[]), 1002.5);
        assert_eq!(metrics.sum("x", &[("d", "e\"f\\")]), 2.5);
        assert_eq!(metrics.sum("x", &[("a", "b, c"), ("d", "other")]), 0.0);
    }

    #[test]
    fn writes_are_what_changes_something() {
        let line = |verb: &str, sub: &str| {
            format!(
                "apiserver_request_total{{code=\"200\",resource=\"nodes\",subresource=\"{sub}\",verb=\"{verb}\"}} 3\n"
            )
        };
        let text = [line("APPLY", ""), line("PATCH", "status"), line("WATCH", ""), line("LIST", "")].concat();
        assert_eq!(Metrics::parse(&text).writes("nodes"), 6);
        assert_eq!(Metrics::parse(&text).writes("pods"), 0);
    }
}
