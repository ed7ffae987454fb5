"""`UserStack`: the stack with its gateway, on the event loop, in a thread or in workers."""
