"""The playground's page, by gradio: fields, pictures and their history."""

from __future__ import annotations

import html
import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from fluxdit_jax.playground.form import MAX_PICTURES, NEWEST, Form
from fluxdit_jax.playground.session import Session, Stopped
from fluxdit_jax.sample import USER_ERRORS
from fluxdit_jax.sampling import solvers
from fluxdit_jax.sampling.arguments import DEFAULTS
from fluxdit_jax.shared import cli

NOTHING = "nothing"
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
_SHOWN = 8  # pictures of the dataset at once
_MAX_UPLOAD = "200mb"


class Page:
    """The page of a session; its fields have the names of `Form`'s."""

    def __init__(self, session: Session):
        self._session = session
        self._further = session.manifest().further()
        self._indices: dict[str, int] = {}  # of the dataset's pictures that were shown, by key

    def build(self) -> gr.Blocks:
        """The page; serve it with `launch`."""
        with gr.Blocks(title=f"fluxdit_jax: {self._session.folder.name}", analytics_enabled=False) as page:
            gr.Markdown(f"### {html.escape(str(self._session.folder))}")
            with gr.Row():
                with gr.Column():
                    fields = self._add_fields()
                    dataset = self._add_dataset()
                with gr.Column():
                    answers = self._add_answers() | dataset
            self._connect(page, fields, answers)
        return page

    def _connect(self, page: gr.Blocks, fields: dict[str, Any], answers: dict[str, Any]) -> None:
        """What each click and drop does. One drawing at a time: the others wait in a queue."""
        one: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
        held, taken = [answers["vector"], answers["recipe"]], answers["taken"]
        inputs = [fields[name] for name in self._names] + held
        shown = [answers["picture"], answers["notes"], answers["history"]]
        draw = _named(self._draw, [name.replace(" ", "_") for name in self._names] + ["vector", "recipe"])
        drawing = answers["draw"].click(draw, inputs, shown, api_name="draw", **one)
        drawing.then(lambda: gr.update(choices=self._weights()), None, fields["weights"], **PRIVATE)
        fields["prompt"].submit(self._draw, inputs, shown, **PRIVATE, **one)
        answers["stop"].click(self._session.stop.set, api_name="stop", queue=False)

        restored = [*inputs, taken, answers["notes"], answers["picture"]]
        answers["dropped"].upload(self._restore, answers["dropped"], restored, api_name="restore")
        answers["history"].select(self._restore_of_history, None, restored, **PRIVATE)

        answers["others"].click(self._show_dataset, None, answers["dataset"], api_name="dataset", **one)
        reference = fields["reference"]
        answers["dataset"].select(self._choose, None, [answers["vector"], taken, reference], **PRIVATE)
        reference.upload(lambda: (None, "the reference"), None, [answers["vector"], taken], **PRIVATE)
        reference.clear(lambda: (None, None, NOTHING), None, [*held, taken], **PRIVATE)
        clear = [*held, taken, reference]
        answers["clear"].click(lambda: (None, None, NOTHING, None), None, clear, api_name="clear")
        page.load(self._loaded, None, [answers["history"], fields["weights"], fields["size"]], **PRIVATE)

    @staticmethod
    def _add_answers() -> dict[str, Any]:
        """What the page answers, and what is done with it."""
        answers: dict[str, Any] = {"vector": gr.State(), "recipe": gr.State()}
        with gr.Row():
            answers["draw"] = gr.Button("Draw", variant="primary", scale=3)
            answers["stop"] = gr.Button("Stop", variant="stop")
        answers["picture"] = gr.Image(
            label="Picture; its file holds the recipe", type="filepath", format="png", interactive=False, height=460,
            elem_id="picture", buttons=["download", "fullscreen"],
        )  # fmt: skip
        answers["notes"] = gr.Textbox(label="Notes", lines=2, interactive=False)
        answers["history"] = gr.Gallery(
            label="History: click one to restore it", columns=6, height=260, allow_preview=False, interactive=False
        )
        answers["dropped"] = gr.File(label="Restore a picture of this program: drop it here", file_types=[".png"],
                                     height=110, elem_id="restore")  # fmt: skip
        return answers

    @staticmethod
    def _add_dataset() -> dict[str, Any]:
        """Pictures of the dataset to take light and mood from, and what they are taken from now."""
        answers: dict[str, Any] = {}
        with gr.Group():
            answers["taken"] = gr.Textbox(NOTHING, label="Light and mood are taken from", interactive=False)
            with gr.Row():
                answers["others"] = gr.Button("Show pictures of the dataset", size="sm")
                answers["clear"] = gr.Button("Take nothing", size="sm")
            answers["dataset"] = gr.Gallery(
                label="Dataset: click one to take its light and mood", columns=4, height=240, allow_preview=False,
                interactive=False, elem_id="dataset",
            )  # fmt: skip
        return answers

    def _add_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        fields["prompt"] = gr.Textbox(label="Prompt", lines=3, placeholder="what to draw; Shift-Enter draws")
        fields["reference"] = gr.Image(
            label="Reference: its light and mood", type="filepath", image_mode=None, height=180,
            sources=["upload", "clipboard"],
        )  # fmt: skip
        with gr.Row():
            for name, label in (("guidance_text", "Guidance: prompt"), ("guidance_vision", "Guidance: reference")):
                fields[name] = gr.Slider(0, 12, DEFAULTS[name], step=0.25, label=label)
            for name in self._further:
                fields[f"guidance {name}"] = gr.Slider(0, 12, 1, step=0.25, label=f"Guidance: {name}")
        with gr.Row():
            fields["size"] = gr.Dropdown(sizes := self._sizes(), value=sizes[0][1], label="Size: width x height")
            fields["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
            fields["count"] = gr.Slider(1, MAX_PICTURES, 1, step=1, label="Pictures")
        with gr.Accordion("Solver, weights, sweep", open=False):
            with gr.Row():
                fields["steps"] = gr.Slider(1, 100, DEFAULTS["steps"], step=1, label="Steps")
                fields["method"] = gr.Dropdown(list(solvers.METHODS), value=DEFAULTS["method"], label="Solver")
                fields["rescale"] = gr.Slider(0, 1, DEFAULTS["rescale"], step=0.05, label="Rescale (saturation)")
            fields["weights"] = gr.Dropdown(self._weights(), value=NEWEST, label="Weights: average/step")
            with gr.Row():
                fields["sweep_text"] = gr.Textbox(label="A sheet over prompt scales", placeholder="1,3,5,7")
                fields["sweep_vision"] = gr.Textbox(label="and reference scales", placeholder="1,2,3")
        self._names = list(fields)
        return fields

    def _sizes(self) -> list[tuple[str, str]]:
        return [(f"{size} ({count:,} pictures)", size) for size, count in self._session.sizes().items()]

    def _weights(self) -> list[str]:
        return [NEWEST, *self._session.averages()]

    def _form(self, values: tuple[Any, ...]) -> Form:
        *fields, vector, recipe = values
        given = dict(zip(self._names, fields, strict=True))
        given["guidance"] = {name: given.pop(f"guidance {name}") for name in self._further}
        for name in ("seed", "count", "steps"):
            given[name] = int(given[name] or 0)
        for name in ("prompt", "sweep_text", "sweep_vision"):
            given[name] = given[name] or ""
        paths = {"reference": given["reference"], "vector": vector, "recipe": recipe}
        return Form(**given | {name: Path(value) if value else None for name, value in paths.items()})

    # ------------------------------------------------------------------------------------------------- drawing

    def _draw(self, *values: Any, progress: Any = gr.Progress()) -> Iterator[tuple[Any, str, Any]]:  # noqa: B008
        session, notes, started, done, last = self._session, [], time.monotonic(), 0, None
        session.stop.clear()
        try:
            form = self._form(values)
            pictures = form.pictures()
            cells = [len(scales.split(",")) for scales in (form.sweep_text, form.sweep_vision)]
            total = form.count * cells[0] * cells[1]

            def count(more: int) -> None:
                nonlocal done
                done += more
                progress((done, total), desc=self._left(started, done, total), unit="pictures")

            for one in pictures:
                count(0)  # an answer ends what was shown
                drawn = session.draw(one, count)
                last = str(drawn.path)
                notes += [note for note in drawn.notes if note not in notes]
                if len(pictures) > 1:
                    yield last, "\n".join(notes), self._pictures()
        except Stopped:
            notes.append(f"stopped: {done} of {total} were computed")
        except USER_ERRORS as error:
            raise _shown(error) from error
        yield last, "\n".join(notes), self._pictures()

    @staticmethod
    def _left(started: float, done: int, total: int) -> str:
        if not done:
            return "the first picture loads and compiles the network"
        taken = time.monotonic() - started
        return f"{taken / done:.1f} s each, {cli.duration(taken / done * (total - done))} left"

    # ---------------------------------------------------------------------------------- history and restoring

    def _loaded(self) -> tuple[Any, Any, Any]:
        return self._pictures(), gr.update(choices=self._weights()), gr.update(choices=self._sizes())

    def _pictures(self) -> Any:
        pictures = [(str(path), path.name) for path in self._session.history()]
        return gr.update(value=pictures, selected_index=None)

    def _restore_of_history(self, event: gr.SelectData) -> list[Any]:
        found = {path.name: str(path) for path in self._session.history()}
        if (name := event.value["caption"]) not in found:
            raise gr.Error(f"{html.escape(name)} is not in the history any more")
        return self._restore(found[name])

    def _restore(self, path: str) -> list[Any]:
        try:
            form, notes = self._session.restore(Path(path))
        except USER_ERRORS as error:
            raise _shown(error) from error
        values = [form.guidance.get(name.removeprefix("guidance "), 1.0) if " " in name else getattr(form, name)
                  for name in self._names]  # fmt: skip
        values[self._names.index("weights")] = gr.update(choices=self._weights(), value=form.weights)
        taken = "the restored picture" if form.recipe else NOTHING
        return [*values, None, form.recipe and str(form.recipe), taken, "\n".join(notes), path]

    # ------------------------------------------------------------------------------------------------- dataset

    def _show_dataset(self) -> Any:
        try:
            records = self._session.records(_SHOWN)
        except USER_ERRORS as error:
            raise _shown(error) from error
        self._indices |= {key: index for index, key, _ in records}
        return gr.update(value=[(pixels, key) for _, key, pixels in records], selected_index=None)

    def _choose(self, event: gr.SelectData) -> tuple[str, str, None]:
        index = self._indices[event.value["caption"]]
        return str(self._session.vector(index)), f"training record {index}", None


def _named(function: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    """The generator with named parameters, as which the API offers them; it is given them by position."""

    def named(*values: Any) -> Any:
        yield from function(*values)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    return named


def _shown(error: Exception) -> gr.Error:
    """As gradio shows it, which takes HTML."""
    return gr.Error(html.escape(cli.explain(error)), duration=None, print_exception=False)


def launch(page: gr.Blocks, session: Session, host: str, port: int) -> str:
    """Serves the page in a thread of its own; returns its address. Raises `OSError` if the port is taken."""
    address: str = page.queue(default_concurrency_limit=4, max_size=32).launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        show_error=True,
        prevent_thread_lock=True,
        allowed_paths=[str(session.out.absolute())],
        max_file_size=_MAX_UPLOAD,
        footer_links=["api"],
        ssr_mode=False,
    )[1]
    return address
