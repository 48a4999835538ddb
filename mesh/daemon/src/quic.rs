//! QUIC on the mesh socket: relay, gateway and join service.
