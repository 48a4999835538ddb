//! Tells when a value that only one can have is really gone.
//!
//! `Weak::strong_count` of the value itself says 0 as soon as its destructor begins, while its file is still locked and
//! its port still bound. A [`Lifeline`] as the value's last field ends after all the others.

use std::sync::{Arc, Weak};

/// The last field of what is watched: fields are dropped in the order in which they are declared.
#[derive(Debug, Default)]
pub struct Lifeline(Arc<()>);

impl Lifeline {
    /// Watches the end of this one's owner.
    pub fn watch(&self) -> Watch {
        Watch(Arc::downgrade(&self.0))
    }
}

/// Knows whether the watched value is gone.
#[derive(Clone, Debug)]
pub struct Watch(Weak<()>);

impl Watch {
    /// Whether every field before the lifeline has been dropped.
    pub fn gone(&self) -> bool {
        self.0.strong_count() == 0
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    /// Its destructor begins and ends when the test says so.
    struct Slow(Arc<Barrier>);

    impl Drop for Slow {
        fn drop(&mut self) {
            self.0.wait();
            self.0.wait();
        }
    }

    struct Owner {
        _slow: Slow,
        lifeline: Lifeline,
    }

    #[test]
    fn it_is_gone_when_the_destructors_have_ended_and_not_before() {
        let step = Arc::new(Barrier::new(2));
        let owner = Arc::new(Owner { _slow: Slow(Arc::clone(&step)), lifeline: Lifeline::default() });
        let (weak, watch) = (Arc::downgrade(&owner), owner.lifeline.watch());
        let dropping = std::thread::spawn(move || drop(owner));
        step.wait();
        assert_eq!(weak.strong_count(), 0, "which is why the count of the value itself does not serve");
        assert!(!watch.gone());
        step.wait();
        dropping.join().unwrap();
        assert!(watch.gone());
    }
}
