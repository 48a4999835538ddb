//! Rules and dashboard: every metric is one that the programs have, and a real Prometheus takes the rules.
