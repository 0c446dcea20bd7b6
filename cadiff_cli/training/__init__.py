"""Train the four networks: data, augmentation, losses, one loop."""
