"""What our own source must not contain: whatever lets data run code, or an archive write where it likes."""

from __future__ import annotations

import ast
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
OURS = ("fluxdit_jax", "preprocess", "configs", "scripts", "benchmarks", "comfy")
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "torch.load", "os.system", "os.popen", "tempfile.mktemp", "shutil.unpack_archive", "importlib.import_module",
    "pd.read_pickle", "np.fromfile", "numpy.fromfile",
}  # fmt: skip
# What only the user's own command line or the user's own folder decides, each with the reason.
ALLOWED = {
    ("fluxdit_jax/run/tracker.py", "importlib.import_module"),  # of config.log.tracker
    ("comfy/__init__.py", "trust_remote_code"),  # asked of the user first: trust_its_code
    ("fluxdit_jax/portable/app.py", "trust_remote_code"),  # of the folder that the file itself lies in
}
METHODS = {"extractall", "extract"}  # of archives: none of ours is ever unpacked


def forbidden(source: str, name: str) -> list[str]:
    """Lines of Python source that could run or write what data says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        what = ""
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else {node.module or ""}
            what = ", ".join(sorted({n.partition(".")[0] for n in names} & MODULES))
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if called in BUILTINS | CALLS or (isinstance(node.func, ast.Attribute) and node.func.attr in METHODS):
                what = called
            elif called in ("np.load", "numpy.load") and keywords.get("allow_pickle", False) is not False:
                what = f"{called} with allow_pickle"
            elif "trust_remote_code" in keywords and keywords["trust_remote_code"] is not False:
                what = "trust_remote_code"
            elif keywords.get("shell", False) is not False:
                what = "shell=True"
            elif called.endswith(".from_pretrained") and "weights" in called.lower():
                what = called
        if what and (name, what) not in ALLOWED:
            found.append(f"{name}:{node.lineno}: {what}")
    return found


def look() -> tuple[int, list[str]]:
    """(files looked at, forbidden lines) of all our source."""
    files = [path for folder in OURS for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    found = []
    for path in files:
        found += forbidden(path.read_text(encoding="utf-8"), str(path.relative_to(REPOSITORY)))
    return len(files), found
