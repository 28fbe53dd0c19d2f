"""Evaluation: how good a model's answers are, and whether a layout changes them. Above the engine, below the cli."""
