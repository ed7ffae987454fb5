"""The gateway: where flows of the stack meet sockets of the host."""
