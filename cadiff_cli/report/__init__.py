"""HTML pages, one per scan, one per group, and those of atlases and ablations."""
