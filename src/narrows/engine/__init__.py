"""The engine: plans bound to models and walked, requests scheduled, text out; and the proof that layouts agree."""
