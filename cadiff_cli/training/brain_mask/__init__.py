"""Train the network that finds the brain: target, settings, heads, patches, losses, run."""
