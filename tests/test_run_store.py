import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import torch

from kdx import Recipe, fit
from kdx.distil import run_store
from kdx.distil.run_store import code_digest, find_run, run_key
from tests.forks import own_processes, python

ROOT = Path(__file__).parent.parent
QUICK = Recipe(epochs=1, batch_size=16, lr=0.05)


def train(tiny_shapes, **settings):
    settings = {"recipe": QUICK, "width": 0.125, "device": "cpu"} | settings
    return fit("resnet10", tiny_shapes["train"], tiny_shapes["test"], **settings)


def test_run_files_are_checked_when_loaded(tiny_shapes):
    run = train(tiny_shapes)
    weights = run.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"is damaged \(model.safetensors: expected SHA-256.*delete that folder"):
        train(tiny_shapes)
    (run.path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is damaged"):
        train(tiny_shapes)


def test_run_manifest_tells_how_it_was_made(tiny_shapes):
    run = train(tiny_shapes)
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["spec"]["recipe"]["epochs"] == 1
    assert manifest["spec"]["train"] == tiny_shapes["train"].fingerprint
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["device"].startswith("cpu")
    assert manifest["precision"] in ("float32", "bfloat16")
    assert manifest["seconds"] > 0


def test_run_that_fails_to_write_leaves_nothing(tiny_shapes, home, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_store, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space"):
        train(tiny_shapes)
    assert list((home / "runs").iterdir()) == []


# --- the key -----------------------------------------------------------------------------------


def module(tmp_path, source):
    """A module of this source, as if it were one of kdx. The latest one counts."""
    path = tmp_path / f"{abs(hash(source))}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("kdx.probe", path)
    sys.modules["kdx.probe"] = loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


PLAIN = """
LIMIT = 3

def unused(x):
    return x

def helper(x):
    return x + LIMIT

def f(x, unused=None):
    if x < 0:
        raise ValueError("negative")
    return helper(x)
"""


@pytest.mark.parametrize(
    ("before", "after", "counts"),
    [
        ("return helper(x)", "return  (helper(x))  # adds", False),
        ("def f(x, unused=None):", 'def f(x: int, unused=None) -> int:\n    """Adds."""', False),
        ('"negative"', 'f"expected 0 or more, got {x}"', False),
        ("    return x\n", "    return -x\n", False),
        ("return helper(x)", "return helper(x + 1)", True),
        ("return x + LIMIT", "return x - LIMIT", True),
        ("LIMIT = 3", "LIMIT = 4", True),
        ("x < 0", "x <= 0", True),
    ],
)
def test_code_digest_covers_what_is_called_and_no_more(tmp_path, before, after, counts):
    assert before in PLAIN
    changed = PLAIN.replace(before, after, 1)
    one, other = (code_digest(module(tmp_path, source).f) for source in (PLAIN, changed))
    assert (one != other) == counts


def test_run_key_takes_whole_floats_for_integers():
    keys = [run_key({"a": value}, "code") for value in (1, 1.0, 1.5)]
    assert keys[0] == keys[1] != keys[2]
    assert run_key({"a": 1}, "other") != keys[0]


KEYS = """
import json, os, sys
import pandas, scipy.stats, torch, torchvision  # once for all copies of the package
for package in sys.argv[1:]:
    if not os.fork():
        sys.path.insert(0, package)
        import kdx
        from kdx.distil.fit import Job
        images, labels = torch.zeros(160, 3, 32, 32, dtype=torch.uint8), torch.arange(160) % 10
        data = kdx.Dataset(images, labels, kdx.DATASETS["shapes"])
        class Teacher(kdx.Run):
            classes = data.classes
        teacher = Teacher("0" * 32, None, {}, None)
        names = ("label", "response", "dkd", "attention", "overhaul", "alp", "inter-channel", "attention+response")
        jobs = {name: Job("resnet10", data, data, name, None if name == "label" else teacher) for name in names}
        jobs["mobilenet"] = Job("mobilenet_v2", data, data)
        with open(os.path.join(package, "keys.json"), "w") as file:
            json.dump({name: job.key for name, job in jobs.items()}, file)
        os._exit(0)
    os.wait()
"""


def test_an_edit_retrains_what_it_changes_and_no_more(tmp_path):
    """Of a copy of the package: comments, messages and device names change no key; code changes those it moves."""

    edits = {
        "none": [],
        "harmless": [
            ("distil/training.py", "self.steps = len(train)", "# an epoch\n        self.steps = len(train)"),
            ("distil/training.py", "expected the same stages in student and teacher", "expected other stages"),
            ("distil/fit.py", "the training loss of", "the loss of"),
            ("distil/logit_techniques.py", "response: expected", "response: wrong alpha or temperature, expected"),
            ("distil/techniques.py", "def settings_of(", "def unused():\n    pass\n\n\ndef settings_of("),
            ("networks/devices.py", "{torch.get_num_threads()} threads", "{torch.get_num_threads()} of them"),
            ("networks/models.py", "classes: expected at least 2", "classes: expected 2 or more"),
            ("networks/models.py", "def save_checkpoint(", "def unused():\n    pass\n\n\ndef save_checkpoint("),
        ],
        "attention": [("distil/feature_techniques.py", "features.pow(2).mean(1)", "features.abs().mean(1)")],
        "dkd": [("distil/logit_techniques.py", "others.logsumexp(1)", "others.amax(1)")],
        "regression": [("distil/feature_techniques.py", "1, bias=False)", "1)")],
        "outputs": [("networks/stages.py", "{stage: Tap(name) for", "{stage: Tap(name, False) for")],
        "base class": [("distil/technique.py", "return 1.0", "return 1.5")],
        "mobilenet": [("networks/models.py", "width_mult=width, dropout=0.0", "width_mult=width, dropout=0.1")],
        "step": [("distil/training.py", "nesterov=True", "nesterov=False")],
    }
    for name, changes in edits.items():
        package = shutil.copytree(ROOT / "kdx", tmp_path / name / "kdx")
        for file, before, after in changes:
            source = (package / file).read_text()
            assert before in source, (file, before)
            (package / file).write_text(source.replace(before, after))
    command = [sys.executable, "-c", KEYS, *(str(tmp_path / name) for name in edits)]
    subprocess.run(command, cwd=tmp_path, check=True)
    keys = {name: json.loads((tmp_path / name / "keys.json").read_text()) for name in edits}
    original = keys.pop("none")
    changed = {name: {role for role, key in found.items() if key != original[role]} for name, found in keys.items()}
    assert changed == {
        "harmless": set(),
        "attention": {"attention", "attention+response"},
        "dkd": {"dkd"},
        "regression": {"overhaul", "inter-channel"},
        "outputs": {"attention", "alp", "inter-channel", "attention+response"},
        "base class": set(original),
        "mobilenet": {"mobilenet"},
        "step": set(original),
    }


# --- a killed run ------------------------------------------------------------------------------


@pytest.mark.book
def test_killed_kdx_run_resumes_from_the_last_finished_network(home, tmp_path, monkeypatch):
    notebook = nbformat.v4.new_notebook()
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook.cells = [
        nbformat.v4.new_code_cell("epochs: int = 2  # of every network", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(
            "import kdx\n"
            "images = kdx.load_dataset('shapes', 'test', limit=160, size=32)\n"
            "kdx.cross_fit(images, teacher='resnet10', student='resnet10', "
            "techniques=['response'], k=2, controls=1, width=0.125, "
            "recipe=kdx.Recipe(epochs=epochs, batch_size=32))"
        ),
    ]
    nbformat.write(notebook, tmp_path / "n.ipynb")
    command = ["run", str(tmp_path / "n.ipynb"), "-o", str(tmp_path / "out.ipynb")]
    monkeypatch.setenv("KDX_HOME", str(home))
    with own_processes():  # the kernel is a child of the run, and is killed with it
        killed = [*python("kdx.cli"), *command]
        job = subprocess.Popen(killed, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    store = home / "runs"
    deadline = time.monotonic() + 240
    while not list(store.glob("[!.]*/manifest.json")):
        assert job.poll() is None, job.stdout.read().decode()
        assert time.monotonic() < deadline, "no network was finished in time"
        time.sleep(0.02)
    for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
        process.kill()
    job.wait()
    assert not (tmp_path / "out.ipynb").exists()
    before = {path.name: (path / "manifest.json").stat().st_mtime_ns for path in store.glob("[!.]*")}
    assert 1 <= len(before) < 9
    for key in before:  # whatever lies under a key is whole
        assert find_run(key).model
    subprocess.run([*python("kdx.cli"), *command], cwd=ROOT, check=True, capture_output=True)
    after = {path.name: (path / "manifest.json").stat().st_mtime_ns for path in store.glob("[!.]*")}
    # two bases, a student each, and the controls: two bases, a student, a teacher and its student
    assert len(after) == 9
    assert before.items() <= after.items()  # what was finished was not trained again
    assert (tmp_path / "out.ipynb").exists()
