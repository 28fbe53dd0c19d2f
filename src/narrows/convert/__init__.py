"""Room of conversions: other file formats to a Hugging Face folder, the only format that narrows loads.

It imports `errors` only, and no torch: weights pass through numpy, a piece of a tensor at a time.
"""
