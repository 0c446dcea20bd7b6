"""Training of conditional atlases."""
