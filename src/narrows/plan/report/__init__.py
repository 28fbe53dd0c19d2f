"""Plans in words, tables, JSON and files. The planner imports none of it."""
