"""PURE room: the planner, plans, the plan book and their explanation. No torch, directly or not."""
