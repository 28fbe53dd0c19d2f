"""Bodies of requests and answers, field by field: shapes and limits."""
