"""Processes of our own: the messages that they exchange with their owner."""
