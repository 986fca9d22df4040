//! Links, addresses, routes, neighbours, forwarding entries and sysctls.
