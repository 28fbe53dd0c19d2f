"""The planner, plans, the plan cache, and reports on plans. No torch, directly or not."""
