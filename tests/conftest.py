import os
import shutil
from dataclasses import replace

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes of one thread each; before torch is imported
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ["NUMBA_DISABLE_JIT"] = "1"

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F

import kdx
from kdx.data import shapes, sst
from kdx.data.sources import find_source
from kdx.paths import DataError
from tests.forks import forks


@pytest.fixture(scope="session", autouse=True)
def forked(tmp_path_factory):
    """Kernels, and workers of clusters, are forks of a process that has imported their libraries."""
    with forks(tmp_path_factory.mktemp("forks")):
        yield


@pytest.fixture(autouse=True)
def fresh_home(tmp_path, monkeypatch, request):
    """Every test has a data home of its own, but those marked real_data."""
    if "real_data" not in request.keywords:
        monkeypatch.setenv("KDX_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("KDX_NETWORKS", str(tmp_path / "networks"))
        monkeypatch.delenv("KDX_DATA", raising=False)
    torch.manual_seed(0)


@pytest.fixture
def closed_figures():
    """No figure outlives its test."""
    yield
    plt.close("all")


@pytest.fixture(scope="session")
def dcor():
    """The oracle of distance correlation, without numba: compiling takes longer than all that is computed here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("numba.guvectorize", lambda *_, **__: lambda function: function)
        import dcor

    return dcor


@pytest.fixture
def networks_home(tmp_path):
    """The folder of shipped networks of a test, which is empty."""
    return tmp_path / "networks"


@pytest.fixture
def one_thread():
    """Tiny tensors are faster without a second thread to wait for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture(scope="session")
def tiny_shapes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "COUNTS", {"train": 200, "test": 200})  # drawn in no time
        return {split: kdx.load_dataset("shapes", split, limit=80, size=32) for split in ("train", "test")}


@pytest.fixture(scope="session")
def shapes16(tiny_shapes):
    """The shapes at 16 px, on which networks with the small stem are quick."""
    shrink = lambda d: replace(d, images=F.avg_pool2d(d.images.float(), 2).byte(), masks=None)  # noqa: E731
    return {split: shrink(dataset) for split, dataset in tiny_shapes.items()}


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def shared_home(fresh_home, shared_store, monkeypatch):
    """A data home that tests of a session share: a network that one of them has trained, the others find."""
    monkeypatch.setenv("KDX_HOME", str(shared_store))
    return shared_store


@pytest.fixture(scope="session")
def trained_store(tmp_path_factory, tiny_shapes):
    """A run store with students by two techniques, a second base, and a student of a random teacher."""
    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDX_HOME", str(home))
        kdx.cross_fit(
            tiny_shapes["train"],
            teacher="resnet10",
            student="resnet10",
            techniques=["response", "attention"],
            k=2,
            controls=1,
            recipe=kdx.Recipe(epochs=1, batch_size=20, sizes=(1.0,)),
            stem="small",
            width=0.125,
            device="cpu",
        )
    return home


@pytest.fixture
def trained_home(fresh_home, trained_store, monkeypatch):
    """The data home of ``trained_store``."""
    monkeypatch.setenv("KDX_HOME", str(trained_store))
    return trained_store


@pytest.fixture(scope="session")
def cifar10():
    """The folder of the real CIFAR-10, fetched if it is not there."""
    try:
        return kdx.fetch("cifar10")
    except DataError as error:
        _unless_ci(f"CIFAR-10 could not be had: {error}")


@pytest.fixture(scope="session")
def photographs():
    """Name -> the folder of real petimages and plantvillage files, from the places that KDX_DATA lists."""
    found = {name: find_source(kdx.DATASETS[name]) for name in ("petimages", "plantvillage")}
    if missing := [name for name, folder in found.items() if folder is None]:
        _unless_ci(f"KDX_DATA names no place of {' and '.join(missing)}")
    return found


@pytest.fixture(scope="session")
def chromedriver():
    path = shutil.which("chromedriver")
    return path or _unless_ci("no chromedriver (Debian: apt-get install chromium chromium-driver)")


@pytest.fixture(scope="session")
def browser(chromedriver, tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1400,1600",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    driver.set_script_timeout(180)  # axe-core on a page of many figures, on a machine that is at other work
    yield driver
    driver.quit()


@pytest.fixture
def treebank():
    """The Stanford Sentiment Treebank is on this machine."""
    if sst.find_sst() is None:
        pytest.skip("the treebank is not on this machine")


def _unless_ci(reason):
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; CI must not skip this")
    pytest.skip(reason)


def pytest_terminal_summary(terminalreporter):
    """Seconds of each part of the suite, summed over processes."""
    seconds = dict.fromkeys(("unit", "book", "real_data"), 0.0)
    for report in (r for reports in terminalreporter.stats.values() for r in reports if hasattr(r, "duration")):
        part = next((mark for mark in ("real_data", "book") if mark in report.keywords), "unit")
        seconds[part] += report.duration
    parts = ", ".join(f"{part} {spent:.0f} s" for part, spent in seconds.items())
    terminalreporter.write_line(f"time of the parts, summed over processes: {parts}")
