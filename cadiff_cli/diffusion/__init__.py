"""The diffusion core: tensors of any shape in, tensors out.  Never says label, brain or file."""
