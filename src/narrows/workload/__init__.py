"""Loads of requests over time, and figures of the answers, for benchmarks and simulations."""
