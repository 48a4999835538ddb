//! How measurements are summed up.

use serde::Serialize;

/// How a number of measurements lie, in milliseconds; zero where there is none.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Spread {
    pub(super) n: usize,
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

impl Spread {
    pub(super) fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        // Nearest rank: the smallest value that so many of a hundred do not exceed.
        let rank = |percent: usize| (values.len() * percent).div_ceil(100).saturating_sub(1);
        let at = |index: usize| values.get(index).copied().unwrap_or_default();
        Self { n: values.len(), p50: at(rank(50)), p99: at(rank(99)), max: values.last().copied().unwrap_or_default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let spread = Spread::of((1..=50).map(f64::from));
        assert_eq!((spread.n, spread.p50, spread.p99, spread.max), (50, 25.0, 50.0, 50.0));
        assert_eq!(Spread::of([7.0].into_iter()).p50, 7.0);
        assert_eq!(Spread::of(std::iter::empty()).n, 0);
    }
}
