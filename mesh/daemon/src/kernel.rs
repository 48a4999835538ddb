//! Link, addresses, routes and rules over rtnetlink.
