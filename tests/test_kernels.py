import subprocess
import sys

import nbformat
import psutil
import pytest

from kdx.pages import build
from kdx.pages.kernels import ForkedProcess
from tests.clusters import until

LIBRARIES = """
import sys
before = {"torch", "pandas", "kdx.data"} & set(sys.modules)
"""
SURROUNDINGS = """
import os, subprocess
import matplotlib.pyplot as plt
plt.plot([0, 1])
print(sorted(before), os.getcwd(), os.environ["KDX_HOME"], os.getpid())
print(subprocess.run(["false"]).returncode, os.read(0, 1))
"""
FOREVER = """
import os, time
from pathlib import Path
Path("pid").write_text(str(os.getpid()))
time.sleep(600)
"""
CLIENT = """
import sys
from pathlib import Path
from kdx.pages import build
build.execute(Path(sys.argv[1]), Path("out.ipynb"), {})
"""


def notebook(path, *cells):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nb, path)
    return path


def test_a_page_finds_libraries_imported_and_else_a_process_of_its_own(tmp_path, monkeypatch):
    source = notebook(tmp_path / "page.ipynb", LIBRARIES, SURROUNDINGS)
    processes = set()
    for home in ("one", "two"):
        monkeypatch.setenv("KDX_HOME", home)
        build.execute(source, tmp_path / "out.ipynb", {}, tmp_path)
        outputs = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[1].outputs
        said = "".join(output.text for output in outputs if output.output_type == "stream").split("\n")
        assert said[0].startswith(f"['pandas', 'torch'] {tmp_path} {tmp_path.cwd() / home} ")
        assert said[1] == "1 b''"
        assert any("image/png" in output.get("data", {}) for output in outputs)
        processes.add(int(said[0].rpartition(" ")[2]))
    assert len(processes) == 2
    assert not any(psutil.pid_exists(process) for process in processes)


def test_a_kernel_ends_when_who_started_it_is_killed(tmp_path):
    source = notebook(tmp_path / "page.ipynb", FOREVER)
    client = subprocess.Popen([sys.executable, "-c", CLIENT, str(source)], cwd=tmp_path)
    until((tmp_path / "pid").is_file)
    until(lambda: (tmp_path / "pid").read_text())
    kernel = ForkedProcess(int((tmp_path / "pid").read_text()))
    assert kernel.poll() is None
    client.kill()
    client.wait()
    until(lambda: kernel.poll() == 0, seconds=30)


def test_elsewhere_kernels_are_started_as_jupyter_does(tmp_path, monkeypatch):
    monkeypatch.setattr("kdx.pages.kernels._fork", lambda order: pytest.fail("forked"))
    monkeypatch.setattr(sys, "platform", "another")
    build.execute(notebook(tmp_path / "page.ipynb", "print(1)"), tmp_path / "out.ipynb", {}, tmp_path)
    assert nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[0].outputs[0].text == "1\n"
