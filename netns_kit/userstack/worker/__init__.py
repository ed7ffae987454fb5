"""Worker processes: the stack in a sandbox of its own."""
