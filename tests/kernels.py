"""Kernels for tests, forked from one process that has imported the libraries of pages: seconds less for each.

``kernels.py ADDRESS`` is that process; ``kernels.py ADDRESS ARGUMENTS`` is ``python -m ipykernel_launcher ARGUMENTS``
in a fork of it. It imports no code of kdx, which pages read anew.
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
from importlib import import_module

LIBRARIES = ("torch", "torchvision", "pandas", "scipy.stats", "IPython", "ipykernel.kernelapp", "ipykernel.ipkernel")
KIND = (socket.AF_UNIX, socket.SOCK_SEQPACKET)


@contextlib.contextmanager
def forked_kernels(folder):
    """Every kernel that is started meanwhile is a fork."""
    address, home = folder / "socket", folder / "kernels" / "python3"
    home.mkdir(parents=True)
    argv = [sys.executable, __file__, str(address), "-f", "{connection_file}"]
    (home / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    before = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(folder), before]))
    server = subprocess.Popen([sys.executable, __file__, str(address)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    server.stdout.readline()
    yield
    server.kill()
    os.environ.pop("JUPYTER_PATH") if before is None else os.environ.update(JUPYTER_PATH=before)


def ask(address, *arguments):
    """Have a kernel run with this process's folder, environment and files; end as it ends, or with the parent."""
    connection = socket.socket(*KIND)
    connection.connect(address)
    order = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    socket.send_fds(connection, [json.dumps(order).encode()], [0, 1, 2])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: connection.send(bytes([number])))
    connection.settimeout(1)
    parent = os.getppid()
    while os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            sys.exit(int(connection.recv(16)) % 256)


def serve(address):
    """Answer every :func:`ask` until the parent ends; return in the processes that are to be kernels."""
    for name in LIBRARIES:
        import_module(name)
    gc.freeze()
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
    listener = socket.socket(*KIND)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        message, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
        if not (kernel := os.fork()):
            connection.close()
            return become(json.loads(message), files)
        threading.Thread(target=forward, args=(connection, os.pidfd_open(kernel)), daemon=True).start()
        connection.send(str(os.waitstatus_to_exitcode(os.waitpid(kernel, 0)[1])).encode())
        os._exit(0)


def forward(connection, kernel):
    """Pass signals on; kill the kernel where whoever asked is gone."""
    with contextlib.suppress(ProcessLookupError):
        while message := connection.recv(1):
            signal.pidfd_send_signal(kernel, message[0])
        signal.pidfd_send_signal(kernel, signal.SIGKILL)


def become(order, files):
    """Take over what a process of its own would have begun with."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.setsid()
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.modules["torch"].set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    sys.path[:1] = [order["folder"], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv[1:] = order["arguments"]


if __name__ == "__main__":
    if sys.argv[2:]:
        ask(*sys.argv[1:])
    else:
        serve(sys.argv[1])
        runpy.run_module("ipykernel_launcher", run_name="__main__", alter_sys=True)
        atexit._run_exitfuncs()
        os._exit(0)  # the rest of an ordinary end takes seconds after torch was imported
