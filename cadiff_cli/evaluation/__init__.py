"""Agreement of label maps: with references, and between scans of one person."""
