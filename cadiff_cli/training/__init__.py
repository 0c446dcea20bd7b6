"""Train the network: data, augmentation, losses, loop."""
