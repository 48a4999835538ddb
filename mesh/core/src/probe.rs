//! The probe datagram.
