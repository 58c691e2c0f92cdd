"""What may change between two starts of a run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
from training_helpers import tiny_config, write_dataset
from wording import naming

from fluxdit_jax.config import default_config
from fluxdit_jax.dataset.manifest import MANIFEST, DatasetError, Manifest, load_manifest
from fluxdit_jax.renamed_keys import RENAMED
from fluxdit_jax.run.differences import SHAPE_KEYS, all_changes, check_resume, config_changes, flatten, require_dataset
from fluxdit_jax.run.run_directory import RunError, load_config, load_dataset, record_start
from fluxdit_jax.stages import add_stage

pytest_plugins = ("training_fixtures",)


@pytest.fixture
def manifest(tiny_dataset):
    return load_manifest(tiny_dataset)


@pytest.fixture
def config(tiny_dataset, tmp_path):
    (tmp_path / "run").mkdir()
    return tiny_config(tiny_dataset, tmp_path / "run")


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


# ------------------------------------------------------------------------------------------------ start and resume


def test_a_start_records_everything_and_a_second_one_resumes(config, manifest, workdir):
    assert check_resume(workdir, config, manifest) is False
    assert not list(workdir.iterdir())
    record_start(workdir, config, manifest)
    assert load_config(workdir).to_dict() == config.to_dict()
    assert load_dataset(workdir) == manifest
    assert Manifest.from_json((workdir / "dataset.json").read_text()) == manifest
    assert check_resume(workdir, config, manifest) is True
    assert not list(workdir.glob("*.tmp"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("data.text_tokens", 4),
        ("data.caption_weights", (1.0, 0.5)),
        ("model.width", 64),
        ("model.depth", 3),
        ("model.heads", 4),
        ("model.dtype", "bfloat16"),
        ("flow.shift", 2.0),
        ("flow.drop", "all 0.1, text 0.2, vision 0.3"),
        ("flow.stratified", False),
        ("optim.name", "muon"),
        ("optim.lr", 1e-4),
        ("optim.global_batch_size", 16),
        ("optim.grad_clip_norm", 2.0),
        ("ema.decay", 0.999),
    ],
)
def test_a_change_of_the_mathematics_is_refused_by_key_with_both_values(config, manifest, workdir, key, value):
    record_start(workdir, config, manifest)
    group, _, last = key.rpartition(".")
    place = config[group] if group else config
    old = place[last]
    place[last] = value
    recorded = (workdir / "config.json").read_text()
    with pytest.raises(RunError) as refusal:
        check_resume(workdir, config, manifest)
    way = "--config.workdir" if key in SHAPE_KEYS else "--config.resume.allow_changes"
    for word in (f"{key}: {old!r} -> {value!r}", str(workdir), way):
        assert word in str(refusal.value)
    assert (workdir / "config.json").read_text() == recorded  # a refusal changes nothing
    config.resume.allow_changes = True
    assert check_resume(workdir, config, manifest) is True
    record_start(workdir, config, manifest)
    assert load_config(workdir)[group][last] == value if group else load_config(workdir)[last] == value


MAY_CHANGE = {
    "workdir", "profile", "device_memory_gb", "data.path", "data.micro_batch_size", "data.threads", "data.prefetch",
    "data.on_corrupt", "model.remat", "checkpoint.minutes", "checkpoint.keep", "checkpoint.ema_every",
    "checkpoint.after", "checkpoint.after_minutes", "log.tracker", "health.action",
    "health.max_skipped", "log.every", "log.minutes", "log.preview_every", "log.preview_count", "log.preview_steps",
    "log.preview_guidance", "log.heldout_every", "log.heldout_count", "log.peak_tflops", "log.vae",
    "score.every", "score.count", "score.references", "score.steps", "score.vision_encoder", "score.device",
    "gate.required",
    "gate.report", "plan.utilisation", "plan.watts", "mesh.data", "mesh.fsdp", "mesh.coordinator",
    "mesh.num_processes", "mesh.patience", "mesh.process_id", "resume.allow_changes", "resume.from_run", "resume.take",
}  # fmt: skip


def test_every_key_but_these_decides_the_mathematics():
    """A key that is new is refused until somebody has thought about it."""
    before, refused = default_config(), set()
    before.optim.schedule = "cosine"  # it reads train.steps
    for key in flatten(before.to_dict()):
        after = before.copy_and_resolve_references()
        *groups, name = key.split(".")
        group = after
        for part in groups:
            group = group[part]
        with group.unlocked(), group.ignore_type():
            group[name] = "another value"
        (free,), (decisive,) = ([config_changes(before, after, of_free_keys=of)] for of in (True, False))
        assert len(free) + len(decisive) == 1 and (free + decisive)[0].startswith(f"{key}: ")
        refused |= {key} if decisive else set()
    assert refused == flatten(before.to_dict()).keys() - MAY_CHANGE


def test_a_run_of_before_keys_were_renamed_goes_on(config, manifest, workdir):
    """Its values count, under the new names."""
    config.data.micro_batch_size, config.optim.global_batch_size, config.mesh.process_id = 2, 8, 3
    config.flow.drop = "all 0.05, text 0.2, vision 0.15"
    record_start(workdir, config, manifest)
    recorded = json.loads((workdir / "config.json").read_text())
    del recorded["checksum"]
    for old, new in RENAMED.items():
        (group, name), (new_group, new_name) = old.split("."), new.split(".")
        recorded[group][name] = recorded[new_group].pop(new_name)
    del recorded["flow"]["drop"]
    recorded["flow"] |= {"drop_both": 0.05, "drop_text": 0.2, "drop_vision": 0.15}
    recorded["model"] |= {"channels": 4, "text_width": 8, "vision_width": 6}  # of the data set
    (workdir / "config.json").write_text(json.dumps(recorded))
    assert load_config(workdir).to_dict() == config.to_dict() | {"data": load_config(workdir).data.to_dict()}
    assert check_resume(workdir, config, manifest) is True
    config.optim.global_batch_size, config.flow.drop = 16, "all 0.05, text 0.2, vision 0.3"
    with pytest.raises(RunError) as refusal:
        check_resume(workdir, config, manifest)
    for key, values in (("optim.global_batch_size", (8, 16)), ("flow.drop", ("vision 0.15", "vision 0.3"))):
        assert re.search(naming(key, *values), str(refusal.value))


def test_a_tuple_is_the_same_when_it_is_read_again(config, manifest, workdir):
    """JSON has lists only."""
    config.data.caption_weights = (1, 0.5)
    record_start(workdir, config, manifest)
    assert load_config(workdir).data.caption_weights == (1, 0.5)
    config.data.caption_weights = (1.0, 0.5)
    assert check_resume(workdir, config, manifest) is True
    config.data.caption_weights = (1.0, 0.25)
    with pytest.raises(RunError, match=r"data.caption_weights: \(1, 0.5\) -> \(1.0, 0.25\)"):
        check_resume(workdir, config, manifest)


def test_all_changes_are_listed(config, manifest, workdir):
    record_start(workdir, config, manifest)
    config.model.width, config.optim.lr, config.seed = 64, 0.5, 7
    with pytest.raises(RunError) as refusal:
        check_resume(workdir, config, manifest)
    listed = [line.split(":")[0].strip() for line in str(refusal.value).splitlines()[1:4]]
    assert listed == ["model.width", "optim.lr", "seed"]


def test_what_does_not_touch_the_mathematics_may_change(config, manifest, workdir):
    record_start(workdir, config, manifest)
    config.data.threads, config.data.prefetch, config.data.micro_batch_size = 1, 1, 8
    config.model.remat = "block"
    config.checkpoint.minutes, config.checkpoint.keep, config.log.every = 1.0, 5, 3
    config.health.action, config.device_memory_gb, config.profile = "stop", 80.0, "1:2"
    config.mesh.fsdp = 2
    config.train.steps = 100  # with a constant schedule
    assert config_changes(load_config(workdir), config) == []
    assert check_resume(workdir, config, manifest) is True


def test_the_length_of_a_run_may_not_change_where_the_schedule_reads_it(config, manifest, workdir):
    config.optim.schedule = "cosine"
    record_start(workdir, config, manifest)
    config.train.steps = 100
    with pytest.raises(RunError, match="train.steps: 8 -> 100") as refusal:
        check_resume(workdir, config, manifest)
    assert "cosine" in str(refusal.value) and "optim.schedule" in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "old", "new", "shape"),
    [
        ("model.width", 32, 64, True),
        ("ema.short_decay", None, 0.9, True),
        ("ema.short_decay", 0.9, None, True),
        ("ema.short_decay", 0.9, 0.99, False),
    ],
)
def test_a_changed_shape_is_not_offered_to_go_on(config, manifest, workdir, key, old, new, shape):
    config.update_from_flattened_dict({key: old})
    record_start(workdir, config, manifest)
    config.update_from_flattened_dict({key: new})
    with pytest.raises(RunError, match=f"{key}: {old} -> {new}") as refusal:
        check_resume(workdir, config, manifest)
    assert "--config.workdir" in str(refusal.value) or not shape
    assert ("allow_changes" not in str(refusal.value)) == shape


def test_a_length_in_images_is_a_length(config, manifest, workdir):
    add_stage(config, "px256", {"train.images": 80})
    lengths = ("train.images", 80, 160)
    config.train.images = 80
    record_start(workdir, config, manifest)
    config.train.images = 160
    assert check_resume(workdir, config, manifest) is True
    config.stages.px256.train.images = 160
    with pytest.raises(RunError, match=naming(*lengths, "moves the stages")):
        check_resume(workdir, config, manifest)
    config.optim.schedule = "cosine"
    record_start(workdir, config, manifest)
    config.train.images = 80
    with pytest.raises(RunError, match=naming(*reversed(lengths), "cosine")):
        check_resume(workdir, config, manifest)


def test_a_key_that_is_new_or_gone_is_a_change(config, manifest, workdir):
    """A new key at its default is none: that is how a run of before it went."""
    record_start(workdir, config, manifest)
    config.flow.mean = 0.5
    raw = json.loads((workdir / "config.json").read_text())
    del raw["flow"]["std"], raw["flow"]["mean"], raw["data"]["caption_weights"]
    raw["flow"]["old"] = 3
    del raw["checksum"]  # as a run of before had none
    (workdir / "config.json").write_text(json.dumps(raw))
    with pytest.raises(RunError) as refusal:
        check_resume(workdir, config, manifest)
    listed = [line.strip() for line in str(refusal.value).splitlines()[1:-1]]
    assert listed == ["flow.mean: 0.0 -> 0.5", "flow.old: 3 -> None"]
    assert load_config(workdir).flow.std == default_config().flow.std  # sampling an older run needs a value
    raw["no.key"] = 1  # ml_collections takes none with a dot
    (workdir / "config.json").write_text(json.dumps(raw))
    with pytest.raises(RunError, match=naming(workdir / "config.json", "no.key")):
        check_resume(workdir, config, manifest)
    del raw["no.key"]
    raw["flow"] = 3
    (workdir / "config.json").write_text(json.dumps(raw))
    with pytest.raises(RunError, match=naming(workdir / "config.json", "flow", 3)):
        load_config(workdir)


def test_what_is_damaged_or_missing_in_a_run_directory_is_named(config, manifest, workdir):
    record_start(workdir, config, manifest)
    path = workdir / "config.json"
    whole = path.read_text()
    path.write_text(whole.replace('"std": 1.0', '"std": 1.5'))
    with pytest.raises(RunError, match=naming(workdir / "config.json", "checksum")):
        load_config(workdir)
    path.write_text(whole)
    (workdir / "dataset.json").unlink()
    with pytest.raises(RunError, match=naming("cp DATASET/manifest.json", workdir / "dataset.json")):
        load_dataset(workdir)
    (workdir / "dataset.json").write_text("")
    with pytest.raises(RunError, match=naming("JSON", "cp DATASET/manifest.json", workdir / "dataset.json")):
        load_dataset(workdir)
    (workdir / "dataset.json").unlink()
    path.unlink()
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(RunError, match=naming(workdir, "checkpoints", "config.json", "allow_changes=True")):
        check_resume(workdir, config, manifest)
    config.resume.allow_changes = True
    assert check_resume(workdir, config, manifest) is False


def test_another_data_set_is_refused_but_the_same_one_may_move(config, manifest, workdir, tmp_path):
    record_start(workdir, config, manifest)
    config.data.path = os.path.relpath(config.data.path)
    assert all_changes(workdir, config, manifest) == ([], [])
    config.data.path = str(tmp_path / "moved")
    assert check_resume(workdir, config, manifest) is True
    assert [change.split(":")[0] for change in all_changes(workdir, config, manifest)[1]] == ["data.path"]
    shard = dataclasses.replace(manifest.shards["train"][0], sha256="other")
    other = dataclasses.replace(manifest, shards=manifest.shards | {"train": (shard, *manifest.shards["train"][1:])})
    with pytest.raises(RunError, match=naming("data.path", config.data.path, "dataset.json")):
        check_resume(workdir, config, other)
    assert load_dataset(workdir) == manifest
    more = dataclasses.replace(shard, records=shard.records + 3)
    grown = dataclasses.replace(
        manifest, resolution=64, shards=manifest.shards | {"train": (more, *manifest.shards["train"][1:])}
    )
    with pytest.raises(RunError, match=naming("data.path", 27, 24, "resolution", 64, 32)) as refusal:
        check_resume(workdir, config, grown)
    assert "allow_changes" in str(refusal.value) and f"resume.from_run={workdir}" in str(refusal.value)


def test_a_folder_is_the_data_set_of_a_run_or_the_difference_is_named(config, manifest, workdir, tmp_path):
    record_start(workdir, config, manifest)
    require_dataset(Path(config.data.path), workdir)
    with pytest.raises(DatasetError, match=naming(tmp_path / "gone", "--data")):
        require_dataset(tmp_path / "gone", workdir)
    write_dataset(tmp_path / "grown", train=27)
    with pytest.raises(RunError, match=naming(tmp_path / "grown", 27, 24, "--data")):
        require_dataset(tmp_path / "grown", workdir)
    (tmp_path / "grown" / MANIFEST).write_text("{")  # the shards' own checksums tell
    require_dataset(tmp_path / "grown", workdir)


def test_other_latent_statistics_are_another_data_set(config, manifest, workdir):
    record_start(workdir, config, manifest)
    other = dataclasses.replace(manifest, latent_mean=(9.0, 9.0, 9.0, 9.0))
    with pytest.raises(RunError, match=naming("data.path", config.data.path, "dataset.json")):
        check_resume(workdir, config, other)


def test_a_directory_without_a_run_is_told(tmp_path):
    with pytest.raises(RunError, match=naming(tmp_path / "config.json", "exist")):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match=naming(tmp_path / "config.json", "Expecting")):
        load_config(tmp_path)
