"""Pickles of pairs, read without running anything that is in them.

    (images, same)    2P encoded images and P booleans, as `pickle.dump` of Python 2 or 3 left them, at any protocol

A pickle is a program: it names functions and calls them. Here the names are looked up in a list of eleven, which stand for what Python
and NumPy write for bytes, booleans and arrays; each stands for a maker of an inert record, never for the function itself, so that a shape
of 10^15 in an array is a number and no memory. Any other name is refused. Before that, the operations are read through once, without
running them: what is cut short, an operation that finds objects in the process without naming them, or a memo index beyond the file's own
operations (of which the interpreter would make a table) is refused. So is a program that copies more than the file is long: what one
holds is written in it once, and a short one that copies its longest element again and again would fill the memory.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable, Iterator
from typing import Any

OPERATIONS = {operation.code.encode("latin1"): operation for operation in pickletools.opcodes}
FORBIDDEN = frozenset({"EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER", "READONLY_BUFFER"})
BYTE_ARRAYS, BOOLEANS = ("u1", "uint8", "i1", "int8"), ("b1", "bool")
MAX_CODE = 16  # characters of the name of an array's type


class Refused(pickle.UnpicklingError):
    """Something in a pickle that no list of images and booleans has."""


class _Limit:
    """How many bytes and elements may be copied yet."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise Refused("it copies more than the file is long")


class _Maker:
    """What a permitted name stands for: a call of it makes a record. Nothing can be set on it."""

    __slots__ = ("_limit", "_make", "_name")

    def __init__(self, name: str, make: Callable[..., Any], limit: _Limit) -> None:
        self._name, self._make, self._limit = name, make, limit

    def __call__(self, *arguments: Any) -> Any:
        try:
            made = self._make(*arguments)
        except (TypeError, ValueError) as error:
            raise Refused(f"{self._name} is called with other arguments than images and booleans have") from error
        if isinstance(made, bytes | list) and all(made is not argument for argument in arguments):
            self._limit.take(len(made))
        return made

    def __setstate__(self, state: Any) -> None:
        raise Refused(f"{self._name} is given a state")


class _Dtype:
    """The name of an array's type."""

    __slots__ = ("code",)

    def __init__(self, code: Any, *_: Any) -> None:
        if len(code) > MAX_CODE:
            raise TypeError("no type of NumPy")
        self.code = _text(code).lstrip("<>|=")

    def __setstate__(self, state: Any) -> None:
        """Byte order and fields: of single bytes there is one order and there are no fields."""


class _Array:
    """An array as it was pickled: shape, type, and its bytes (or, of type object, its list)."""

    __slots__ = ("dtype", "raw", "shape")

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.dtype: _Dtype | None = None
        self.raw: Any = b""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or not 4 <= len(state) <= 5:
            raise Refused("an array has a state that NumPy does not write")
        self.shape, self.dtype, _, self.raw = state[-4:]


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("ascii")
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """`_codecs.encode`: how bytes are written below protocol 3."""
    if _text(encoding).replace("-", "").lower() != "latin1" or not isinstance(text, str):
        raise ValueError("not latin1")
    return text.encode("latin1")


def _bytes(*arguments: Any) -> bytes:
    """`bytes` and `bytearray` of nothing, of bytes, or of latin1 text; of a number they would take so much memory."""
    if not arguments:
        return b""
    if len(arguments) == 1 and isinstance(arguments[0], bytes | bytearray):
        return bytes(arguments[0])
    return _encode(*arguments)


def _list(*arguments: Any) -> list[Any]:
    if arguments and not isinstance(arguments[0], list | tuple):
        raise TypeError("no list")
    return list(*arguments)


def _bool(value: Any = False) -> bool:
    if not isinstance(value, int):
        raise TypeError("no boolean")
    return bool(value)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> _Array:
    array = _Array()
    array.__setstate__((shape, dtype, False, raw))
    return array


def _scalar(dtype: Any, raw: Any = b"") -> _Array:
    return _from_buffer(raw, dtype, ())


