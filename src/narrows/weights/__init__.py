"""Where a rank's weights come from: checkpoints on disk, or seeded random numbers."""
