"""Parts of a page as HTML text. All that comes from elsewhere is escaped."""

from __future__ import annotations

import base64
import html
import io

import numpy as np
from PIL import Image

from fluxdit_jax.pages.style import CSS

PICTURE = 192  # longer side at most, pixels; larger pictures are reduced
# Captions are escaped; should one get through all the same, the browser runs and fetches nothing.
_NOTHING_FOREIGN = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
)


def document(title: str, body: str) -> str:
    """A whole page; the title is escaped here, the body is HTML."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{_NOTHING_FOREIGN}<title>{text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{CSS}</style></head><body>{body}</body></html>\n"
    )


def text(value: object) -> str:
    """Escaped."""
    return html.escape(str(value))


def row(name: str, value: str) -> str:
    """Of a table of names and values."""
    kind = "number" if len(value) < 25 else "long"
    return f'<tr><td>{text(name)}</td><td class="{kind}">{text(value)}</td></tr>'


def jpeg(image: np.ndarray, longest: int = PICTURE, quality: int = 88) -> str:
    """The address of a picture, uint8 [H, W, 3], that stands in the page itself."""
    picture = Image.fromarray(image)
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture(image: np.ndarray, title: str) -> str:
    """A picture with its title below."""
    return f'<figure><img src="{jpeg(image)}" alt="{text(title)}"><figcaption>{text(title)}</figcaption></figure>'
