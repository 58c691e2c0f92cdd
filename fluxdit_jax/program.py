"""The compiled program of a run: its state's shapes and places, its step, and the memory it needs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fluxdit_jax import model, sharding
from fluxdit_jax.config import Settings
from fluxdit_jax.memory_plan import MemoryPlan, plan
from fluxdit_jax.metrics import pack
from fluxdit_jax.optimizer import build_optimizer
from fluxdit_jax.state import TrainState, create_state
from fluxdit_jax.train_step import make_train_step


class Program:
    """What `settings` mean on a mesh. Nothing is allocated before `create`.

    Attributes:
      abstract: the state as `jax.ShapeDtypeStruct` with shardings.
      metric_shapes: of the metrics that the step packs into one vector; see `metrics.unpack`.
    """

    def __init__(
        self, settings: Settings, mesh: jax.sharding.Mesh, statistics: tuple[np.ndarray, np.ndarray]
    ):
        self._settings, self._mesh = settings, mesh
        graph, shapes = model.build(settings.model)
        self._optimizer = build_optimizer(settings.optimizer)
        abstract = jax.eval_shape(self._state_of, shapes)
        self._placed = sharding.tree_sharding(mesh, abstract)
        self.abstract: TrainState = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, self._placed
        )
        self._step = make_train_step(
            graph,
            settings.model.dtype,
            self._optimizer,
            settings.flow,
            statistics,
            settings.seed,
            settings.effective_batch,
            settings.ema_decay,
            settings.short_ema_decay,
        )
        self.metric_shapes = jax.eval_shape(self._step, self.abstract, self.batch_shapes())[1]

    def _state_of(self, params: Any) -> TrainState:
        return create_state(params, self._optimizer, self._settings.short_ema_decay is not None)

    def create(self) -> TrainState:
        """The state at step 0, a function of the seed alone."""

        def create(key):
            return self._state_of(model.initialize(self._settings.model, key))

        return jax.jit(create, out_shardings=self._placed)(jax.random.key(self._settings.seed))

    def from_ema(self, ema: Any) -> TrainState:
        """The state at step 0 with the weights of another run's EMA."""
        params = jax.tree.map(jax.device_put, ema, self._placed.params)
        return jax.jit(self._state_of, out_shardings=self._placed)(params)

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A micro-batch over all devices, as `data.collate` makes it."""
        s = self._settings
        shapes = {
            "latent": ((s.tokens, s.model.token_width), jnp.bfloat16),
            "grid": ((2,), jnp.int32),
            "text": ((s.text_tokens, s.model.text_width), jnp.bfloat16),
            "text_length": ((), jnp.int32),
            "vision": ((s.model.vision_width,), jnp.float32),
            "index": ((), jnp.uint32),
            "replaced": ((), jnp.bool_),
        }
        place = sharding.batch_sharding(self._mesh)
        return {
            name: jax.ShapeDtypeStruct((s.batch_size, *shape), dtype, sharding=place)
            for name, (shape, dtype) in shapes.items()
        }

    def compile(self) -> jax.stages.Compiled:
        """(state, batch) -> (state, packed metrics), the state donated."""

        def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, jax.Array]:
            state, metrics = self._step(state, batch)
            return state, pack(metrics)

        places = (self._placed, sharding.replicated(self._mesh))
        jitted = jax.jit(step, donate_argnums=0, out_shardings=places)
        with jax.set_mesh(self._mesh):  # `attention` asks for it
            return jitted.lower(self.abstract, self.batch_shapes()).compile()

    def memory(self, compiled: jax.stages.Compiled) -> MemoryPlan:
        """What the compiled step needs on one device."""
        return plan(compiled, self.abstract, self.batch_shapes())
