//! `token create`, `list` and `revoke`: through the daemon where one runs, else straight in the registry.

use std::time::Duration;

use anyhow::{Context as _, bail};
use keystone_mesh_core::token::TokenRecord;

use super::TokenCommand;
use super::output::{ago, print, print_json, table};
use crate::clock::unix_now;
use crate::config::Places;
use crate::control::{self, Answer, ControlError, Request, not_the_question};
use crate::member;

pub(super) async fn run(places: &Places, command: TokenCommand) -> anyhow::Result<()> {
    match command {
        TokenCommand::Create { ttl, uses, name_pattern, routes, json } => {
            let ttl = parse_ttl(&ttl)?;
            let uses = (uses != 0).then_some(uses);
            let answer = ask(places, Request::TokenCreate { ttl, uses, names: name_pattern, routes }).await?;
            let Answer::Token { token, id, expires } = answer else { return Err(not_the_question().into()) };
            if json {
                print_json(&serde_json::json!({ "token": token, "id": id, "expires": expires }))
            } else {
                print(&format!("{token}\n"))
            }
        }
        TokenCommand::List { json } => {
            let answer = ask(places, Request::TokenList).await?;
            let Answer::Tokens { tokens } = answer else { return Err(not_the_question().into()) };
            if json { print_json(&tokens.iter().map(describe).collect::<Vec<_>>()) } else { print(&list(&tokens)) }
        }
        TokenCommand::Revoke { id } => {
            ask(places, Request::TokenRevoke { id }).await?;
            print(&format!("token {id} is revoked; nodes that joined with it stay\n"))
        }
    }
}

/// Asks the daemon, or the registry itself where no daemon has it open.
pub(super) async fn ask(places: &Places, request: Request) -> anyhow::Result<Answer> {
    let asked = control::ask(&places.socket(), &request).await;
    if !matches!(asked, Err(ControlError::NotRunning { .. })) {
        return Ok(asked?);
    }
    let store = member::open_store(&places.state_dir).context("no daemon is running, and")?;
    Ok(control::refusals_are_errors(member::answer(&store, request).await)?)
}

fn list(tokens: &[TokenRecord]) -> String {
    if tokens.is_empty() {
        return "no tokens; make one with `keystone-mesh token create`\n".into();
    }
    let rows: Vec<_> = tokens.iter().map(row).collect();
    table(&["ID", "STATE", "USES LEFT", "EXPIRES", "NAMES", "ROUTES"], &rows)
}

fn parse_ttl(text: &str) -> anyhow::Result<Option<u64>> {
    if text == "never" {
        return Ok(None);
    }
    let ttl: Duration = humantime::parse_duration(text)
        .with_context(|| format!("--ttl {text}: expected as in `30m`, `24h`, `7d`, or `never`"))?;
    if ttl.as_secs() == 0 {
        bail!("--ttl {text}: a token needs at least a second of life");
    }
    Ok(Some(ttl.as_secs()))
}

fn state(token: &TokenRecord) -> &'static str {
    if token.revoked {
        "revoked"
    } else if token.expires.is_some_and(|at| at <= unix_now()) {
        "expired"
    } else if token.uses_left == Some(0) {
        "used up"
    } else {
        "good"
    }
}

fn row(token: &TokenRecord) -> Vec<String> {
    let expires = match token.expires {
        None => "never".to_owned(),
        Some(at) => match at.checked_sub(unix_now()) {
            Some(left) => format!("in {}", ago(left as f64)),
            None => format!("{} ago", ago((unix_now() - at) as f64)),
        },
    };
    let routes: Vec<String> = token.routes.iter().map(ToString::to_string).collect();
    vec![
        token.id.to_string(),
        state(token).to_owned(),
        token.uses_left.map_or("any".into(), |left| left.to_string()),
        expires,
        token.names.as_ref().map_or("any".into(), ToString::to_string),
        if routes.is_empty() { "none".into() } else { routes.join(" ") },
    ]
}

fn describe(token: &TokenRecord) -> serde_json::Value {
    serde_json::json!({
        "id": token.id,
        "state": state(token),
        "created": token.created,
        "expires": token.expires,
        "uses_left": token.uses_left,
        "names": token.names,
        "routes": token.routes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_are_read_as_people_write_them() {
        assert_eq!(parse_ttl("90m").unwrap(), Some(5400));
        assert_eq!(parse_ttl("never").unwrap(), None);
        assert!(parse_ttl("soon").unwrap_err().to_string().contains("30m"));
        assert!(parse_ttl("1ms").is_err());
    }
}
