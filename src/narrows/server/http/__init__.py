"""HTTP below the routes: connections, middleware, request bodies, errors, JSON and streams."""
