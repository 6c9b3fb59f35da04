"""Kernels that are forked from a process which has imported the libraries of all pages: seconds less for each page.

``python -m kdx.pages.kernels`` is that process. It imports no code of kdx that computes, which pages read anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
from jupyter_client.manager import AsyncKernelManager

LIBRARIES = ("torch", "torchvision", "pandas", "scipy.stats", "seaborn", "ipykernel.kernelapp", "ipykernel.ipkernel")


class ForkedProcess(psutil.Process):
    """A process that is no child of this one, as Jupyter expects a :class:`subprocess.Popen`."""

    stdin = stdout = stderr = None

    def poll(self) -> int | None:
        """None while it runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return None if self.is_running() and self.status() != psutil.STATUS_ZOMBIE else 0
        return 0


class ForkedKernelManager(AsyncKernelManager):
    """Starts kernels of this Python by forking, where the system can."""

    async def _async_launch_kernel(self, kernel_cmd: list[str], **kw: Any) -> None:
        python, module, name, *arguments = kernel_cmd
        if sys.platform != "linux" or (python, module, name) != (sys.executable, "-m", "ipykernel_launcher"):
            return await super()._async_launch_kernel(kernel_cmd, **kw)
        folder = str(kw.get("cwd") or Path.cwd())
        process = _fork({"arguments": arguments, "folder": folder, "environment": kw["env"]})
        vars(self.provisioner).update(process=process, pid=process.pid, pgid=process.pid, cwd=folder)
        return None

    _launch_kernel = _async_launch_kernel  # type: ignore[assignment]


def _fork(order: dict[str, Any]) -> ForkedProcess:
    server = _server(os.getpid(), os.environ.get("OMP_NUM_THREADS"))
    if server.stdin is None or server.stdout is None:
        raise ValueError("expected a process with pipes")
    print(json.dumps(order), file=server.stdin, flush=True)
    if not (answer := server.stdout.readline()):
        raise RuntimeError("the process that starts kernels ended; run this again")
    return ForkedProcess(int(answer))


@lru_cache(maxsize=1)
def _server(process: int, threads: str | None) -> subprocess.Popen[str]:
    """The process that forks kernels for a process, and ends with it."""
    return subprocess.Popen(
        [sys.executable, "-m", "kdx.pages.kernels"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for its parent, with which it ends
    )


def serve() -> None:
    """Fork a kernel for each line of standard input, and print its process id; return in the kernels alone."""
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # read when it is imported
    for name in LIBRARIES:
        import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system forgets kernels that ended
    server = os.getpid()
    for line in sys.stdin:
        if process := os.fork():
            print(process, flush=True)
            continue
        order = json.loads(line)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        os.chdir(order["folder"])
        os.environ.clear()
        os.environ.update(order["environment"])
        sys.argv[1:] = [*order["arguments"], f"--IPKernelApp.parent_handle={server}"]
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(2, 1)
        return
    os._exit(0)


if __name__ == "__main__":
    with contextlib.suppress(ValueError):
        sys.path.remove(os.getcwd())
    serve()
    import_module("ipykernel.kernelapp").launch_new_instance()
