"""Tool calls as models write them in text: one file per format, found by name or by the chat template."""
