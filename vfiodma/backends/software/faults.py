"""The fault queue of a software device: what its accesses with a PASID could not do, and the pages it asks for."""
import errno
import os
import threading
import time
from collections import deque
from typing import Any, NamedTuple

from ..._core.errno import error
from ...errors import fits
from ...uapi import iommu as abi

_MOST = 4096            # records that nobody has read yet
_GROUPS = 512           # 9 bits of a page request


def _record(kind: int, body: bytes) -> bytes:
    return abi.iommu_fault.pack(type=kind)[:8] + body.ljust(abi.iommu_fault.size - 8, b"\0")


class _Group(NamedTuple):
    """Page requests that wait for an answer."""

    pasid: int
    table: int              # of the PASID when they were made: a number of its own
    deadline: float
    records: list[bytes]


class FaultQueueFile:
    """What stands behind a descriptor of a device's fault queue.

    ``read`` gives records (struct iommu_fault, 64 bytes each), ``write`` takes answers (struct iommu_page_response, 24
    bytes each); the descriptor polls readable while records wait.  An IOMMU reports a fault to nobody when the queue is
    full, and a group of page requests then is invalid.

    Parameters
    ----------
    port : DmaPort
        The device's.
    page_requests : bool
        Whether the device asks for pages that are missing; else such an access is an unrecoverable fault.
    timeout : float
        Seconds that a group waits for its answer.
    """

    def __init__(self, port: Any, page_requests: bool, timeout: float) -> None:
        self.event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.port = port
        self.page_requests = page_requests
        self.timeout = timeout
        self._records: deque[bytes] = deque()
        self._pending: dict[int, _Group] = {}
        self._answers: dict[int, int] = {}
        self._next = 0          # number to try first: one whose time was over is not used again at once
        self._changed = threading.Condition()
        self._open = True
        port.fault_sink = self

    # ---- the device's side

    def _put(self, records: list[bytes]) -> bool:
        if not self._open or len(self._records) + len(records) > _MOST:
            return False
        if not self._records:
            os.eventfd_write(self.event, 1)
        self._records.extend(records)
        return True

    def unrecoverable(self, reason: int, pasid: int, perm: int, addr: int, fetch_addr: int | None) -> None:
        """Report a fault that nobody can repair."""
        flags = abi.IOMMU_FAULT_UNRECOV_PASID_VALID | abi.IOMMU_FAULT_UNRECOV_ADDR_VALID
        if fetch_addr is not None:
            flags |= abi.IOMMU_FAULT_UNRECOV_FETCH_ADDR_VALID
        event = abi.iommu_fault_unrecoverable.pack(reason=reason, flags=flags, pasid=pasid & 0xFFFFFFFF, perm=perm,
                                                   addr=addr, fetch_addr=fetch_addr or 0)
        with self._changed:
            self._put([_record(abi.IOMMU_FAULT_DMA_UNRECOV, event)])

    def request_pages(self, pasid: int, addresses: Any, perm: int, private_data: tuple[int, int] | None = None) -> int:
        """Ask for pages: one group, whose last request is marked.  Return its number.

        Without a page table there is nobody to ask: the group is answered INVALID at once.

        Raises
        ------
        VfioError
            EINVAL: the device was told to stop, or the queue is full.
        """
        addresses = list(addresses)
        flags = abi.IOMMU_FAULT_PAGE_REQUEST_PASID_VALID | abi.IOMMU_FAULT_PAGE_RESPONSE_NEEDS_PASID
        flags |= abi.IOMMU_FAULT_PAGE_REQUEST_PRIV_DATA if private_data else 0
        with self._changed:
            now = time.monotonic()
            self._pending = {group: waits for group, waits in self._pending.items() if waits.deadline > now}
            numbers = ((self._next + i) % _GROUPS for i in range(_GROUPS))
            group = next((number for number in numbers if number not in self._pending), _GROUPS)
            table = self.port.bound(pasid)
            records = []
            for i, address in enumerate(addresses):
                last = abi.IOMMU_FAULT_PAGE_REQUEST_LAST_PAGE if i == len(addresses) - 1 else 0
                with fits("request_pages"):
                    request = abi.iommu_fault_page_request.pack(
                        flags=flags | last, pasid=pasid, grpid=group, perm=perm, addr=address,
                        private_data=private_data or (0, 0))
                records.append(_record(abi.IOMMU_FAULT_PAGE_REQ, request))
            if not self.page_requests or not records or group == _GROUPS or table and not self._put(records):
                raise error(errno.EINVAL, "request_pages", hint="told not to ask, or the queue is full")
            self._next = group + 1
            self._answers.pop(group, None)
            if table:
                self._pending[group] = _Group(pasid, table, now + self.timeout, records)
            else:
                self._answers[group] = abi.IOMMU_PAGE_RESP_INVALID
        return group

    def drain(self, pasid: int | None = None) -> None:
        """End the groups whose table is not bound any more, and all of ``pasid``: INVALID, and nobody reads them."""
        with self._changed:
            for group, waits in list(self._pending.items()):
                if waits.pasid == pasid or self.port.bound(waits.pasid) != waits.table:
                    del self._pending[group]
                    self._answers[group] = abi.IOMMU_PAGE_RESP_INVALID
                    self._drop(waits.records)
            self._changed.notify_all()

    def _drop(self, records: list[bytes]) -> None:
        """Take records back that were not read yet."""
        before, gone = len(self._records), {id(record) for record in records}
        self._records = deque(record for record in self._records if id(record) not in gone)
        if before and not self._records:
            os.eventfd_read(self.event)

    def answer(self, group: int) -> int | None:
        """Wait for a group's answer: an IOMMU_PAGE_RESP_* code; None when its time is over, which ends the group."""
        with self._changed:
            waits = self._pending.get(group)
            while waits is not None and self._pending.get(group) is waits:
                left = waits.deadline - time.monotonic()
                if left <= 0:
                    del self._pending[group]
                    break
                self._changed.wait(left)
            return self._answers.pop(group, None)

    def request_page(self, pasid: int, address: int, perm: int) -> bool:
        """An access found a page missing: ask for it.  Whether to try again."""
        if not self.page_requests:
            return False
        try:
            group = self.request_pages(pasid, [address & ~4095], perm)
        except OSError:
            return False
        return self.answer(group) == abi.IOMMU_PAGE_RESP_SUCCESS

    # ---- the user's side

    def read(self, size: int) -> bytes:
        """Take whole records; b"" when none waits."""
        if size < abi.iommu_fault.size:
            raise error(errno.EINVAL, "read", hint=f"a record has {abi.iommu_fault.size} bytes")
        with self._changed:
            taken = [self._records.popleft() for _ in range(min(size // abi.iommu_fault.size, len(self._records)))]
            if taken and not self._records and self._open:
                os.eventfd_read(self.event)
        return b"".join(taken)

    def write(self, data: bytes) -> int:
        """Answer groups; stops at the first bad answer, whose errno is raised if it is the first of all."""
        size = abi.iommu_page_response.size
        if not data or len(data) % size:
            raise error(errno.EINVAL, "write", hint=f"an answer has {size} bytes")
        for at in range(0, len(data), size):
            try:
                self._respond(abi.iommu_page_response.unpack(data[at:at + size]))
            except OSError:
                if at:
                    return at
                raise
        return len(data)

    def _respond(self, response: Any) -> None:
        # argsz is not looked at, and the code not checked, as in the kernel.
        if response["version"] != abi.IOMMU_PAGE_RESP_VERSION_1 or response["flags"] & ~abi.IOMMU_PAGE_RESP_PASID_VALID:
            raise error(errno.EINVAL, "page_response", hint="version is 1, the only flag PASID_VALID")
        group, now = response["grpid"], time.monotonic()
        with self._changed:
            waits = self._pending.get(group)
            if waits is None or waits.deadline <= now or not response["flags"] or response["pasid"] != waits.pasid:
                raise error(errno.EINVAL, "page_response", hint=f"no group {group} of this PASID waits for an answer")
            del self._pending[group]
            self._answers[group] = response["code"]
            if response["code"] == abi.IOMMU_PAGE_RESP_FAILURE:
                self.page_requests = False
            self._changed.notify_all()

    def closed(self) -> None:
        """The last descriptor is closed: what waits is invalid."""
        with self._changed:
            if self.port.fault_sink is self:
                self.port.fault_sink = None
            self.page_requests = False
            self._answers.update(dict.fromkeys(self._pending, abi.IOMMU_PAGE_RESP_INVALID))
            self._pending.clear()
            self._changed.notify_all()
            os.close(self.event)
            self._open = False
