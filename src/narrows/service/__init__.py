"""An engine that serves: requests of many callers, one loop, ranks started anew; what it tells of itself."""
