"""The GPU benchmark's decisions, which need no GPU: what it would run, what it picks, how it reads a profile."""

from __future__ import annotations

import argparse
import gzip
import json

import pytest
from wording import lines_naming, naming

from benchmarks import gpu, gpu_report, gpu_sides, gpu_trace
from fluxdit_jax.model import cost

HLO = """HloModule jit_step
  %fusion.1 = bf16[8]{0} fusion(%a), kind=kLoop, metadata={op_name="jit(step)/jvp()/while/body/mul"}
  ROOT %custom-call.2 = bf16[8]{0} custom-call(%b), custom_call_target="__cublas$lt$matmul", metadata={op_name="jvp()"}
  %custom-call.3 = bf16[8]{0} custom-call(%b), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jvp()"}
  %fusion.4 = f32[8]{0} fusion(%c), kind=kLoop, metadata={op_name="jit(step)/select_n"}
  %while.5 = (s32[]) while(%t), condition=%c, body=%b, metadata={op_name="jvp()/while"}
"""


def row(batch, remat, images_s, *, side="jax", peak=10.0, plan=10.0, turn="run/0", status="ok", **spec):
    spec = gpu.make("prod-1024", side, batch, remat) | spec
    measured = {"images_s": images_s, "seconds": [batch / images_s]} if status == "ok" else {}
    common = {"spec": spec, "run": "run", "turn": turn, "status": status, "attention": "cudnn"}
    return common | {"peak_gb": peak, "plan_gb": plan, "compile_s": 1.0, "wall_s": 2.0} | measured


@pytest.mark.parametrize("target", gpu_sides.TARGETS)
def test_each_configuration_is_what_a_run_would_get(target):
    for batch, remat in gpu.OURS[target]:
        settings, (mean, _) = gpu_sides.settings(gpu_sides.TARGETS[target], gpu.make(target, "jax", batch, remat))
        assert (settings.micro_batch_size, settings.model.remat) == (batch, remat)
        assert settings.tokens == gpu_sides.TARGETS[target].side ** 2
        assert settings.optimizer.grad_accum_steps * batch == settings.global_batch_size
        assert len(mean) == settings.model.token_width
    same = cost.flops_per_sample(settings.model, settings.tokens, settings.batch.lengths)
    assert gpu_sides.flops_per_image(gpu_sides.TARGETS[target]) == 3 * same


def test_a_configuration_file_that_has_moved_on_is_noticed():
    with pytest.raises(ValueError, match=r"configs/prod.py has .*1152.* TARGETS"):
        moved = gpu_sides.Target("prod", 1024, 1024, 24, 18, 256)
        gpu_sides.settings(moved, gpu.make("prod-1024", "jax", 4, "block"))


def test_what_is_measured_begins_with_both_sides_and_can_be_chosen():
    specs = gpu.configurations("prod-1024", ["jax", "torch"], None)
    assert [spec["side"] for spec in specs[:4]] == ["jax", "torch", "jax", "jax"]
    assert len(specs) == len(gpu.OURS["prod-1024"]) + len(gpu.THEIRS["prod-1024"])
    only = ["prod-1024:4:block", "nano-512:8:none", "prod-1024:2:none"]
    specs = gpu.configurations("prod-1024", ["jax", "torch"], only)
    assert [(spec["side"], spec["batch"]) for spec in specs] == [
        ("jax", 4), ("torch", 4), ("jax", 2), ("torch", 2)
    ]  # fmt: skip
    assert gpu.configurations("prod-512", ["jax"], only) == []
    assert [spec["side"] for spec in gpu.configurations("toy", ["torch"], None)] == ["torch"]


def test_a_trace_and_its_program_are_kept_where_out_says(tmp_path, monkeypatch):
    trace = tmp_path / "host.trace.json.gz"
    for path in (trace, tmp_path / gpu_sides.PROGRAM):
        path.write_bytes(path.name.encode())
    monkeypatch.setenv("OUT", str(tmp_path / "out"))  # made if it is not there
    gpu.keep_trace(tmp_path, {"file": str(trace)}, "toy")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert kept == {"toy.trace.json.gz": b"host.trace.json.gz", "toy.hlo.txt.gz": b"program.hlo.txt.gz"}
    gpu.keep_trace(tmp_path, {"error": "no trace"}, "other")


def test_the_best_is_one_that_train_would_start_and_among_equals_the_smallest():
    rows = [
        row(4, "block", 10.0, peak=9.0),
        row(8, "block", 10.1, peak=12.0),
        row(8, "attention", 14.0, plan=25.0),  # `train` refuses a plan above device_memory_gb
        row(12, "none", 15.0),  # no multiple makes a global batch of 256
        row(2, "none", None, status="out of memory"),
    ]
    assert gpu_report.best(rows, "prod-1024", "jax", 24.0)["spec"]["batch"] == 4
    assert gpu_report.best(rows, "prod-1024", "jax", 30.0)["spec"]["remat"] == "attention"
    assert gpu_report.best(rows, "prod-1024", "torch") is None


def test_the_report_has_the_ratio_of_each_round_and_the_change_to_make():
    rows = [row(8, "attention", 12.0 + n, turn=f"run/{n}", plan=20.0) for n in range(3)]
    rows += [row(4, "block", 10.0, side="torch", turn=f"run/{n}") for n in range(3)]
    rows += [row(4, "attention", 9.0), row(16, "block", None, status="out of memory")]
    text = gpu_report.report(rows, 24.0, ["prod-256 jax"])
    assert lines_naming(text, "1.30", "1.20", "1.40", 3, "PyTorch")
    assert "c.data.micro_batch_size = 8, c.model.remat = 'attention'" in text
    assert lines_naming(text, "configs/prod.py", 4, "'attention'", "9.00 images/s")
    assert "| 16 | out of memory |" in text and lines_naming(text, "time (1)", "prod-256 jax")


