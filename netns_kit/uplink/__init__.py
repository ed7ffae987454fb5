"""`Uplink`: which flows may leave, and how."""
