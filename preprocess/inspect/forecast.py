"""`build --dry-run`: what a build would make of an input, before any picture is decoded."""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fluxdit_jax.dataset.cells import FACTOR_BYTES
from fluxdit_jax.dataset.fields import CAPTION, LATENT, TEXT, VISION, field_named
from fluxdit_jax.shared.cli import duration
from fluxdit_jax.shared.sanitize import shown
from preprocess import PreprocessError, buckets
from preprocess.build import advice
from preprocess.build.build import plan_only
from preprocess.build.encode import Encoders
from preprocess.build.options import Options
from preprocess.build.parts import Part
from preprocess.build.plan import Plan
from preprocess.build.units import disk_errors
from preprocess.inspect.report import byte_size, padding

# TFLOP of the default encoders, counted by torch's FlopCounterMode: Flux VAE at 1024 px, DINOv3-L at 512 px,
# T5-Large a token.
_VAE_AT_1024, _VISION, _TEXT_A_TOKEN = 4.88, 0.72, 0.00065
_CHARACTERS_A_TOKEN = 4.2  # English through T5's tokenizer
_RECORD_OVERHEAD = 600  # bytes: names, sizes, hash, the shard's framing


@dataclasses.dataclass(frozen=True)
class Widths:
    """Of what the encoders make; those of the defaults, if they are not on this machine.

    Attributes:
      channels, factor: of the latent, and its pixels a side.
      text, vision: of a token and of a vision vector.
    """

    channels: int = 16
    factor: int = 8
    text: int = 1024
    vision: int = 1024

    @classmethod
    def of(cls, encoders: Encoders | None) -> Widths:
        if encoders is None:
            return cls()
        width = {name: identity.width for name, identity in encoders.identities.items()}
        return cls(width["vae"], encoders.vae.factor, width[TEXT.name], width.get(VISION.name, cls.vision))


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Figures about a plan.

    Attributes:
      counts: images a bucket, for the whole table. pixels: of an image's bucket, mean.
      bends: per image, in the order of the plan, see `advice.bend`.
      padding: share of a run's image tokens that are padding.
      tokens: estimated text tokens a caption.
      captions: captions an image, mean.
      record_bytes: estimated size of a record, mean.
    """

    counts: dict[buckets.Size, int]
    pixels: float
    bends: np.ndarray
    padding: float
    tokens: float
    captions: float
    record_bytes: float


def forecast(plan: Plan, widths: Widths = Widths()) -> Forecast:  # noqa: B008  frozen
    """The figures of a plan."""
    options = plan.options
    table = dict.fromkeys(options.buckets(), 0)
    for (height, width), count in zip(plan.items.sizes, np.bincount(plan.items.size_of), strict=True):
        table[buckets.nearest(options.buckets(), int(height), int(width))] += int(count)
    tokens = bytes_of_texts = 0.0
    for text in (caption for item in plan.items for caption in item.captions):
        tokens += min(options.max_tokens, len(text) / _CHARACTERS_A_TOKEN + 1)
        bytes_of_texts += len(text.encode())
    total, captions = len(plan.items), plan.items.captions
    pixels = sum(height * width * count for (height, width), count in table.items()) / total
    record = 2 * widths.channels * pixels / widths.factor**2 + 4 * widths.vision + _RECORD_OVERHEAD
    record += options.vision_patches * (widths.vision + FACTOR_BYTES)
    record += (2 * widths.text * tokens + bytes_of_texts) / total
    return Forecast(
        counts=table,
        pixels=pixels,
        bends=advice.bends(plan),
        padding=padding(table, widths.factor),
        tokens=tokens / captions,
        captions=captions / total,
        record_bytes=record,
    )


def dry_run(options: Options, drawing: str = "", replace: bool = False) -> list[Part]:
    """Plans only: prints what a build would do. Writes nothing but the drawing.

    Args:
      drawing: a PNG of aspect ratios and buckets is written there, if it is not "".
      replace: as of `build`.

    Raises:
      PreprocessError: the input or an option does not allow it.
    """
    return plan_only(options, functools.partial(_report, drawing), replace)


def _report(drawing: str, parts: list[Part], encoders: Encoders | None, say: Callable[[str], None]) -> None:
    """Prints the forecast, that of several resolutions with the disk of each.

    Args:
      encoders: to try, None if they are not on this machine.
    """
    widths = Widths.of(encoders)
    forecasts = [forecast(part.plan, widths) for part in parts]
    for part, figures in zip(parts, forecasts, strict=True):
        _report_buckets(part.plan, figures, say)
    plan, figures = parts[-1].plan, forecasts[-1]
    _report_bends(plan, figures, say)
    _report_rejects(plan, say)
    _report_disk(parts, forecasts, widths, say)
    _report_time(parts, forecasts, encoders, say)
    if drawing:
        from preprocess.inspect.plots import draw_aspects

        aspects = (plan.items.sizes[:, 1] / plan.items.sizes[:, 0])[plan.items.size_of]
        with disk_errors(Path(drawing)):
            draw_aspects(aspects, figures.counts, Path(drawing))
        say(f"Picture: {drawing}")


def _report_disk(parts: list[Part], forecasts: list[Forecast], widths: Widths, say: Callable[[str], None]) -> None:
    needs = [len(part.plan.items) * figures.record_bytes for part, figures in zip(parts, forecasts, strict=True)]
    figures = forecasts[-1]
    several = f", {figures.captions:.2f} captions an image" if figures.captions > 1 else ""
    record = " + ".join(f"{each.record_bytes / 1e3:,.0f}" for each in forecasts)
    each_of = [f"{part.options.resolution} px {byte_size(need)}" for part, need in zip(parts, needs, strict=True)]
    by_side = f" ({', '.join(each_of)})" if len(parts) > 1 else ""
    say(
        f"disk: about {record} KB a record, {byte_size(sum(needs))} in all{by_side} (with {widths.channels} channels "
        f"at 1/{widths.factor} and {widths.text:,}-wide tokens, {figures.tokens:.0f} a caption{several}); while an "
        "existing dataset is made anew with other encoders, twice that"
    )


def _report_buckets(plan: Plan, figures: Forecast, say: Callable[[str], None]) -> None:
    options, total = plan.options, len(plan.items)
    say("\nbuckets (width x height)   aspect  tokens   fill    images  share")
    for size, count in figures.counts.items():
        if count:
            fill = size[0] * size[1] / options.resolution**2
            say(
                f"  {size[1]:5} x {size[0]:<5}            {size[1] / size[0]:6.2f}  {buckets.tokens(size):6}  "
                f"{fill:5.1%}  {count:8,}  {count / total:5.1%}"
            )
    fills = [size[0] * size[1] / options.resolution**2 for size in figures.counts]
    say(f"  {len(figures.counts)} buckets in the table, each at least {min(fills):.1%} full")
    say(f"  image tokens that are padding in a run with patch 2: {figures.padding:.2%}")


def _report_bends(plan: Plan, figures: Forecast, say: Callable[[str], None]) -> None:
    what = {"resize": "aspect ratio changed by", "crop": "area cut off", "pad": "area that is noise"}
    bends, fit = figures.bends, plan.options.fit
    say(
        f"fit {fit}: {what[fit]} {bends.mean():.2%} on average, p99 {np.quantile(bends, 0.99):.1%}, "
        f"worst {bends.max():.1%}; the worst are"
    )
    for index in np.argsort(-bends, kind="stable")[:5]:
        item = plan.items[int(index)]
        height, width = item.bucket
        say(f"  {bends[index]:6.1%}  {shown(item.key)}  {item.header.width}x{item.header.height} to {width}x{height}")


def _report_rejects(plan: Plan, say: Callable[[str], None]) -> None:
    for counted, title in (
        (True, "rejects: {:,}"),
        (False, "listed beside the rejects, and not counted, as no picture is missing for them: {:,}"),
    ):
        those = [reject for reject in plan.rejects if reject.counted == counted]
        if those:
            say(title.format(len(those)))
        for reason, count in collections.Counter(reject.reason for reject in those).most_common():
            example = next(reject for reject in those if reject.reason == reason)
            say(f"  {count:7,}  {reason} (for example {shown(example.key)})")


def _report_time(
    parts: list[Part], forecasts: list[Forecast], encoders: Encoders | None, say: Callable[[str], None]
) -> None:
    total = max(part.found.pictures for part in parts)
    if not total:
        say("time: no picture is to be encoded")
        return
    once = parts[-1].found.missing  # what is made once for all resolutions is missing at each of them
    if encoders is not None:
        made = [name for name in encoders.by_field if once[name]]
        largest = _trial(parts[-1].plan, forecasts[-1], encoders, made)
        seconds = sum(once[name] * each for name, each in largest.items())
        for part, figures in zip(parts[:-1], forecasts[:-1], strict=True):
            each = _trial(part.plan, figures, encoders, [LATENT.name])[LATENT.name]
            seconds += part.found.missing[LATENT.name] * each
        say(f"time: about {duration(seconds)} for {total:,} images with these encoders on this machine, by a trial")
        return
    work = (
        max(once["vision"], once.get("patches", 0)) * _VISION
        + once["text"] * _TEXT_A_TOKEN * forecasts[-1].tokens * forecasts[-1].captions
    )
    for part, figures in zip(parts, forecasts, strict=True):
        work += part.found.missing[LATENT.name] * _VAE_AT_1024 * figures.pixels / 1024**2
    rates = {"20 TFLOP/s (an APU)": 20, "60 (an RTX 4090)": 60, "0.5 (8 CPU cores)": 0.5}
    times = ", ".join(f"{duration(work / rate)} at {name}" for name, rate in rates.items())
    say(
        f"time: about {work / total:.1f} TFLOP an image with the default encoders: {times} really reached; with "
        "encoders in local directories this is measured instead"
    )


def _trial(plan: Plan, figures: Forecast, encoders: Encoders, names: list[str]) -> dict[str, float]:
    """Seconds an image of each of these fields: a picture of the commonest bucket and its captions, after a first."""
    height, width = max(figures.counts, key=lambda size: figures.counts[size])
    pictures = np.random.default_rng(0).integers(0, 256, (2, 1, height, width, 3), np.uint8)
    lengths = np.fromiter((sum(map(len, item.captions)) for item in plan.items), np.int64)
    captions = list(plan.items[int(np.argsort(lengths, kind="stable")[len(lengths) // 2])].captions)
    seconds = {}
    try:
        for name in names:
            for picture in pictures:  # another one, as an encoder may know the last
                start = time.perf_counter()
                encoders.by_field[name].encode(captions if field_named(name).made_from == CAPTION else picture)
                seconds[name] = time.perf_counter() - start
    except ValueError as error:
        raise PreprocessError(f"the encoders cannot take a picture of {width}x{height}: {error}") from error
    return seconds
