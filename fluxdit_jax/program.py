"""The compiled program of a run: its state's shapes and places, its step, and the memory it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fluxdit_jax.device import sharding
from fluxdit_jax.device.memory_plan import MemoryPlan, plan
from fluxdit_jax.model import dit
from fluxdit_jax.objective import Objective
from fluxdit_jax.optimizer import build_optimizer
from fluxdit_jax.run.metrics import ACCUMULATE, PLAIN, UPDATE, pack
from fluxdit_jax.settings import Settings
from fluxdit_jax.state import TrainState, create_state
from fluxdit_jax.train_step import make_train_step


class CompiledStep(NamedTuple):
    """`TrainStep`, compiled; `plain` is `accumulate` where the alignment never ends."""

    accumulate: jax.stages.Compiled
    update: jax.stages.Compiled
    plain: jax.stages.Compiled


class Program:
    """What `settings` mean on a mesh. Nothing is allocated before `create`.

    Attributes:
      abstract: the state as `jax.ShapeDtypeStruct` with shardings.
      metric_shapes: of the metrics that each compiled program packs into one vector, by its name. `compile` fills it:
        tracing the step takes seconds, so it is traced once.
    """

    def __init__(self, settings: Settings, mesh: jax.sharding.Mesh, statistics: tuple[np.ndarray, np.ndarray]):
        self._settings, self._mesh, self._statistics = settings, mesh, statistics
        graph, shapes = dit.build(settings.model)
        self._optimizer = build_optimizer(settings.optimizer)
        abstract = jax.eval_shape(self._state_of, shapes)
        self._placed = sharding.tree_sharding(mesh, abstract)
        self.abstract: TrainState = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, self._placed
        )
        self._step = make_train_step(
            Objective(
                graph,
                settings.model,
                settings.flow,
                statistics,
                seed=settings.seed,
                global_batch_size=settings.global_batch_size,
                routing=settings.routing,
                aligned=settings.alignment,
            ),
            self._optimizer,
            ema_target=settings.ema_decay,
            short_ema_target=settings.short_ema_decay,
            first_step=settings.optimizer.first_step,
        )
        self._create = jax.jit(
            lambda key: self._state_of(dit.initialize(settings.model, key)), out_shardings=self._placed
        )
        self._from_params = jax.jit(self._state_of, out_shardings=self._placed)
        self.metric_shapes: dict[str, dict[str, Any]] = {}

    def _state_of(self, params: Any) -> TrainState:
        return create_state(params, self._optimizer, self._settings.short_ema_decay is not None)

    def create(self) -> TrainState:
        """The state at step 0, a function of the seed alone."""
        return self._create(jax.random.key(self._settings.seed))

    def new_projector(self) -> Any:
        """The projector of `create`, on the host."""
        model = self._settings.model
        make = jax.jit(lambda key: dit.initialize(model, key)[dit.PROJECTOR])
        return jax.device_get(make(jax.random.key(self._settings.seed)))

    def from_ema(self, ema: Any) -> TrainState:
        """The state at step 0 with the weights of another run's EMA."""
        return self._from_params(jax.tree.map(jax.device_put, ema, self._placed.params))

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A micro-batch over all devices, as `collate` makes it."""
        shapes = self._settings.batch.shapes(self._settings.micro_batch_size)
        place = sharding.batch_sharding(self._mesh)
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, (shape, dtype) in shapes.items()}

    def compile(self) -> CompiledStep:
        """The programs of a step. The state is donated; metrics are packed, see `metrics.unpack`."""
        places = (self._placed, sharding.replicated(self._mesh))

        def compiled(part: Callable[..., Any], name: str, *shapes: Any) -> jax.stages.Compiled:
            def packed(*arguments: Any) -> tuple[TrainState, jax.Array]:
                state, metrics = part(*arguments)
                self.metric_shapes[name] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), metrics)
                return state, pack(metrics)

            packed.__name__ = name
            with jax.set_mesh(self._mesh):  # which `attention` reads
                return jax.jit(packed, donate_argnums=0, out_shardings=places).lower(*shapes).compile()

        accumulate = compiled(self._step.accumulate, ACCUMULATE, self.abstract, self.batch_shapes())
        update = compiled(self._step.update, UPDATE, self.abstract)
        ends = self._settings.alignment is not None and self._settings.alignment.until is not None
        plain = compiled(self._step.plain, PLAIN, self.abstract, self.batch_shapes()) if ends else accumulate
        return CompiledStep(accumulate, update, plain)

    def memory(self, step: CompiledStep) -> MemoryPlan:
        """What the compiled step needs on one device."""
        return plan(step, self.abstract, self.batch_shapes())

    def smaller(self) -> list[tuple[str, Callable[[], MemoryPlan]]]:
        """What to try, in this order, where the step does not fit: (what to set, how to plan its memory)."""
        s, devices = self._settings, self._mesh.size
        choices = [(s.micro_batch_size, "block")] if s.model.remat != "block" else []
        batch = s.micro_batch_size
        while batch := next((b for b in range(batch // 2, 0, -1) if not (b % devices or s.global_batch_size % b)), 0):
            choices.append((batch, "block"))

        def planner(batch: int, remat: str) -> Callable[[], MemoryPlan]:
            def make() -> MemoryPlan:
                optimizer = dataclasses.replace(s.optimizer, grad_accum_steps=s.global_batch_size // batch)
                network = dataclasses.replace(s.model, remat=remat)
                settings = dataclasses.replace(s, micro_batch_size=batch, model=network, optimizer=optimizer)
                program = Program(settings, self._mesh, self._statistics)
                return program.memory(program.compile())

            return make

        return [
            (f"--config.data.micro_batch_size={batch} --config.model.remat={remat}", planner(batch, remat))
            for batch, remat in choices
        ]
