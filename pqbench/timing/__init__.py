"""Benchmarks that time instead of scoring: one layer's attention, and a whole model's latency."""
