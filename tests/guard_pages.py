"""Arrays between pages that may be neither read nor written, and a process that a fault may end."""

import ctypes
import mmap
import os
import traceback


class Region:
    """Pages between two that may be neither read nor written; room for one array at a time."""

    def __init__(self, nbytes):
        self.size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._pages = mmap.mmap(-1, self.size + 2 * mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        self.start = start + mmap.PAGESIZE
        libc = ctypes.CDLL(None, use_errno=True)
        for guard in (start, self.start + self.size):
            assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0

    def place(self, tensor, at_end):
        """Address of a copy that ends with the last byte of the region, or begins with its first."""
        assert tensor.nbytes <= self.size
        address = self.start + (self.size - tensor.nbytes if at_end else 0)
        ctypes.memmove(address, tensor.data_ptr(), tensor.nbytes)
        return address


def in_child(run):
    """The exit code of ``run`` in a fork: a fault ends the process with -SIGSEGV."""
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
