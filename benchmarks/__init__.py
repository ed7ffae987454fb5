"""Us and the peers, measured side by side: `python -m benchmarks`.  See docs/performance.md."""
