"""What an export carries along: files that need numpy, PyTorch and diffusers, and nothing of this project or JAX.

They are copied as they are into the exported directory. Of them only `noise` is used here as well, which needs numpy
alone: so that a seed means the same picture everywhere.
"""
