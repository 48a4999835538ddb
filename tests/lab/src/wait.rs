//! Waiting for conditions, always with a deadline.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Asks `condition` every `every` until it yields a value; after `patience` fails with `what` and how long it waited.
pub fn until<T>(
    what: &str,
    patience: Duration,
    every: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if start.elapsed() > patience {
            bail!("waited {:.1} s in vain: {what}", start.elapsed().as_secs_f64());
        }
        thread::sleep(every);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_is_returned_as_soon_as_it_is_there() {
        let mut asked = 0;
        let value = until("three", Duration::from_secs(5), Duration::from_millis(1), || {
            asked += 1;
            Ok((asked == 3).then_some(asked))
        });
        assert_eq!(value.unwrap(), 3);
    }

    #[test]
    fn the_deadline_names_what_was_waited_for() {
        let never = until::<()>("the moon", Duration::from_millis(5), Duration::from_millis(1), || Ok(None));
        assert!(never.unwrap_err().to_string().contains("the moon"));
    }
}
