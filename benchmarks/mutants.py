"""Mutation testing: small faults are planted in a module one at a time, and its tests must notice (cosmic-ray).

    bash scripts/mutants.sh                                   # every module of MODULES: hours; goes on where it stopped
    bash scripts/mutants.sh preprocess/buckets.py fluxdit_jax/flow.py
    bash scripts/mutants.sh --report                          # survivors, and the table in results/mutants.json

Faults are planted in a clone of what is committed, below .mutants/; nothing else is changed. A survivor is judged once:
one that cannot change behaviour is written with its reason into tests/equivalent_mutants.toml, any other wants a test.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import environment, mutant_tests

WORK = environment.ROOT / ".mutants"
EQUIVALENT = environment.ROOT / "tests" / "equivalent_mutants.toml"
# Each module with the tests that are to notice. Slow ones are left out.
MODULES = {
    "fluxdit_jax/flow.py": ["test_flow"],
    "fluxdit_jax/objective.py": ["test_train_step_by_hand"],
    "fluxdit_jax/train_step.py": ["test_train_step_by_hand"],
    "fluxdit_jax/optimizer.py": ["test_optimizer"],
    "fluxdit_jax/muon.py": ["test_muon"],
    "fluxdit_jax/model/dit.py": ["model/test_dit_by_hand"],
    "fluxdit_jax/model/attention.py": ["model/test_attention"],
    "fluxdit_jax/sampling/solvers.py": ["sampling/test_solvers"],
    "fluxdit_jax/sampling/pipeline.py": ["sampling/test_pipeline"],
    "fluxdit_jax/sample.py": ["sampling/test_sample_command"],
    "fluxdit_jax/run/checkpoint.py": [
        "run/test_checkpoint_writes",
        "run/test_checkpoint",
        "run/test_checkpoint_damage",
    ],
    "fluxdit_jax/loader/reader.py": ["loader/test_collate", "loader/test_reader", "loader/test_reader_damage"],
    "fluxdit_jax/dataset/records.py": [
        "dataset/test_records",
        "dataset/test_records_captions",
        "dataset/test_records_refusals",
    ],
    "fluxdit_jax/dataset/manifest.py": ["dataset/test_manifest", "dataset/test_records"],
    "fluxdit_jax/dataset/grid.py": ["dataset/test_grid"],
    "fluxdit_jax/gate/requirement.py": ["gate/test_gate_requirement"],
    "fluxdit_jax/gate/retrieval.py": ["gate/test_gate_retrieval"],
    "fluxdit_jax/gate/memorisation.py": ["gate/test_gate_memorisation"],
    "fluxdit_jax/gate/swap.py": ["gate/test_gate_swap"],
    "fluxdit_jax/gate/edit.py": ["gate/test_gate_edit"],
    "fluxdit_jax/gate/verdict.py": ["gate/test_gate_verdict"],
    "fluxdit_jax/gate/eval_set.py": ["gate/test_gate_eval_set"],
    "fluxdit_jax/gate/sampler.py": ["gate/test_gate_sampler"],
    "fluxdit_jax/gate/training.py": ["gate/test_gate_advice"],
    "fluxdit_jax/gate/advice.py": ["gate/test_gate_advice"],
    "fluxdit_jax/gate/page.py": ["gate/test_gate_sections"],
    "fluxdit_jax/gate/sheet.py": ["gate/test_gate_sheet"],
    "preprocess/buckets.py": ["preprocess/test_buckets"],
    "preprocess/build/statistics.py": ["preprocess/test_statistics"],
    "preprocess/build/plan.py": ["preprocess/test_plan"],
    "preprocess/input/captions.py": ["preprocess/test_captions"],
    "preprocess/input/scan.py": ["preprocess/test_scan_folder", "preprocess/test_scan"],
}
_BINARY = "Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_FloorDiv|Pow_Mul|BitAnd_BitOr|BitOr_BitAnd"
_COMPARISON = "Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Lt_GtE|GtE_Lt|Gt_LtE|LtE_Gt|Is_IsNot|IsNot_Is"
OUTCOMES = ("killed", "survived", "equivalent", "left", "not drawn")
EXCLUDED = [  # one or two replacements of each operator
    rf"core/ReplaceBinaryOperator_(?!({_BINARY})$)",
    rf"core/ReplaceComparisonOperator_(?!({_COMPARISON})$)",
    r"core/ReplaceUnaryOperator_(?!(USub_UAdd|Delete_Not)$)",
    r"core/(RemoveDecorator|Variable.*)",
]


def run(module: str, minutes: float, most: int | None) -> None:
    """Plants the faults of a module that were not planted yet, for some minutes; `most`: so many, drawn at random."""
    folder = WORK / module.removesuffix(".py").replace("/", ".")
    commit = _git("rev-parse", "HEAD")
    if (folder / "commit").is_file() and _git("diff", "--name-only", (folder / "commit").read_text(), "--", module):
        shutil.rmtree(folder)  # the module has changed since
    known = (folder / "commit").is_file()
    if not known:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        subprocess.run(["git", "clone", "--quiet", str(environment.ROOT), str(folder / "clone")], check=True)
    else:  # what stopped it may have left a fault in place
        subprocess.run(["git", "checkout", "--quiet", "."], cwd=folder / "clone", check=True)
    tests = [f"tests/{name}.py" for name in MODULES.get(module, [f"test_{Path(module).stem}"])]
    with _server(folder, tests) as client:
        if not known:
            for _ in range(2):  # the second with compiled programs in its cache
                start = time.perf_counter()
                subprocess.run(client, check=True)
            limit = 20 + 4 * (time.perf_counter() - start)
            (folder / "config.toml").write_text(
                f"[cosmic-ray]\nmodule-path = {json.dumps(module)}\ntimeout = {limit:.0f}.0\nexcluded-modules = []\n"
                f"test-command = {json.dumps(shlex.join(client))}\n[cosmic-ray.distributor]\nname = 'local'\n"
                f"[cosmic-ray.filters.operators-filter]\nexclude-operators = {json.dumps(EXCLUDED)}\n"
            )
            _cosmic(folder, "cosmic-ray", "init", "config.toml", "session.sqlite")
            _cosmic(folder, "cr-filter-operators", "session.sqlite", "config.toml")
            _skip(folder, module, most)
            (folder / "commit").write_text(commit)
        counts = {name: len(found) for name, found in judged(folder, module).items()}
        total = sum(counts.values()) - counts["not drawn"]
        print(f"{module}: {total - counts['left']} of {total} done", flush=True)
        _cosmic(folder, "cosmic-ray", "exec", "config.toml", "session.sqlite", timeout=minutes * 60)


@contextlib.contextmanager
def _server(folder: Path, tests: list[str]) -> Iterator[list[str]]:
    """A process that runs the tests in the clone; yields the command that asks it to and exits with their status."""
    address = folder / "tests.socket"
    address.unlink(missing_ok=True)
    command = [sys.executable, str(Path(mutant_tests.__file__)), str(address)]
    with (folder / "tests.log").open("w") as log:
        server = subprocess.Popen([*command, str(folder / "clone"), *tests], stdout=log, stderr=log)
    try:
        while not address.is_socket():
            if server.poll() is not None:
                raise SystemExit(f"{folder / 'tests.log'}: the process that runs the tests has ended: see there")
            time.sleep(0.1)
        time.sleep(0.5)  # bound, and then listening
        yield [sys.executable, "-I", "-S", *command[1:]]
    finally:
        server.terminate()
        server.wait()


def _cosmic(folder: Path, program: str, *arguments: str, timeout: float | None = None) -> None:
    """Runs a program of cosmic-ray in the clone; what is not done in time is left for the next run."""
    command = [str(Path(sys.executable).parent / program)]
    command += [str(folder / word) if word.endswith((".toml", ".sqlite")) else word for word in arguments]
    try:
        subprocess.run(command, cwd=folder / "clone", check=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        subprocess.run(["git", "checkout", "--quiet", "."], cwd=folder / "clone", check=True)


def _skip(folder: Path, module: str, most: int | None) -> None:
    """Marks faults that cannot change a correct program as skipped, and second ones of one place.

    Annotations are not evaluated (`from __future__ import annotations`); arguments of `@dataclass` and `@lru_cache`
    change what is allowed and what is kept; a slice in a message is how much of a value it quotes. `not a == b` is
    `a != b`, and of the two numbers beside a number one is tried.
    """
    from cosmic_ray.work_db import use_db
    from cosmic_ray.work_item import WorkerOutcome, WorkResult

    source = (folder / "clone" / module).read_text()
    tree, lines = ast.parse(source), source.splitlines()
    spans, comparisons, seen = [], set(), set()
    for node in ast.walk(tree):
        parts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        parts += [
            part for part in getattr(node, "decorator_list", []) if re.search("dataclass|cache", ast.unparse(part))
        ]
        if isinstance(node, ast.JoinedStr | ast.Raise):
            parts += [inner for inner in ast.walk(node) if isinstance(inner, ast.Slice)]
        spans += [((p.lineno, p.col_offset), (p.end_lineno, p.end_col_offset)) for p in parts if isinstance(p, ast.AST)]
        if isinstance(node, ast.If | ast.While | ast.IfExp) and isinstance(node.test, ast.Compare):
            comparisons.add((node.test.lineno, node.test.col_offset))
    with use_db(folder / "session.sqlite") as session:
        for item in session.pending_work_items:
            mutation = item.mutations[0]
            where, operator = tuple(mutation.start_pos), mutation.operator_name.removeprefix("core/")
            again = operator == "NumberReplacer" and where in seen
            seen.update([where] if operator == "NumberReplacer" else [])
            same = operator == "AddNot" and where in comparisons
            bare = lines[where[0] - 1][where[1] :].startswith("*,")  # of a signature
            if again or same or bare or any(start <= where < end for start, end in spans):
                session.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED, output="equivalent"))
        left = sorted(session.pending_work_items, key=lambda item: item.job_id)
        for item in left[most:] if most else []:  # a job's id is random
            session.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED, output="not drawn"))


def read(folder: Path) -> list[dict[str, Any]]:
    """The faults of a session: operator, line, outcome ("killed", "survived", None), the line before and after."""
    command = [str(Path(sys.executable).parent / "cosmic-ray"), "dump", str(folder / "session.sqlite")]
    rows = []
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        item, result = json.loads(line)
        if result and result["worker_outcome"] == "skipped" and result["output"] != "not drawn":
            continue
        changed = re.findall(r"^([-+])(?![-+]{2})(.*)$", (result or {}).get("diff") or "", re.MULTILINE)
        rows.append({
            "operator": item["mutations"][0]["operator_name"].removeprefix("core/"),
            "line": item["mutations"][0]["start_pos"][0],
            "outcome": result and (result["test_outcome"] or result["output"]),
            "was": " ".join(text.strip() for sign, text in changed if sign == "-").strip(),
            "is": " ".join(text.strip() for sign, text in changed if sign == "+").strip(),
        })  # fmt: skip
    return rows


def judged(folder: Path, module: str) -> dict[str, list[dict[str, Any]]]:
    """Faults by what became of them: "killed", "survived", "equivalent", "left" and "not drawn"."""
    known = tomllib.loads(EQUIVALENT.read_text()).get("mutant", []) if EQUIVALENT.is_file() else []
    same = {(one["was"], one["is"]) for one in known if one["module"] == module}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in OUTCOMES}
    for row in read(folder):
        if row["outcome"] in (None, "not drawn"):
            found[row["outcome"] or "left"].append(row)
        elif row["outcome"] == "survived":
            found["equivalent" if (row["was"], row["is"]) in same else "survived"].append(row)
        else:  # killed, or a program that no longer ends or loads
            found["killed"].append(row)
    return found


def report() -> None:
    """Prints survivors and the table, and writes results/mutants.json."""
    rows, shown = [], []
    for folder in sorted(WORK.iterdir()) if WORK.is_dir() else []:
        module = folder.name.replace(".", "/") + ".py"
        if not (folder / "commit").is_file():
            continue
        found = judged(folder, module)
        counts = {name: len(each) for name, each in found.items()}
        of = counts["killed"] + counts["survived"]
        rows.append({"module": module, "commit": (folder / "commit").read_text()[:7], **counts,
                     "killed_percent": round(100 * counts["killed"] / of, 1) if of else None,
                     "survivors": found["survived"]})  # fmt: skip
        shown.append([module, *counts.values(), rows[-1]["killed_percent"]])
        for one in found["survived"]:
            print(f"{module}:{one['line']}: {one['operator']}\n  - {one['was']}\n  + {one['is']}")
    print(environment.table(["module", *OUTCOMES, "% killed"], shown))
    print(environment.write("mutants", rows))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=environment.ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help=f"default: {', '.join(MODULES)}")
    parser.add_argument("--minutes", type=float, default=600.0, help="for each module (default: 600)")
    parser.add_argument("--most", type=int, help="plant so many faults of each module, drawn at random (default: all)")
    parser.add_argument("--report", action="store_true", help="only report")
    arguments = parser.parse_args()
    if not arguments.report:
        for module in arguments.modules or MODULES:
            if not (environment.ROOT / module).is_file():
                parser.error(f"{module}: no such file; give a path from the root, as preprocess/buckets.py")
            run(module, arguments.minutes, arguments.most)
    report()


if __name__ == "__main__":
    main()
