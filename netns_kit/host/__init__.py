"""This machine: its sysctls, addresses, limits and files, and why it refuses."""
