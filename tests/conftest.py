import os
import shutil

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes of one thread each; before torch is imported
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

import kdx
from kdx.home import DataError
from kdx.sources import find_source


@pytest.fixture(autouse=True)
def fresh_home(tmp_path, monkeypatch, request):
    """Every test has a data home of its own, but those marked real_data."""
    if "real_data" not in request.keywords:
        monkeypatch.setenv("KDX_HOME", str(tmp_path / "home"))
        monkeypatch.delenv("KDX_DATA", raising=False)
    torch.manual_seed(0)


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
    return {split: kdx.load_dataset("shapes", split, limit=80, size=32) for split in ("train", "test")}


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
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1300,1600",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


def _unless_ci(reason):
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; CI must not skip this")
    pytest.skip(reason)
