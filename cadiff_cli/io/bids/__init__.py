"""BIDS: names, raw datasets, labelled scans, and the derivatives that cadiff writes."""
