"""What to do with a run that has no checkpoint to go on from."""

from __future__ import annotations

from pathlib import Path


def ways_on(workdir: Path) -> str:
    """What to do where a run has no checkpoint to go on from."""
    return (
        f"Bring back a backup of {workdir / 'checkpoints'}; or start from the run's EMA weights in another directory "
        f"(--config.workdir=NEW --config.resume.from_run={workdir}); or start anew, in another one or with {workdir} "
        "moved away"
    )
