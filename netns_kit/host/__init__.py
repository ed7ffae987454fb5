"""This machine: its sysctls, addresses, limits and files, and the diagnosis of refused calls."""
