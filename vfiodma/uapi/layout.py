"""Declare a C structure in one string; pack, unpack and view it through ``struct`` or NumPy.

A declaration names every field with its offset, as a table in a manual would::

    vfio_bitmap = Layout("vfio_bitmap", 24, "0:u64 pgsize; 8:u64 size; 16:ptr data")

Types are u8 u16 u32 u64 s32 le64 ptr, the name of a Layout declared before, or ``union``.  ``u8[6]`` is an array and
``u8[]`` a flexible one.  ``|`` before a type marks a member of a union: of the unnamed one at that offset, or of
``granu`` when the field is called ``granu.addr_info``.  Byte order and sizes are those of 64-bit Linux: native order,
8-byte pointers, le64 always little-endian.
"""
from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import numpy as np

_T = TypeVar("_T")


# type -> (struct format with byte order, size, numpy format)
_SCALARS = {
    "u8": ("=B", 1, "u1"), "u16": ("=H", 2, "=u2"), "u32": ("=I", 4, "=u4"), "u64": ("=Q", 8, "=u8"),
    "s32": ("=i", 4, "=i4"), "le64": ("<Q", 8, "<u8"), "ptr": ("=Q", 8, "=u8"),
}
_declared: dict[str, Layout] = {}


def io(type: int, nr: int) -> int:
    """Number of an ioctl without direction and size, the only kind VFIO and iommufd have."""
    return type << 8 | nr


def at_kernel(kernel: str, older: Mapping[str, _T], newest: _T) -> _T:
    """Choose what a kernel has: the first of ``older``, keyed by the last kernel known to have it, that reaches it.

    ``kernel`` is "major.minor", for example "6.12".
    """
    asked = _version(kernel)
    for last in sorted(older, key=_version):
        if asked <= _version(last):
            return older[last]
    return newest


def _version(kernel: str) -> tuple[int, ...]:
    return tuple(map(int, kernel.split(".")))


class Field(NamedTuple):
    """One member: offset and sizes in bytes, type as declared (``u32``, ``struct vfio_bitmap``, ``union``).

    ``length`` and ``element_size`` describe an array; a flexible one has size 0 and length 0.
    """

    name: str
    offset: int
    size: int
    type: str
    length: int | None = None       # of an array, in elements
    element_size: int = 0
    flexible: bool = False
    union_member: bool = False

    def _get(self, buffer, start: int, count: int | None):
        if self.length is None:
            return self._get_one(buffer, start)
        n = (count or 0) if self.flexible else self.length
        if self.type == "u8":
            return struct.unpack_from(f"{n}s", buffer, start)[0]
        return tuple(self._get_one(buffer, start + i * self.element_size) for i in range(n))

    def _get_one(self, buffer, start: int):
        if self.type in _SCALARS:
            return struct.unpack_from(_SCALARS[self.type][0], buffer, start)[0]
        return _declared[self.type.removeprefix("struct ")].unpack_from(buffer, start)

    def _put(self, buffer, start: int, value) -> None:
        if self.length is None:
            self._put_one(buffer, start, value)
            return
        if not self.flexible and len(value) != self.length:
            raise ValueError(f"{self.name} takes {self.length} elements, not {len(value)}")
        for i, element in enumerate(value):
            self._put_one(buffer, start + i * self.element_size, element)

    def _put_one(self, buffer, start: int, value) -> None:
        if self.type in _SCALARS:
            struct.pack_into(_SCALARS[self.type][0], buffer, start, value)
        else:
            _declared[self.type.removeprefix("struct ")].pack_into(buffer, start, **value)


