//! Errors of the API server in words that a person can act on, in one line.

use std::error::Error as _;

use kube::Error;

/// An error of the API: what was said, its causes, and what to do.
pub fn words(error: &Error) -> String {
    let Error::Api(status) = error else { return unreachable(&chain(error)) };
    let said = if status.message.is_empty() { &status.reason } else { &status.message };
    match status.code {
        401 => format!(
            "the API server does not accept the credentials ({said}); they ran out, or are another cluster's: renew the \
             kubeconfig, or restart the pod"
        ),
        403 => format!("the API server forbids it: {said}; the chart's roles grant what is needed"),
        _ => format!("the API server answered {}: {said}", status.code),
    }
}

fn unreachable(causes: &str) -> String {
    match remedy(causes) {
        Some(remedy) => format!("the API server cannot be reached: {causes}; {remedy}"),
        None => format!("the API server cannot be reached: {causes}"),
    }
}

/// What to do, by what rustls and the system say.
fn remedy(causes: &str) -> Option<&'static str> {
    const OTHER_CLUSTER: &str = "its certificate is not from the CA of the kubeconfig or ServiceAccount: this is another \
         cluster, or it was made anew";
    /// The first that fits; what is told of certificates stands before what is told of connections.
    const REMEDIES: [(&str, &str); 8] = [
        ("UnknownIssuer", OTHER_CLUSTER),
        ("BadSignature", OTHER_CLUSTER),
        (
            "not valid for",
            "its certificate lacks the address by which it was called: add that to the API server's certificate (k3s: \
             `--tls-san`), or call it by a name that is in there",
        ),
        ("Expired", "its certificate ran out, or this machine's clock is wrong"),
        ("NotValidYet", "this machine's clock is wrong, or the API server's was when its certificate was made"),
        ("onnection refused", "nothing listens there: does the API server run, and are address and port right?"),
        ("failed to lookup", "its name does not resolve here: check the address in the kubeconfig and the DNS"),
        ("elapsed", "nothing answers: are address and port right, and does a firewall or a route stand between?"),
    ];
    REMEDIES.iter().find(|(sign, _)| causes.contains(sign)).map(|(_, remedy)| *remedy)
}

/// An error with its causes. The outer ones of a connection that fails only say that it does.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = error.source();
    }
    text.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Outer(std::io::Error);

    impl std::fmt::Display for Outer {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("client error (Connect)")
        }
    }

    impl std::error::Error for Outer {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            Some(&self.0)
        }
    }

    #[test]
    fn an_error_of_a_connection_tells_its_cause_and_what_to_do() {
        let of = |cause: &str| words(&Error::Service(Box::new(Outer(std::io::Error::other(cause.to_owned())))));
        let said = of("tcp connect error: Connection refused (os error 111)");
        assert!(said.contains("client error (Connect): tcp connect error: Connection refused"), "{said}");
        assert!(said.ends_with("are address and port right?"), "{said}");
        for (cause, remedy) in [
            ("invalid peer certificate: UnknownIssuer", "another cluster"),
            ("invalid peer certificate: certificate not valid for name \"10.0.0.1\"; valid for:\n a", "--tls-san"),
            ("invalid peer certificate: Expired", "clock"),
            ("deadline has elapsed", "firewall"),
        ] {
            let said = of(cause);
            assert!(said.contains(remedy) && !said.contains('\n'), "{said}");
        }
        assert!(of("something else").ends_with("something else"));
    }
}
