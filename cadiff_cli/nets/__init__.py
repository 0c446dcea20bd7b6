"""The networks: labels, brain masks, parcels, atlases.  Tensors in, tensors out; no files."""
