"""Train the network that segments: settings, scans, patches, losses, objective, run."""
