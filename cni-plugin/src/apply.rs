//! Carrying out a plan: step by step, and back where a step fails.

use crate::plan::{Inverse, Plan, Step};
use crate::spec::{Error, Result};

/// Who carries out steps: the kernel of the node, or a stand-in in tests.
pub trait Apply {
    /// Carries out one step, whole or not at all.
    fn apply(&mut self, step: &Step) -> Result<()>;

    /// Takes a pair of interfaces away by its name on the host; false if there is none.
    fn delete_pair(&mut self, host: &str) -> Result<bool>;
}

/// Carries out all of `plan`, or nothing: where a step fails, what was done before it is taken back, last first.
pub fn apply(plan: &Plan, to: &mut impl Apply) -> Result<()> {
    for (done, step) in plan.steps.iter().enumerate() {
        if let Err(error) = to.apply(step) {
            return Err(undo(&plan.steps[..done], to, error));
        }
    }
    Ok(())
}

/// Takes all of `plan` back, because of an error that came later; gives that error on, with what could not be undone.
pub fn revert(plan: &Plan, to: &mut impl Apply, error: Error) -> Error {
    undo(&plan.steps, to, error)
}

fn undo(done: &[Step], to: &mut impl Apply, mut error: Error) -> Error {
    for step in done.iter().rev() {
        let undone = match (step.inverse(), step) {
            (Inverse::DeletePair, Step::CreatePair(pair)) => to.delete_pair(&pair.host).map(|_found| ()),
            (Inverse::DeletePair | Inverse::Nothing, _) => Ok(()),
        };
        if let Err(left) = undone {
            error = error.with_details(format!("it could not be undone, GC will do it: {left}"));
        }
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attachment::Attachment;
    use crate::plan::Wanted;
    use crate::spec::Code;

    /// A kernel that fails at one step, and knows what is on it.
    #[derive(Default)]
    struct Fake {
        fail_at: Option<usize>,
        calls: usize,
        pairs: Vec<String>,
        stuck: bool,
    }

    impl Apply for Fake {
        fn apply(&mut self, step: &Step) -> Result<()> {
            self.calls += 1;
            if self.fail_at == Some(self.calls - 1) {
                return Err(Error::new(Code::Kernel, step.describe()));
            }
            if let Step::CreatePair(pair) = step {
                self.pairs.push(pair.host.clone());
            }
            Ok(())
        }

        fn delete_pair(&mut self, host: &str) -> Result<bool> {
            if self.stuck {
                return Err(Error::new(Code::Kernel, "busy"));
            }
            let before = self.pairs.len();
            self.pairs.retain(|pair| pair != host);
            Ok(self.pairs.len() < before)
        }
    }

    fn plan() -> Plan {
        let attachment = Attachment { network: "pods".into(), container: "c1".into(), ifname: "eth0".into() };
        let addresses = vec!["10.244.1.2".parse().unwrap(), "fd00:244:1::2".parse().unwrap()];
        Wanted { mac: attachment.pod_mac(), attachment, mtu: 1280, addresses, routes: vec![] }.plan().unwrap()
    }

    #[test]
    fn a_failure_at_any_step_leaves_nothing() {
        for fail_at in 0..plan().steps.len() {
            let mut kernel = Fake { fail_at: Some(fail_at), ..Fake::default() };
            let error = apply(&plan(), &mut kernel).unwrap_err();
            assert_eq!(error.message, plan().steps[fail_at].describe());
            assert_eq!(kernel.pairs, Vec::<String>::new(), "step {fail_at}");
        }
        let mut kernel = Fake::default();
        apply(&plan(), &mut kernel).unwrap();
        assert_eq!(kernel.pairs.len(), 1);
        let error = revert(&plan(), &mut kernel, Error::new(Code::Io, "later"));
        assert_eq!((kernel.pairs.len(), error.message.as_str()), (0, "later"));
    }

    #[test]
    fn an_undo_that_fails_is_told_beside_the_error_that_caused_it() {
        let mut kernel = Fake { fail_at: Some(plan().steps.len() - 1), stuck: true, ..Fake::default() };
        let error = apply(&plan(), &mut kernel).unwrap_err();
        assert!(error.details.contains("busy") && error.message.contains("carry packets"), "{error:?}");
    }
}
