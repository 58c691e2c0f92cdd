"""Helpers of the training tests: small datasets of random records, tiny configurations, the real CLI."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
from pathlib import Path

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from fork_server import Commands, Process
from ml_collections import ConfigDict

from fluxdit_jax import flow
from fluxdit_jax.config import default_config
from fluxdit_jax.dataset.fields import BF16, Layout
from fluxdit_jax.dataset.manifest import MANIFEST, EncoderIdentity, Manifest, Shard, sha256_file, shard_name
from fluxdit_jax.dataset.records import WRITER_OPTIONS, Record, encode_record
from fluxdit_jax.loader import reader
from fluxdit_jax.model import dit
from fluxdit_jax.model.conditions import Condition, given
from fluxdit_jax.objective import Objective, patch_statistics
from fluxdit_jax.optimizer import OptimizerConfig, build_optimizer
from fluxdit_jax.state import TrainState, create_state
from fluxdit_jax.train_step import TrainStep, make_train_step

REPOSITORY = Path(__file__).resolve().parent.parent
LATENT_SIZES = ((4, 4), (2, 8), (8, 2))  # 4 tokens each at patch 2, three aspect ratios
UNEVEN_SIZES = ((4, 4), (2, 6), (6, 2))  # 4, 3 and 3 tokens: padding differs
CHANNELS, TEXT_WIDTH, VISION_WIDTH, FACTOR = 4, 8, 6, 8
LAYOUT: Layout = {"text": TEXT_WIDTH, "vision": None}


def make_record(
    number: int, size: tuple[int, int] = (4, 4), seed: int = 0, channels: int = CHANNELS, captions: int = 1
) -> Record:
    """A valid record of random numbers, its own for every (seed, number); further captions change nothing else."""
    rng = np.random.default_rng([seed, number])
    more = np.random.default_rng([seed, number, 1])
    vision = rng.normal(size=VISION_WIDTH)
    others = tuple(more.normal(size=(1 + (number + k) % 5, TEXT_WIDTH)).astype(BF16) for k in range(1, captions))
    return Record(
        key=f"folder/image_{number:03d}.png",
        caption=f"caption {number}",
        latent=(rng.normal(size=(channels, *size)) * 2 + 0.5).astype(BF16),
        conditions={
            "text": rng.normal(size=(1 + number % 5, TEXT_WIDTH)).astype(BF16),
            "vision": (vision / np.linalg.norm(vision)).astype(np.float32),
        },
        original_size=(size[0] * 16, size[1] * 16),
        encoded_size=(size[0] * FACTOR, size[1] * FACTOR),
        content_hash=hashlib.sha256(str((seed, number)).encode()).hexdigest(),
        other_captions=tuple(f"caption {number}, {k} „ü“" for k in range(2, captions + 1)),
        other_conditions={"text": others} if captions > 1 else {},
    )


def write_shard(path: Path, records: list[bytes]) -> None:
    """An ArrayRecord file of serialised records."""
    writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
    for record in records:
        writer.write(record)
    writer.close()


def write_dataset(
    directory: Path,
    *,
    train: int = 24,
    holdout: int = 6,
    sizes: tuple[tuple[int, int], ...] = UNEVEN_SIZES,
    shards: int = 2,
    seed: int = 0,
    channels: int = CHANNELS,
    vae: str = "none",
    captions: tuple[int, ...] = (1,),
) -> Manifest:
    """Writes a dataset directory with the shards and the manifest that training reads.

    Record i has the size and the number of captions that stand at i, counted round.
    """
    directory.mkdir(parents=True, exist_ok=True)
    entries: dict[str, tuple[Shard, ...]] = {}
    latents = []
    for split, count, parts, offset in (("train", train, shards, 0), ("holdout", holdout, 1, 1000)):
        records = [
            make_record(offset + i, sizes[i % len(sizes)], seed, channels, captions[i % len(captions)])
            for i in range(count)
        ]
        if split == "train":
            latents = [record.latent.astype(np.float64).reshape(channels, -1) for record in records]
        written = []
        for part, members in enumerate(np.array_split(np.arange(count), parts) if count else []):
            path = directory / shard_name("tiny", split, part, parts)
            write_shard(path, [encode_record(records[i]) for i in members])
            buckets: dict[str, int] = {}
            for i in members:
                name = "x".join(map(str, records[i].encoded_size))
                buckets[name] = buckets.get(name, 0) + 1
            written.append(Shard(path.name, sha256_file(path), path.stat().st_size, len(members), buckets))
        entries[split] = tuple(written)
    values = np.concatenate(latents, axis=1)
    manifest = Manifest(
        name="tiny",
        resolution=32,
        modulus=16,
        fit="resize",
        encoders={
            "vae": EncoderIdentity(vae, "", "00", "float32", channels, {"factor": FACTOR}),
            "text": EncoderIdentity("none", "", "11", "float32", TEXT_WIDTH),
            "vision": EncoderIdentity("none", "", "22", "float32", VISION_WIDTH),
        },
        buckets=tuple((h * FACTOR, w * FACTOR) for h, w in sizes),
        latent_mean=tuple(values.mean(axis=1)),
        latent_std=tuple(values.std(axis=1)),
        latent_count=values.shape[1],
        lengths={"text": 5},
        shards=entries,
    )
    (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def tiny_config(dataset: Path, workdir: Path) -> ConfigDict:
    """A run of seconds: 2 blocks of width 32, 8 steps of 2 micro-batches of 4, every step logged."""
    c = default_config()
    c.workdir, c.data.path = str(workdir), str(dataset)
    c.model.width, c.model.depth, c.model.heads = 32, 2, 2
    c.model.dtype = "float32"
    c.data.micro_batch_size, c.optim.global_batch_size = 4, 8
    c.optim.lr, c.optim.warmup_steps = 1e-2, 2
    c.train.steps = 8
    c.log.every, c.log.preview_every, c.log.minutes = 1, 0, 0.0
    return c


def conditions(text: int = TEXT_WIDTH, vision: int = VISION_WIDTH) -> tuple[Condition, ...]:
    """What the networks of the tests are given, of these widths."""
    return Condition("text", text, sequence=True), Condition("vision", vision)


def batch_layout(tokens: int = 4, text_tokens: int = 5, patch: int = 2, channels: int = CHANNELS) -> reader.BatchLayout:
    """Of the micro-batches of `make_record`'s records."""
    widths = {"text": TEXT_WIDTH, "vision": VISION_WIDTH}
    return reader.BatchLayout(patch, tokens, channels * patch**2, widths, {"text": text_tokens})


