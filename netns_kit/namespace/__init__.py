"""`Namespace`: network namespaces, the agent inside, and the commands that run there."""
