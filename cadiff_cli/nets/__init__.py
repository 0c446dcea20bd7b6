"""The CA-Diff network.  Tensors in, tensors out; no files, no sampling."""
