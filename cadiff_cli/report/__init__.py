"""HTML pages, one per scan and one per group, made from the files on disk alone."""
