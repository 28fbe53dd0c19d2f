"""What ``benchmarks/hostile.py`` is made of: the attacks, and what watches the server beside them."""
