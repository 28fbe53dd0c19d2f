"""The engine: binds plans to models, schedules requests, runs steps, gives text."""
