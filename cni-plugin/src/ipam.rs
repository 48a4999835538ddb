//! Our own address management: which addresses there are ([`Pool`]), and who holds which ([`Store`]).

mod pool;
mod store;

pub use pool::{Pool, pools};
pub use store::{Damage, Entry, Lease, Store, networks};
