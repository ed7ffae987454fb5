"""The doctor: every feature tried by the functions that are used for real."""
