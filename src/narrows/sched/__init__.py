"""Requests, pages, the scheduler and the batches it makes, in whole numbers. No torch."""
