"""Files of dirty traces: Parquet where pyarrow is there, else JSON lines; docs/traces.md has both formats."""
import contextlib
import errno
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._core.errno import error
from ..errors import MissingExtraError, VfioError
from .trace import Trace

VERSION = 1
_KEY = "vfiodma_trace"
_MAGIC = b"PAR1"


def _damaged(path: Path, why: str) -> VfioError:
    return error(errno.EBADMSG, "read_trace", hint=f"{path}: {why}; record it again, or copy it again from where it is "
                 "whole")


def write_trace(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a trace: as Parquet where the name ends so, else as JSON lines.

    The file appears under its name only when it is complete.

    Raises
    ------
    MissingExtraError
        Parquet without pyarrow: extra "trace".
    VfioError
        It can't be written: ENOSPC, EACCES, ... of the file system.  What had the name before still has it.
    """
    path = Path(path)
    write = _write_parquet if path.suffix == ".parquet" else _write_lines
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(trace, part)
        os.replace(part, path)
    except OSError as exc:
        raise VfioError(exc.errno or errno.EIO, exc.strerror, operation="write_trace", hint=f"{path} is as it was"
                        ) from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace of either format.

    Raises
    ------
    ProtocolError
        EBADMSG: damaged, incomplete, or not a trace; EPROTO: of a later version.
    MissingExtraError
        Parquet without pyarrow: extra "trace".
    OSError
        It can't be read.
    """
    path = Path(path)
    with open(path, "rb") as file:
        parquet = file.read(len(_MAGIC)) == _MAGIC
    header, times, offsets, runs = (_read_parquet if parquet else _read_lines)(path)
    try:
        return Trace(header["pgsize"], header["blocks"], times, offsets, runs)
    except VfioError as exc:
        raise _damaged(path, exc.hint) from None
    except (KeyError, TypeError, ValueError, OverflowError):
        raise _damaged(path, "its header makes no sense") from None


def _header(trace: Trace) -> dict[str, Any]:
    return {_KEY: VERSION, "pgsize": trace.pgsize, "blocks": trace.blocks}


def _check_header(header: Any, path: Path) -> dict[str, Any]:
    if not isinstance(header, dict) or not isinstance(header.get(_KEY), int):
        raise _damaged(path, "it is not a dirty trace")
    if header[_KEY] != VERSION:
        raise error(errno.EPROTO, "read_trace", hint=f"{path}: version {header[_KEY]}, this vfiodma reads {VERSION}: "
                    "update it")
    numbers = [header.get("pgsize")]
    blocks = header.get("blocks")
    for block in blocks if isinstance(blocks, list) else [None]:
        numbers += block if isinstance(block, list) and len(block) == 2 else [None]
    if not all(type(number) is int for number in numbers):
        raise _damaged(path, "its header makes no sense")
    return header


# JSON lines: the header, [time, [block, first, npages, ...]] for each interval, {"intervals": n}

def _write_lines(trace: Trace, path: Path) -> None:
    with open(path, "w") as file:
        def line(value: Any) -> None:
            file.write(json.dumps(value, separators=(",", ":")) + "\n")

        line(_header(trace))
        for index, at in enumerate(trace.times.tolist()):
            line([at, trace.runs[trace.offsets[index]:trace.offsets[index + 1]].ravel().tolist()])
        line({"intervals": len(trace)})


def _read_lines(path: Path) -> tuple[dict[str, Any], Any, Any, Any]:
    import numpy as np

    header: dict[str, Any] | None = None
    times: list[float] = []
    offsets, runs, complete = [0], [np.empty(0, np.int64)], False
    for number, value in _values(path):
        if header is None:
            header = _check_header(value, path)
        elif complete:
            raise _damaged(path, f"line {number} comes after the end")
        elif isinstance(value, dict):
            complete = value == {"intervals": len(times)}
            if not complete:
                raise _damaged(path, f"line {number} is not the end of {len(times)} intervals")
        else:
            at, numbers = _interval(value, path, number)
            times.append(at)
            runs.append(numbers)
            offsets.append(offsets[-1] + len(numbers) // 3)
    if header is None or not complete:
        raise _damaged(path, "it ends too early")
    return header, times, offsets, np.concatenate(runs)


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                why = f"line {number} is not JSON" if number > 1 else "it is not a dirty trace"
                raise _damaged(path, why) from None


def _interval(value: Any, path: Path, number: int) -> tuple[float, Any]:
    import numpy as np

    if isinstance(value, list) and len(value) == 2 and type(value[0]) in (int, float) and isinstance(value[1], list):
        try:
            at, numbers = float(value[0]), np.array(value[1] or np.empty(0, np.int64))
        except (ValueError, OverflowError):
            pass
        else:
            if numbers.dtype == np.int64 and numbers.ndim == 1 and len(numbers) % 3 == 0:
                return at, numbers
    raise _damaged(path, f"line {number} is not an interval")


# Parquet: a row for each interval, the runs as lists, the header in the metadata

def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise MissingExtraError("pyarrow", "trace") from None


def _write_parquet(trace: Trace, path: Path) -> None:
    import numpy as np

    pa, parquet = _pyarrow()
    lists = [pa.LargeListArray.from_arrays(trace.offsets, np.ascontiguousarray(trace.runs[:, column]))
             for column in range(3)]
    table = pa.table([pa.array(trace.times), *lists], names=["time", "block", "first", "npages"],
                     metadata={_KEY: json.dumps(_header(trace))})
    parquet.write_table(table, path, compression="zstd")


def _read_parquet(path: Path) -> tuple[dict[str, Any], Any, Any, Any]:
    import numpy as np

    pa, parquet = _pyarrow()
    try:
        table = parquet.read_table(path, partitioning=None)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as exc:
        if isinstance(exc, OSError) and exc.errno:
            raise
        raise _damaged(path, f"pyarrow can't read it ({str(exc).splitlines()[0][:200]})") from None
    try:
        header = json.loads((table.schema.metadata or {}).get(_KEY.encode(), b"null"))
    except ValueError:
        header = None
    header = _check_header(header, path)
    try:
        times = table.column("time").combine_chunks()
        lists = [table.column(name).combine_chunks() for name in ("block", "first", "npages")]
        if any(column.null_count for column in (times, *lists)):
            raise ValueError
        lengths = [column.value_lengths().to_numpy(zero_copy_only=False) for column in lists]
        runs = [column.flatten().to_numpy(zero_copy_only=False) for column in lists]
        if times.type != pa.float64() or any(part.dtype != np.int64 for part in runs) or \
                any((length != lengths[0]).any() for length in lengths):
            raise ValueError
    except (pa.ArrowException, KeyError, ValueError, AttributeError):
        raise _damaged(path, "its columns are not time, block, first and npages of one length") from None
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[0], dtype=np.int64)])
    return header, times.to_numpy(zero_copy_only=False), offsets, np.column_stack(runs)
