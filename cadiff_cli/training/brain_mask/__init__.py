"""Train the network that finds the brain: settings, heads, target, patches, losses, run."""
