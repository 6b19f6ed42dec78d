"""Kernels that start at once: they are forked from a process that has imported what pages import."""

import os

from jupyter_client import AsyncKernelManager
from warm_processes import started


def _become_kernel(connection_file, folder):
    "Run in the forked process: a kernel, in the folder of its page."
    import matplotlib
    from ipykernel.kernelapp import IPKernelApp

    os.chdir(folder)
    matplotlib.use("module://matplotlib_inline.backend_inline")
    ends_with_parent = f"--IPKernelApp.parent_handle={os.getppid()}"
    quietly = "--IPKernelApp.log_level=ERROR"
    IPKernelApp.launch_instance(argv=["-f", connection_file, ends_with_parent, quietly])


class WarmKernelManager(AsyncKernelManager):
    "Starts a kernel by forking; for `nbclient.NotebookClient`."

    _process = None

    async def start_kernel(self, *, cwd=None, env=None, **_):
        self.write_connection_file()
        folder = cwd or os.getcwd()
        self._process = started(
            _become_kernel, self.connection_file, folder, environment=env
        )

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
