"""Bodies of requests and answers, field by field, in OpenAI's words. Knows shapes and ranges; decides nothing."""