def tiny_model(**changes) -> dit.ModelConfig:
    """The network of `tiny_config`, f32."""
    values: dict[str, object] = dict(  # noqa: C408
        width=32,
        depth=2,
        heads=2,
        patch=2,
        channels=CHANNELS,
        conditions=conditions(),
        dtype="float32",
        remat="none",
        attention="xla",
    )
    return dit.ModelConfig(**(values | changes))


def tiny_flow(**changes) -> flow.FlowConfig:
    """Plain logit-normal time and no dropped conditions."""
    values: dict[str, object] = dict(  # noqa: C408
        mean=0.0,
        std=1.0,
        uniform_share=0.0,
        shift=1.0,
        stratified=False,
        drop=(),
    )
    return flow.FlowConfig(**(values | changes))


def dropping(all: float = 0.0, text: float = 0.0, vision: float = 0.0) -> tuple[flow.Drop, ...]:  # noqa: A002
    """A condition dropout with these probabilities."""
    return flow.parse_drop(f"all {all}, text {text}, vision {vision}", ("text", "vision"))


def tiny_optimizer(**changes) -> OptimizerConfig:
    """AdamW at a constant rate, no warm-up, no decay, hardly any clipping."""
    values: dict[str, object] = dict(  # noqa: C408
        name="adamw",
        lr=1e-3,
        adam_lr=1e-3,
        schedule="constant",
        warmup_steps=0,
        total_steps=100,
        final_fraction=0.0,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.0,
        grad_clip_norm=1e9,
        grad_accum_steps=1,
    )
    return OptimizerConfig(**(values | changes))


