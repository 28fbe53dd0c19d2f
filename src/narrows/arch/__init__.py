"""What models are (configs, presets), their stages, weight sharding and slices of weights. No torch."""
