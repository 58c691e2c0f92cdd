"""What an export carries along: files that need PyTorch and diffusers, and nothing of this project or JAX.

They are copied as they are into the exported directory. Nothing else in `fluxdit_jax` imports them.
"""
