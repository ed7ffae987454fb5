"""`Forwarder`: ports of the host that lead into the namespace."""
