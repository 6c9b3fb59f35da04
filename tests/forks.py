"""Kernels and workers for tests, forked from one process that has imported their libraries: seconds less for each.

``forks.py ADDRESS`` is that process; ``forks.py ADDRESS MODULE ARGUMENTS`` is ``python -m MODULE ARGUMENTS`` in a fork
of it. It imports no code of kdx, which is read anew.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib import import_module

LIBRARIES = (
    *("torch", "torchvision.transforms.v2", "safetensors.torch", "pandas.io.formats.style", "scipy.stats"),
    *("joblib", "requests", "papermill"),  # not matplotlib, which asks the environment for its backend
    *("IPython", "ipykernel.kernelapp", "ipykernel.ipkernel"),
)
PLACE = "KDX_TEST_FORKS"  # the address, in the environment
KIND = (socket.AF_UNIX, socket.SOCK_SEQPACKET)


def python(module):
    """The command that executes a module: ``python -m``, or a fork."""
    address = os.environ.get(PLACE)
    return [sys.executable, *([__file__, address] if address else ["-m"]), module]


@contextlib.contextmanager
def forks(folder):
    """Meanwhile, every kernel is a fork, and :func:`python` asks for one."""
    import pytest

    address, home = folder / "socket", folder / "kernels" / "python3"
    home.mkdir(parents=True)
    command = [sys.executable, __file__, str(address)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # ends with its input
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PLACE, str(address))
        patch.setenv("JUPYTER_PATH", str(folder), os.pathsep)
        argv = [*python("ipykernel_launcher"), "-f", "{connection_file}"]
        (home / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
        yield
    server.kill()


@contextlib.contextmanager
def own_processes():
    """Meanwhile, they are processes of their own: with a hash seed of their own, and children of who starts them."""
    import pytest

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(PLACE)
        patch.delenv("JUPYTER_PATH")
        yield


def ask(address, module, *arguments):
    """Have the module executed with this folder, environment and files; end as it ends, or as the parent."""
    connection, deadline = socket.socket(*KIND), time.monotonic() + 120
    while connection.connect_ex(address):  # it has not imported the libraries yet
        if time.monotonic() > deadline:
            sys.exit(f"{address}: expected a process that forks others within 120 s; read what it wrote when it ended")
        time.sleep(0.1)
    order = {"module": module, "arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    socket.send_fds(connection, [json.dumps(order).encode()], [0, 1, 2])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: connection.send(bytes([number])))
    connection.settimeout(1)
    parent = os.getppid()
    while os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            sys.exit(int(connection.recv(16)) % 256)


def serve(address):
    """Answer every :func:`ask` until the parent ends; return in the processes that are to execute a module."""
    for name in LIBRARIES:
        import_module(name)
    gc.freeze()
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
    listener = socket.socket(*KIND)
    listener.bind(address)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        message, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
        if not (child := os.fork()):
            connection.close()
            return become(json.loads(message), files)
        threading.Thread(target=forward, args=(connection, os.pidfd_open(child)), daemon=True).start()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(BrokenPipeError):
            connection.send(str(status).encode())
        os._exit(0)


def forward(connection, child):
    """Pass signals on; kill the child where whoever asked is gone."""
    with contextlib.suppress(ProcessLookupError):
        while message := connection.recv(1):
            signal.pidfd_send_signal(child, message[0])
        signal.pidfd_send_signal(child, signal.SIGKILL)


def become(order, files):
    """Take over what a process of its own would have begun with."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.setsid()
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.modules["numpy"].random.seed()  # no fork draws what another draws
    sys.modules["torch"].set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    sys.path[:1] = [order["folder"], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [order["module"], *order["arguments"]]


if __name__ == "__main__":
    if sys.argv[2:]:
        ask(*sys.argv[1:])
    else:
        serve(sys.argv[1])
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(0)  # the rest of an ordinary end takes seconds after torch was imported
