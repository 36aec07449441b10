"""Fault queues of iommufd: the pages that devices ask for, in groups, and the answers that they wait for."""
import errno
import itertools
import os
import threading
import time

from ..._core.errno import error
from ...errors import fits
from ...uapi import iommufd as abi


class Group:
    """Requests of one device that are answered together: (address, perm), the last of them ends the group.

    ``table_pasid`` says whose page table they came through, ``serial`` which attachment of it that was.
    """

    def __init__(self, path, pasid, number, requests, serial, table_pasid):
        self.path = path
        self.pasid = pasid
        self.number = number
        self.requests = requests
        self.serial = serial
        self.table_pasid = table_pasid
        self.code = None

    def gone(self):
        """Whether the device has left the page table that it asked through."""
        try:
            return self.path.fault_queue(self.table_pasid)[1] != self.serial
        except OSError:
            return True

    def records(self, cookie):
        valid = abi.IOMMU_PGFAULT_FLAGS_PASID_VALID if self.pasid else 0
        for i, (address, perm) in enumerate(self.requests):
            last = abi.IOMMU_PGFAULT_FLAGS_LAST_PAGE if i == len(self.requests) - 1 else 0
            yield abi.iommu_hwpt_pgfault.pack(flags=valid | last, dev_id=self.path.id, pasid=self.pasid,
                                              grpid=self.number, perm=perm, addr=address, cookie=cookie)


class FaultQueueFile:
    """What stands behind the descriptor of FAULT_QUEUE_ALLOC; it polls readable while groups wait to be read.

    Source: the event queues of iommufd, Linux 6.12 and 7.2.
    """

    _FAULT, _RESPONSE = abi.iommu_hwpt_pgfault.size, abi.iommu_hwpt_page_response.size

    def __init__(self, iommufd, number):
        self._open = False
        self.event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._open = True
        self.iommufd = iommufd
        self.number = number
        self._waiting = []              # groups that nobody has read
        self._read = {}                 # cookie -> group
        self._delivered = False
        self._lowest_cookie = 1
        self._changed = threading.Condition()

    def __del__(self):
        if self._open:
            os.close(self.event)

    # ---- the devices' side

    def put(self, group):
        """Put a group into the queue."""
        with self._changed:
            self._keep([*self._waiting, group])
            self._drop_gone()                   # the device may have left since it looked

    def answer(self, group, timeout):
        """Wait for the answer to a group; None when the device has waited long enough.

        The group stays: the kernel does not know that nobody waits any more.
        """
        end = time.monotonic() + timeout
        with self._changed:
            while group.code is None and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            return group.code

    def drop_gone(self):
        """Answer INVALID to groups whose device has left its page table."""
        with self._changed:
            self._drop_gone()

    def _drop_gone(self):
        dropped = [group for group in (*self._waiting, *self._read.values()) if group.gone()]
        for group in dropped:
            group.code = abi.IOMMUFD_PAGE_RESP_INVALID
        if dropped:
            self._keep([group for group in self._waiting if group.code is None])
            self._read = {cookie: group for cookie, group in self._read.items() if group.code is None}
            self._changed.notify_all()

    def _keep(self, groups):
        if self._open and bool(groups) != bool(self._waiting):
            if groups:
                os.eventfd_write(self.event, 1)
            else:
                os.eventfd_read(self.event)
        self._waiting = groups

    # ---- the user's side

    def ioctl(self, request, arg):
        raise error(errno.ENOTTY, "fault_queue_ioctl", hint=f"request {request:#x}")

    def pread(self, size, offset):
        raise error(errno.ESPIPE, "fault_queue_read", hint="a fault queue has no positions: read() without an offset")

    def pwrite(self, data, offset):
        raise error(errno.ESPIPE, "fault_queue_write", hint="a fault queue has no positions: write() without an offset")

    def read(self, size):
        """Take whole groups; b"" when none waits."""
        if size % self._FAULT:
            raise error(errno.ESPIPE, "fault_queue_read", size=size, hint=f"a fault has {self._FAULT} bytes")
        taken: list[bytes] = []
        with self._changed:
            while self._waiting and len(self._waiting[0].requests) <= size // self._FAULT - len(taken):
                group = self._waiting[0]
                cookie = next(filter(lambda cookie: cookie not in self._read, itertools.count(self._lowest_cookie)))
                self._read[cookie] = group
                self._delivered = True
                taken += group.records(cookie)
                self._keep(self._waiting[1:])
            if not taken and self._waiting:
                raise error(errno.EINVAL, "fault_queue_read", size=size,
                            hint=f"the first group has {len(self._waiting[0].requests)} faults")
        return b"".join(taken)

    def write(self, data):
        """Answer groups; stops at the first bad answer, whose errno is raised if it is the first of all."""
        if len(data) % self._RESPONSE:
            raise error(errno.ESPIPE, "fault_queue_write", size=len(data),
                        hint=f"a response has {self._RESPONSE} bytes")
        with self._changed:
            for at in range(0, len(data), self._RESPONSE):
                response = abi.iommu_hwpt_page_response.unpack(data[at:at + self._RESPONSE])
                known = response["code"] in (abi.IOMMUFD_PAGE_RESP_SUCCESS, abi.IOMMUFD_PAGE_RESP_INVALID)
                group = self._read.pop(response["cookie"], None) if known else None
                if group is None:
                    if known and response["cookie"] == 0 and self._delivered:
                        self._lowest_cookie = 0     # an answer to nobody, which frees the number in the kernel's table
                    if at:
                        return at
                    raise error(errno.EINVAL, "fault_queue_write", hint="no group with this cookie waits for a response"
                                if known else "the code of a response is SUCCESS (0) or INVALID (1)")
                group.code = response["code"]
                self._changed.notify_all()
        return len(data)

    def closed(self):
        """The last descriptor is closed: nobody can answer, but devices ask and wait while they are attached."""
        with self._changed:
            self._open = False
            os.close(self.event)
        self.iommufd.context.close_fault_queue(self.number)
        self.iommufd.release()


class PageRequester:
    """Asks for the pages that accesses of one device find missing."""

    def __init__(self, iommufd, path, timeout):
        self._iommufd = iommufd
        self._path = path
        self._timeout = timeout
        self._groups = 0

    def request_page(self, pasid, address, perm):
        """An access found a page missing: ask for it.  Whether to try again."""
        return self.request_pages(pasid, [address & ~4095], perm)

    def request_pages(self, pasid, addresses, perm):
        """Ask for pages, in one group; return whether the answer was SUCCESS.  EINVAL: none, or no address."""
        number, serial = self._path.fault_queue(pasid)
        queue = self._iommufd.queues.get(number)
        if queue is None:
            return False
        self._groups += 1
        group = Group(self._path, pasid, self._groups % 512, [(address, perm) for address in addresses], serial,
                      pasid)
        with fits("request_pages"):
            if not list(group.records(1)):
                raise error(errno.EINVAL, "request_pages", hint="a group has at least one page")
        queue.put(group)
        return queue.answer(group, self._timeout) == abi.IOMMUFD_PAGE_RESP_SUCCESS

    def unrecoverable(self, reason, pasid, perm, addr, fetch_addr):
        """The kernel prints such a fault; nobody else is told."""

    def drain(self, pasid=None):
        """Page tables may be gone: the iommufd takes their requests back by itself, in drop_requests()."""
