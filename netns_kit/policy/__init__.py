"""Policy: which flows may leave, by name, address and port; without a socket.

Law of this package: no socket, no clock, no log.
"""
