"""An engine that serves many callers: a queue, one loop, recovery of failed ranks, and figures about itself."""
