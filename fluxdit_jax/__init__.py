"""Train a text-to-image diffusion transformer from scratch on one card. See README.md."""

__version__ = "0.1.0"