def _permitted(limit: _Limit) -> dict[tuple[str, str], Any]:
    """What stands for each name that a pickle may ask for."""
    makers: dict[tuple[str, str], Callable[..., Any]] = {("_codecs", "encode"): _encode, ("numpy", "dtype"): _Dtype}
    for module in ("builtins", "__builtin__"):
        makers |= {
            (module, "bytes"): _bytes,
            (module, "bytearray"): _bytes,
            (module, "list"): _list,
            (module, "bool"): _bool,
        }
    for module in ("numpy.core", "numpy._core"):
        makers |= {
            (f"{module}.multiarray", "_reconstruct"): _reconstruct,
            (f"{module}.multiarray", "scalar"): _scalar,
            (f"{module}.numeric", "_frombuffer"): _from_buffer,
        }
    return {key: _Maker(".".join(key), make, limit) for key, make in makers.items()} | {("numpy", "ndarray"): "ndarray"}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._permitted = _permitted(_Limit(len(data)))

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._permitted[module, name]
        except KeyError:
            raise Refused(f"it asks for {module}.{name}, which no list of images and booleans needs") from None


def load_pairs(data: bytes) -> tuple[list[bytes | None], list[bool]]:
    """(encoded images, None for an element that is none; same) of the pickle `data`. ValueError that says what is wrong with it."""
    try:
        _read_through(data)
        found = _Unpickler(data).load()
    except Refused as error:
        raise ValueError(f"is refused: {error}; nothing of it was run") from error
    except Exception as error:  # a damaged program stumbles anywhere: EOFError, IndexError, KeyError, MemoryError ...
        raise ValueError(
            f"is truncated or no pickle ({' '.join(str(error).split()) or type(error).__name__})"
        ) from error
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise ValueError("holds something else than (images, same): a pair of lists")
    images, same = _elements(found[0], "images"), _elements(found[1], "booleans")
    if len(images) != 2 * len(same):
        raise ValueError(
            f"has {len(images)} images and {len(same)} booleans; there must be two images for each boolean"
        )
    booleans = [_boolean(value) for value in same]
    if None in booleans:
        raise ValueError(f"has something else than a boolean at position {booleans.index(None)} of the second list")
    encoded = [_encoded(value) for value in images]
    once = {
        id(value): None if value is None else bytes(value) for value in encoded
    }  # many elements may be one bytearray
    return [once[id(value)] for value in encoded], [value is True for value in booleans]


def _read_through(data: bytes) -> None:
    """Refused for what must not be run at all."""
    for count, (name, argument) in enumerate(_operations(data)):
        if name in FORBIDDEN:
            raise Refused(f"it has the operation {name}, which no list of images and booleans needs")
        if name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > count + 1:
            raise Refused(f"it counts to {argument} after {count} operations")


def _operations(data: bytes) -> Iterator[tuple[str, Any]]:
    """(name, argument) of each, as `pickletools.genops` gives them, which takes the strings of Python 2's protocol 0 for ASCII."""
    stream = io.BytesIO(data)
    name = ""
    while name != "STOP":
        code = stream.read(1)
        if code not in OPERATIONS:
            raise ValueError(f"there is no operation {code!r}" if code else "it has no end")
        operation = OPERATIONS[code]
        name = operation.name
        if name != "STRING":
            yield name, operation.arg.reader(stream) if operation.arg is not None else None
        elif stream.readline().endswith(b"\n"):  # in quotes and with escapes, which the unpickler checks and undoes
            yield name, None
        else:
            raise ValueError("a string has no end")


def _elements(value: Any, what: str) -> list[Any]:
    """A list, a tuple, or an array of objects or booleans, as a list."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, _Array) and isinstance(value.dtype, _Dtype):
        if value.dtype.code.startswith("O") and isinstance(value.raw, list):
            return value.raw
        if value.dtype.code in BOOLEANS and isinstance(value.raw, bytes | bytearray):
            return [byte != 0 for byte in value.raw]
    raise ValueError(f"has no list of {what}")


def _boolean(value: Any) -> bool | None:
    if (
        isinstance(value, _Array)
        and isinstance(value.dtype, _Dtype)
        and value.dtype.code in BOOLEANS
        and value.raw in (b"\0", b"\1")
    ):
        return bool(value.raw == b"\1")
    return bool(value) if isinstance(value, int) and value in (0, 1) else None


def _encoded(value: Any) -> bytes | bytearray | None:
    """The bytes of one image: bytes, or an array of them as `cv2.imencode` gives."""
    if isinstance(value, _Array) and isinstance(value.dtype, _Dtype) and value.dtype.code in BYTE_ARRAYS:
        sizes = (
            value.shape if isinstance(value.shape, tuple) and all(isinstance(n, int) for n in value.shape) else (-1,)
        )
        value = value.raw if isinstance(value.raw, bytes | bytearray) and math.prod(sizes) == len(value.raw) else None
    return value if isinstance(value, bytes | bytearray) else None