def lively(tree, seed: int = 0, scale: float = 0.3):
    """The tree with normal numbers everywhere: nothing is zero, so that nothing hides behind a gate."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (scale * rng.normal(size=leaf.shape)).astype(np.float32), tree)


def network_inputs(
    config: dit.ModelConfig,
    grids=((2, 2), (1, 3), (3, 1)),
    tokens: int = 4,
    text_tokens: int = 5,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """What `arguments` takes, padding zero, both conditions kept."""
    rng = np.random.default_rng(seed)
    B = len(grids)
    x = rng.normal(size=(B, tokens, config.token_width)).astype(np.float32)
    widths = {condition.name: condition.width for condition in config.conditions}
    text = rng.normal(size=(B, text_tokens, widths["text"])).astype(np.float32)
    length = np.array([1 + (2 * i + 1) % text_tokens for i in range(B)], np.int32)
    for row, (h, w) in enumerate(grids):
        x[row, h * w :] = 0
        text[row, length[row] :] = 0
    vision = rng.normal(size=(B, widths["vision"]))
    return {
        "x": x,
        "t": rng.uniform(0.1, 0.9, B).astype(np.float32),
        "grid": np.array(grids, np.int32),
        "text": text,
        "text_length": length,
        "vision": (vision / np.linalg.norm(vision, axis=1, keepdims=True)).astype(np.float32),
        "keep_text": np.ones(B, bool),
        "keep_vision": np.ones(B, bool),
    }


def arguments(inputs: dict[str, np.ndarray]) -> tuple:
    """`network_inputs` as the arguments of `DiT.__call__`."""
    keep = {"text": inputs["keep_text"], "vision": inputs["keep_vision"]}
    return inputs["x"], inputs["t"], inputs["grid"], given(conditions(), inputs, keep)


def make_batch(seed: int = 0, size: int = 4, tokens: int = 4, first_index: int = 0) -> dict[str, np.ndarray]:
    """A micro-batch as `collate` makes it, of random records of the shapes of `tiny_model`."""
    records = [make_record(i, UNEVEN_SIZES[i % 3], seed) for i in range(first_index, first_index + size)]
    return reader.collate(records, list(range(first_index, first_index + size)), batch_layout(tokens))


def tree_equal(a, b) -> bool:
    """Whether two trees hold the same bits (NaN equals NaN only if the bits do)."""
    leaves_a, structure_a = jax.tree.flatten(a)
    leaves_b, structure_b = jax.tree.flatten(b)
    return structure_a == structure_b and all(
        np.asarray(x).dtype == np.asarray(y).dtype
        and np.asarray(x).shape == np.asarray(y).shape
        and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(leaves_a, leaves_b)
    )


def tiny_step(
    config: dit.ModelConfig,
    times: flow.FlowConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = ((0.5,) * CHANNELS, (2.0,) * CHANNELS),
    ema_target: float = 0.99,
    **of_objective,
) -> tuple[TrainState, TrainStep]:
    """(state with `lively` weights, step) of a network; `statistics` are mean and std of the latents."""
    graph, shapes = dit.build(config)
    transformation = build_optimizer(optimizer or tiny_optimizer())
    objective = Objective(
        graph,
        config,
        times or tiny_flow(),
        patch_statistics(*statistics, config.patch),
        **({"seed": 0, "global_batch_size": 4} | of_objective),
    )
    step = make_train_step(objective, transformation, ema_target=ema_target)
    return create_state(lively(shapes, scale=0.2), transformation), step


def jitted(parts: TrainStep):
    """`step(state, *micro_batches) -> (state, metrics)`: of the last micro-batch and of the update."""
    accumulate, update = map(jax.jit, parts[:2])

    def step(state, *batches):
        for batch in batches:
            state, micro = accumulate(state, batch)
        state, metrics = update(state)
        return state, micro | metrics

    step.accumulate, step.update = accumulate, update
    return step


class TrainCommand:
    """`python -m fluxdit_jax.train` in a process of its own, with a compilation cache for the session."""

    def __init__(self, commands: Commands, cache: Path):
        self._commands, self._cache = commands, cache

    def start(self, *arguments: str, config: Path) -> Process:
        """Starts it; stdout and stderr are pipes of text."""
        environment = {"XDG_CACHE_HOME": str(self._cache)}
        return self._commands.start(
            "fluxdit_jax.train", f"--config={config}", *arguments, env=environment, cwd=REPOSITORY
        )

    def run(self, *arguments: str, config: Path) -> subprocess.CompletedProcess:
        """Runs it to the end."""
        with self.start(*arguments, config=config) as process:
            out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def write_config(path: Path, config: ConfigDict) -> Path:
    """A configuration file that gives `config`."""
    changed = "\n".join(f"    c.{key} = {value!r}" for key, value in flat(config.to_dict()) if value is not None)
    path.write_text(
        "from fluxdit_jax.config import default_config\n\n\n"
        f"def get_config():\n    c = default_config()\n{changed}\n    return c\n"
    )
    return path


def flat(tree: dict, prefix: str = "") -> list[tuple[str, object]]:
    """A configuration's values with their keys, as `group.name`."""
    return [
        pair
        for key, value in tree.items()
        for pair in (flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)])
    ]


def read_batches(source, count, **changes):
    """The first `count` micro-batches from a position."""
    options = {
        "seed": 3,
        "start": 0,
        "batch_size": 4,
        "layout": batch_layout(),
        "threads": 2,
        "prefetch": 2,
    }
    return list(itertools.islice(reader.batches(source, **(options | changes)), count))


def joined(parts):
    """Micro-batches joined into one, to compare runs that split them differently."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def identity(batch):
    """Which record each row of a micro-batch is, by its vision vector."""
    return [row.tobytes() for row in batch["vision"]]


def small_state(seed: int, rows: int = 60, short_ema: bool = False, **changes) -> TrainState:
    """A small training state in the middle of its second step, of random numbers, on the device."""
    rng = np.random.default_rng(seed)
    params = {"mlp": {"kernel": np.zeros((rows, 40), np.float32)}, "bias": np.zeros(7, np.float32)} | changes
    optimizer = build_optimizer(tiny_optimizer(grad_accum_steps=3))
    shapes = jax.eval_shape(lambda params: create_state(params, optimizer, short_ema), params)
    state = jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) if leaf.dtype == np.float32 else np.ones(leaf.shape)).astype(
            leaf.dtype
        ),
        shapes,
    )
    return jax.device_put(state._replace(skipped=np.int32(seed)))


def abstract_state(state: TrainState) -> TrainState:
    """What `Checkpoints.restore` takes for a state."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)


def meta_of(step: int) -> dict[str, int]:
    """What is saved beside the state of a step."""
    return {"samples": 12 * step, "batch_size": 4}
