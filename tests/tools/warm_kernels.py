"""Kernels that start at once: they are forked from a process that has imported what pages import."""

import multiprocessing
import os

from jupyter_client import AsyncKernelManager

# Without pyplot: it has to find the notebook's shell when it is first imported.
IMPORTED_ONCE = [
    "torch",
    "transformers",
    "peft",
    "datasets",
    "pandas",
    "ipywidgets",
    "ipykernel.kernelapp",
    "matplotlib.backends.backend_agg",
    "ressa.models.bundled",
    "ressa.adaptation.repair",
]
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(IMPORTED_ONCE)


def _become_kernel(connection_file, folder, environment):
    "Run in the forked process: a kernel, in the folder of its page."
    import random

    import matplotlib
    import numpy
    import torch
    from ipykernel.kernelapp import IPKernelApp

    os.environ.update(environment)
    os.chdir(folder)
    # A fork inherits its parent's random numbers. In a new process they are new, and a
    # page that forgets to seed has to show it.
    random.seed()
    numpy.random.seed()
    torch.seed()
    matplotlib.use("module://matplotlib_inline.backend_inline")
    ends_with_parent = f"--IPKernelApp.parent_handle={os.getppid()}"
    quietly = "--IPKernelApp.log_level=ERROR"
    IPKernelApp.launch_instance(argv=["-f", connection_file, ends_with_parent, quietly])


class WarmKernelManager(AsyncKernelManager):
    "Starts a kernel by forking; for `nbclient.NotebookClient`."

    _process = None

    async def start_kernel(self, *, cwd=None, env=None, **_):
        self.write_connection_file()
        arguments = (self.connection_file, cwd or os.getcwd(), env or {})
        self._process = _forks.Process(target=_become_kernel, args=arguments)
        self._process.start()

    @property
    def has_kernel(self):
        return self._process is not None

    async def is_alive(self):
        return self.has_kernel and self._process.is_alive()

    _async_is_alive = is_alive  # what its client calls

    async def interrupt_kernel(self):
        os.kill(self._process.pid, 2)

    async def shutdown_kernel(self, now=False, restart=False):
        self._process.terminate()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = None

    async def cleanup_resources(self, restart=False):
        self.cleanup_connection_file()
