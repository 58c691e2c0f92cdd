"""A random autoencoder and exact products. Asked for with `pytest_plugins = ("decoder_fixtures",)`."""

import jax
import pytest
from decoder_helpers import make_kl


@pytest.fixture
def products_in_f32():
    """On a GPU f32 products are TF32 by default, 2e-3 away; it is the networks that are compared here."""
    with jax.default_matmul_precision("float32"):
        yield


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    """(model, directory) of one tiny AutoencoderKL; tests that change files copy it."""
    model, directory = make_kl(), tmp_path_factory.mktemp("kl")
    model.save_pretrained(directory)
    return model, directory
