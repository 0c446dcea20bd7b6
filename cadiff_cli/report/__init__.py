"""Pages that people look at: one per scan, one per group, made from files on disk alone."""
