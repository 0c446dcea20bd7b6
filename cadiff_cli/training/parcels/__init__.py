"""Train the network that names parcels: settings, prior, draws, losses, run."""
