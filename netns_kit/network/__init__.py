"""`Network`: the five objects composed."""