def test_an_append_keeps_what_was_measured_and_by_which_call(tmp_path):
    a = argparse.Namespace(peak_tflops=None, minutes=1, memory_gb=24.0)
    first, card = tmp_path / "gpu.json", ("NVIDIA H200", 150.8)
    bench = gpu.Bench(a, card, [tmp_path])
    bench.rows, bench.same = (
        [row(4, "block", 10.0), row(8, "block", None, status="failed")],
        {"loss_jax": 1.0},
    )
    bench.save()
    made = json.loads(first.read_text())["environment"]
    for calls in (1, 2):  # what failed is tried again
        bench = gpu.Bench(a, card, [tmp_path])
        bench.append_to(first)
        assert [r["spec"]["batch"] for r in bench.rows] == [4] and bench.same == {"loss_jax": 1.0}
        assert len(bench.earlier) == calls
        assert bench.earlier[0] == {name: made[name] for name in ("command", "made", "commit")}
        bench.save()
    with pytest.raises(SystemExit, match=naming("--append", str(first), "NVIDIA H200", "NVIDIA A100")):
        gpu.Bench(a, ("NVIDIA A100", 80.0), []).append_to(first)


def test_a_larger_micro_batch_is_not_tried_where_a_smaller_one_did_not_fit():
    a = argparse.Namespace(peak_tflops=None, minutes=1, memory_gb=24.0)
    bench = gpu.Bench(a, ("NVIDIA H100 80GB HBM3", 85.5), [])
    assert bench.peak == 989.4
    bench.rows = [row(4, "dots", None, status="out of memory")]
    assert bench.hopeless(gpu.make("prod-1024", "jax", 8, "dots"))
    for other in (("jax", 2, "dots"), ("jax", 8, "block"), ("torch", 8, "dots")):
        assert not bench.hopeless(gpu.make("prod-1024", *other))


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes."), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("cuDNN: no engine for this graph"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error, full):
    assert gpu_sides.is_out_of_memory(error) is full


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        # kept from the program of nano on an H200, shortened
        ("fusion.9", 'bf16[8,384]{1,0} fusion(%gemm_fusion_dot_general.56), kind=kInput, calls=%fused, '
         'metadata={op_name="jit(step)/transpose(jvp())/while/body/reduce_sum"}', "norms and elementwise"),
        ("loop_add_fusion.6", 'bf16[8]{0} fusion(%gemm_fusion_dot_general.6, %dot_product_attention_fwd.0), '
         'kind=kLoop, metadata={op_name="jit(step)/jvp()/while/body/add"}', "norms and elementwise"),
        ("gemm_fusion_dot_general.56", 'bf16[8192,384]{1,0} fusion(%bitcast.1, %bitcast.2), kind=kCustom, '
         'metadata={op_name="jit(step)/transpose(jvp())/dot_general"}', "products"),
        ("custom-call.1", 'bf16[8]{0} custom-call(%fmha.1, %b), custom_call_target="__cublas$lt$matmul"', "products"),
        ("dot_product_attention_bwd.24", "(bf16[8]{0}) custom-call(%copy.1), "
         'custom_call_target="__cudnn$fmhaSoftmaxBackward"', "attention"),
        ("copy.3", 'bf16[8]{0} copy(%gemm_fusion.1), metadata={op_name="jit(step)/jvp()/dot"}', "copies"),
    ],
)  # fmt: skip
def test_what_an_operation_reads_does_not_name_its_group(name, line, expected):
    assert gpu_trace.group(name, line) == expected


def test_a_profile_is_grouped_by_the_streams_of_the_device_alone(tmp_path):
    def kernel(tid, name, start, duration, **arguments):
        return {
            "ph": "X",
            "pid": 1,
            "tid": tid,
            "name": name,
            "ts": start,
            "dur": duration,
            "args": arguments,
        }

    events = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0 (pid 1)"}},
        {"ph": "M", "pid": 1, "tid": 7, "name": "thread_name", "args": {"name": "Stream #13(Compute)"}},
        {"ph": "M", "pid": 1, "tid": 8, "name": "thread_name", "args": {"name": "XLA Ops"}},
        kernel(7, "nvjet_hsh", 0, 4000, hlo_op="custom-call.2"),
        kernel(7, "cudnn_generated", 4000, 2000, hlo_op="custom-call.3"),
        kernel(7, "fusion_1", 6000, 1000),  # no hlo_op: found by its kernel's name
        kernel(7, "loop_select_fusion", 8000, 1000, hlo_op="fusion.4"),
        kernel(7, "MemcpyD2D", 9000, 500),
        kernel(8, "custom-call.2", 0, 4000, hlo_op="custom-call.2"),  # the same time again, by operation
        {"ph": "X", "pid": 2, "tid": 1, "name": "host", "ts": 0, "dur": 99999},
    ]
    with gzip.open(tmp_path / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    found = gpu_trace.summary(tmp_path, HLO, steps=2)
    assert found["groups"] == {
        "products": 2.0,
        "attention": 1.0,
        "norms and elementwise": 0.5,
        "optimizer, EMA, metrics": 0.5,
        "idle": 0.5,
        "copies": 0.25,
    }
    assert found["top"][0] == ("custom-call.2", "products", 2.0)
    assert "error" in gpu_trace.summary(tmp_path / "empty", HLO, 1)
