"""A descriptor that is closed while another thread is in an ioctl of it: its number is nobody else's until then."""
import errno
import fcntl
import os
import struct
import termios
import threading

import numpy as np
import pytest

from vfiodma import DirtyBitmap, GuestMemory
from vfiodma._core.kernel import Descriptor
from vfiodma._core.userfault import MissingPages
from vfiodma.errors import ClosedError, DmaPermissionError, UnsupportedError


def is_open(fd):
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError as exc:
        assert exc.errno == errno.EBADF
        return False
    return True


def test_the_number_of_a_closed_descriptor_is_not_given_away_while_an_ioctl_is_in_flight():
    """The kernel stands still where it writes the result: the page of the argument is missing."""
    with GuestMemory.memfd(4096) as memory:
        missing = DirtyBitmap(1)
        missing.set(0, 1)
        try:
            pages = MissingPages(memory.region.vaddr, 4096, missing)
        except (DmaPermissionError, UnsupportedError) as exc:
            pytest.skip(str(exc))
        read, write = os.pipe()
        os.write(write, b"seven..")
        descriptor, results = Descriptor(None, read), []

        def ask():
            results.append(descriptor.ioctl(termios.FIONREAD, memory.region.vaddr))

        thread = threading.Thread(target=ask)
        thread.start()
        assert pages.next(10) == [0]
        descriptor.close()
        descriptor.close()
        assert descriptor.fd == -1 and is_open(read)
        with pytest.raises(ClosedError):
            descriptor.ioctl(termios.FIONREAD, memory.region.vaddr)
        other = os.memfd_create("other")
        assert other != read
        pages.place(np.array([[0, 1]], np.uint64), bytes(4096))
        thread.join(10)
        assert results == [0] and struct.unpack("i", memory.read(0, 4)) == (7,)
        assert not is_open(read) and is_open(other)
        for fd in (other, write):
            os.close(fd)
        pages.close(abandon=True)
