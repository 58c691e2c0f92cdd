"""Raw images and captions in, an encoded dataset out. Never imports JAX."""
