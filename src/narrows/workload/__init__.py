"""PURE room: who asks what when, and the figures of the answers. For benchmarks and simulations; knows no server."""
