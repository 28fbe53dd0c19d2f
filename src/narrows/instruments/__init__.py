"""Readers of step records: time per op, sums per collective, traces of every rank."""
