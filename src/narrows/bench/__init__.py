"""Benchmarks: works run in turns under several variants in one run, beside what this machine allows."""
