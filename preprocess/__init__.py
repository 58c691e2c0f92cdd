"""Raw images and captions in, an encoded dataset out. Never imports JAX."""


class PreprocessError(Exception):
    """Something the user can put right: the message says what is wrong and what to do."""
