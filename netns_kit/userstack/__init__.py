"""UserStack: the stack with its gateway, on the event loop, on a thread or in workers."""
