"""PURE room: the planner, plans, the plan cache and their explanation. No torch, directly or not."""
