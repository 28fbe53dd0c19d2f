"""The real scheduler on predicted time. No torch, ranks or clock."""
