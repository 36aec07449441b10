"""Vaddr updates of many mappings: backend and table change together, without a step in Python for each mapping."""
from typing import Any

from .table import MappingTable, Row
from .undo import Undo


def invalidate_everything(backend: Any, table: MappingTable) -> int:
    """Invalidate every vaddr; all are valid.  Return the bytes."""
    waiting = table.copy_translations()         # can run out of memory, so it comes first
    size = backend.invalidate_vaddr()
    table.invalidate_all(waiting)
    return size


def update_many(backend: Any, table: MappingTable, entries: Any, keep: Any, undo: Undo) -> None:
    """Give invalid mappings their new addresses, from an (n, 3) array of iova, vaddr, size."""
    everything = table.match_invalid(entries)
    if everything is not None:
        backend.update_vaddr_many(entries)
        undo.append((backend.invalidate_vaddr,))
        table.restore_all(everything, keep)
        return
    old, new = [], []
    for iova, vaddr, size in entries.tolist():
        row = table.waiting("update_vaddr", iova, size)
        old.append(row)
        new.append(row._replace(vaddr=vaddr, keeper=keep))
    backend.update_vaddr_many(entries)
    for row in new:
        undo.append((backend.invalidate_vaddr, row.iova, row.size))
    restore(table, old, new, undo)


def restore(table: MappingTable, old: list[Row], new: list[Row], undo: Undo) -> None:
    """Enter the new vaddrs of invalid mappings, which the backend has already."""
    for before, row in zip(old, new, strict=True):
        undo.append((table.invalidate, row, before.vaddr))
        table.restore(row)