class Layout:
    """A structure of the kernel's ABI.

    Parameters
    ----------
    name : str
        As the kernel calls it.
    size : int
        ``sizeof`` in bytes, without a flexible array.
    fields : str
        ``offset:type name`` separated by semicolons; see the module.
    minimum : int, optional
        Smallest ``size`` the newest kernel accepts (iommufd); ``size`` when not given.
    older : mapping of str to (int, str), optional
        Size and fields of earlier forms, by the last kernel known to have them.

    Notes
    -----
    Values are plain: int, bytes (u8 arrays), tuple (other arrays), dict (structures and named unions).
    Source: uapi sections 2-7.
    """

    def __init__(self, name: str, size: int, fields: str, *, minimum: int | None = None,
                 older: Mapping[str, tuple[int, str]] | None = None):
        self.name, self.size, self.minimum = name, size, minimum or size
        self.older = {kernel: Layout(f"{name} ({kernel})", *form) for kernel, form in (older or {}).items()}
        parsed = [_parse(text) for text in fields.split(";")]
        for i, field in enumerate(parsed):
            if field.type == "union":       # as large as its largest member
                size = max(m.size for m in parsed if m.name.startswith(field.name + "."))
                parsed[i] = field._replace(size=size, element_size=size)
        self.fields = tuple(parsed)
        self._by_name = {f.name: f for f in self.fields}
        _declared[name] = self

    def __repr__(self) -> str:
        return f"<Layout {self.name}, {self.size} bytes>"

    def __getitem__(self, name: str) -> Field:
        return self._by_name[name]

    @property
    def flexible(self) -> Field | None:
        """The flexible array at the end, if there is one."""
        return self.fields[-1] if self.fields[-1].flexible else None

    def at(self, kernel: str) -> Layout:
        """Return the form of ``kernel`` ("6.12"): the newest, or an older one where the layout has changed since."""
        return at_kernel(kernel, self.older, self)

    def pack(self, **values: Any) -> bytes:
        """Return the structure as bytes, 0 where no value is given; a flexible array is appended.

        Raises TypeError for an unknown field, ValueError for two members of one union or an array of the wrong
        length, ``struct.error`` for a number that does not fit.
        """
        if self._scalar_set.issuperset(values):
            return self._scalars.pack(*[values.get(name, 0) for name in self._scalar_names])
        tail = self.flexible
        extra = len(values[tail.name]) * tail.element_size if tail and tail.name in values else 0
        buffer = bytearray(self.size + extra)
        self.pack_into(buffer, **values)
        return bytes(buffer)

    def pack_into(self, buffer, offset: int = 0, /, **values: Any) -> None:
        """Write the given fields at ``offset`` of a writable buffer and leave every other byte alone."""
        used: set[int] = set()
        for name, value in values.items():
            field = self._by_name.get(name)
            if field is None or "." in name:
                raise TypeError(f"{self.name} has no field {name!r}")
            if field.union_member:
                self._claim(field, used)
            if field.type != "union":
                field._put(buffer, offset + field.offset, value)
                continue
            for member_name, member_value in value.items():
                member = self._by_name.get(f"{name}.{member_name}")
                if member is None:
                    raise TypeError(f"{self.name}.{name} has no member {member_name!r}")
                self._claim(member, used)
                member._put(buffer, offset + member.offset, member_value)

    def _claim(self, member: Field, used: set[int]) -> None:
        if member.offset in used:
            raise ValueError(f"{self.name}: {member.name} shares its bytes with another value that is given")
        used.add(member.offset)

    def unpack(self, buffer, count: int | None = None) -> dict[str, Any]:
        """Same as ``unpack_from`` at offset 0."""
        return self.unpack_from(buffer, 0, count)

    def unpack_from(self, buffer, offset: int = 0, count: int | None = None) -> dict[str, Any]:
        """Read the structure at ``offset`` of a buffer, with every union member and ``count`` flexible elements.

        Raises ``struct.error`` when the buffer is too short.
        """
        result = dict(zip(self._scalar_names, self._scalars.unpack_from(buffer, offset), strict=True))
        for field in self._compound:
            if field.type == "union":
                result[field.name] = {}
                continue
            outer, _, name = field.name.rpartition(".")
            (result[outer] if outer else result)[name] = field._get(buffer, offset + field.offset, count)
        return result

    # Plain numbers are read in one go; what remains is read field by field.

    @cached_property
    def _plain(self) -> tuple[Field, ...]:
        return tuple(f for f in self.fields if f.type in _SCALARS and f.type != "le64" and f.length is None
                     and not f.union_member)

    @cached_property
    def _compound(self) -> tuple[Field, ...]:
        return tuple(f for f in self.fields if f not in self._plain)

    @cached_property
    def _scalar_names(self) -> tuple[str, ...]:
        return tuple(f.name for f in self._plain)

    @cached_property
    def _scalar_set(self) -> frozenset[str]:
        return frozenset(self._scalar_names)

    @cached_property
    def _scalars(self) -> struct.Struct:
        form, end = "=", 0
        for f in self._plain:
            form += f"{f.offset - end}x{_SCALARS[f.type][0][1]}"
            end = f.offset + f.size
        return struct.Struct(form + f"{self.size - end}x")

    @cached_property
    def dtype(self) -> np.dtype:
        """NumPy structured dtype of ``size`` bytes; union members overlap, a flexible array is left out."""
        import numpy as np

        fields = [f for f in self.fields if not f.flexible and f.type != "union"]
        formats = [_numpy_format(f) for f in fields]
        return np.dtype({"names": [f.name for f in fields], "formats": formats,
                         "offsets": [f.offset for f in fields], "itemsize": self.size})


def _parse(text: str) -> Field:
    try:
        place, rest = text.split(":")
        kind, name = rest.split()
        member = kind.startswith("|")
        kind, _, length = kind.removeprefix("|").partition("[")
        array = length.removesuffix("]") if length else None
        if kind == "union":
            return Field(name, int(place), 0, "union")
        element = _SCALARS[kind][1] if kind in _SCALARS else _declared[kind].size
    except (ValueError, KeyError) as error:
        raise ValueError(f"bad field {text.strip()!r}: {error}") from None
    shown = kind if kind in _SCALARS else f"struct {kind}"
    if array is None:
        return Field(name, int(place), element, shown, None, element, False, member)
    elements = int(array or 0)
    return Field(name, int(place), element * elements, shown, elements, element, not array, member)


def _numpy_format(field: Field):
    base = _SCALARS[field.type][2] if field.type in _SCALARS else _declared[field.type.removeprefix("struct ")].dtype
    return base if field.length is None else (base, (field.length,))
