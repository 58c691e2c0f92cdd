"""Configuration keys of earlier versions: what became of each, for errors and for the runs that recorded them."""

from __future__ import annotations

from typing import Any

RENAMED = {
    "data.batch_size": "data.micro_batch_size",
    "optim.effective_batch": "optim.global_batch_size",
    "optim.clip": "optim.grad_clip_norm",
    "mesh.processes": "mesh.num_processes",
    "mesh.process": "mesh.process_id",
}
_DROPPED = ("flow.drop_both", "flow.drop_text", "flow.drop_vision")
_OF_THE_DATASET = ("model.channels", "model.text_width", "model.vision_width")
EARLIER = (*RENAMED, *_DROPPED, *_OF_THE_DATASET)


def gone(name: str) -> str:
    """What became of a key, to be read after its name."""
    if name in _OF_THE_DATASET:
        return "is no key any more: the dataset decides it; leave it out"
    return f"is now called config.{RENAMED.get(name, 'flow.drop')}"


def converted(values: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration, or some of its groups, with today's keys."""
    groups = {name: group for name, group in values.items() if isinstance(group, dict)}

    def taken(name: str) -> Any:
        group, _, key = name.partition(".")
        return groups.get(group, {}).pop(key, None)

    for name in _OF_THE_DATASET:
        taken(name)
    shares = [taken(name) for name in _DROPPED]
    if None not in shares:
        named = zip(("all", "text", "vision"), shares, strict=True)
        groups["flow"]["drop"] = ", ".join(f"{name} {share!r}" for name, share in named)
    for name, successor in RENAMED.items():
        group, _, key = successor.partition(".")
        if (value := taken(name)) is not None:
            values.setdefault(group, {})[key] = value
    return values
