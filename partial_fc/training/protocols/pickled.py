"""Read pickles of image pairs without running any code in them.

    (images, same)    2P encoded images and P booleans, written by `pickle.dump` of Python 2 or 3 at any protocol

A pickle is a program: it names functions and calls them. Three checks make it safe to read one from an unknown source:

1. Before anything runs, all operations are scanned (`_scan`). The pickle is refused if it is truncated, if an operation
   refers to objects of this process without naming them, or if a memo index is larger than the number of operations so
   far (the unpickler would allocate a table of that size).
2. Names are looked up in a short list: those that Python and NumPy write for bytes, booleans and arrays
(`_allowed_names`).
   Each stands for a function of this module that makes an inert record, never for the named function itself. A shape of
   10^15 in an array is therefore a number and allocates nothing. Any other name is refused.
3. What these functions copy is limited to the length of the file (`_CopyLimit`). Otherwise a short program could fill
the
   memory by copying its longest element again and again; a genuine file contains each image once.
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
BYTE_ARRAYS = ("u1", "uint8", "i1", "int8")
BOOLEANS = ("b1", "bool")
MAX_DTYPE_NAME = 16  # characters


class Refused(pickle.UnpicklingError):
    """The pickle contains something that a list of images and booleans never contains."""


class _CopyLimit:
    """The number of bytes and elements that may still be copied."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise Refused("it copies more data than the file contains")


class _Constructor:
    """What an allowed name stands for: calling it makes a record. No attribute of it can be set."""

    __slots__ = ("_limit", "_make", "_name")

    def __init__(self, name: str, make: Callable[..., Any], limit: _CopyLimit) -> None:
        self._name = name
        self._make = make
        self._limit = limit

    def __call__(self, *arguments: Any) -> Any:
        try:
            made = self._make(*arguments)
        except (TypeError, ValueError) as error:
            raise Refused(f"{self._name} is called with arguments that images and booleans never have") from error
        if isinstance(made, bytes | list) and all(made is not argument for argument in arguments):
            self._limit.take(len(made))
        return made

    def __setstate__(self, state: Any) -> None:
        raise Refused(f"{self._name} is given a state")


class _Dtype:
    """The name of an array's dtype."""

    __slots__ = ("code",)

    def __init__(self, code: Any, *_: Any) -> None:
        if len(code) > MAX_DTYPE_NAME:
            raise TypeError("not a dtype of NumPy")
        self.code = _text(code).lstrip("<>|=")

    def __setstate__(self, state: Any) -> None:
        """Ignore byte order and fields: single bytes have neither."""


class _Array:
    """An array as it was pickled: shape, dtype, and its bytes (for dtype object, its list)."""

    __slots__ = ("dtype", "raw", "shape")

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.dtype: _Dtype | None = None
        self.raw: Any = b""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or not 4 <= len(state) <= 5:
            raise Refused("an array has a state that NumPy never writes")
        self.shape, self.dtype, _, self.raw = state[-4:]


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("ascii")
    if not isinstance(value, str):
        raise TypeError("not text")
    return value


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """`_codecs.encode`: how bytes are written below protocol 3."""
    if _text(encoding).replace("-", "").lower() != "latin1" or not isinstance(text, str):
        raise ValueError("not latin1")
    return text.encode("latin1")


def _bytes(*arguments: Any) -> bytes:
    """`bytes` and `bytearray` of nothing, of bytes or of latin1 text; a number would allocate that many bytes."""
    if not arguments:
        return b""
    if len(arguments) == 1 and isinstance(arguments[0], bytes | bytearray):
        return bytes(arguments[0])
    return _encode(*arguments)


def _list(*arguments: Any) -> list[Any]:
    if arguments and not isinstance(arguments[0], list | tuple):
        raise TypeError("not a list")
    return list(*arguments)


def _bool(value: Any = False) -> bool:
    if not isinstance(value, int):
        raise TypeError("not a boolean")
    return bool(value)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> _Array:
    array = _Array()
    array.__setstate__((shape, dtype, False, raw))
    return array


def _scalar(dtype: Any, raw: Any = b"") -> _Array:
    return _from_buffer(raw, dtype, ())


def _allowed_names(limit: _CopyLimit) -> dict[tuple[str, str], Any]:
    """Return what stands for each (module, name) that a pickle may refer to."""
    functions: dict[tuple[str, str], Callable[..., Any]] = {("_codecs", "encode"): _encode, ("numpy", "dtype"): _Dtype}
    for module in ("builtins", "__builtin__"):
        functions |= {
            (module, "bytes"): _bytes,
            (module, "bytearray"): _bytes,
            (module, "list"): _list,
            (module, "bool"): _bool,
        }
    for module in ("numpy.core", "numpy._core"):
        functions |= {
            (f"{module}.multiarray", "_reconstruct"): _reconstruct,
            (f"{module}.multiarray", "scalar"): _scalar,
            (f"{module}.numeric", "_frombuffer"): _from_buffer,
        }
    allowed: dict[tuple[str, str], Any] = {
        key: _Constructor(".".join(key), make, limit) for key, make in functions.items()
    }
    allowed["numpy", "ndarray"] = "ndarray"  # only passed on as an argument
    return allowed


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._allowed = _allowed_names(_CopyLimit(len(data)))

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise Refused(f"it asks for {module}.{name}, which no list of images and booleans needs") from None


def load_pairs(data: bytes) -> tuple[list[bytes | None], list[bool]]:
    """Return (encoded images, same) of the pickle `data`; an element that is not an image is None.

    Raises ValueError for anything else; its text continues a sentence that begins with the file's name.
    """
    try:
        _scan(data)
        content = _Unpickler(data).load()
    except Refused as error:
        raise ValueError(f"is refused: {error}; none of its code was run") from error
    except (
        Exception
    ) as error:  # a damaged pickle can raise nearly anything: EOFError, IndexError, KeyError, MemoryError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"is truncated or is not a pickle ({reason})") from error
    if not isinstance(content, tuple | list) or len(content) != 2:
        raise ValueError("does not contain (images, same), a pair of lists")
    images = _elements(content[0], "images")
    same = _elements(content[1], "booleans")
    if len(images) != 2 * len(same):
        raise ValueError(f"has {len(images)} images and {len(same)} booleans; it must have two images for each boolean")
    booleans = [_boolean(value) for value in same]
    if None in booleans:
        raise ValueError(f"has a value that is not a boolean at position {booleans.index(None)} of the second list")
    encoded = [_encoded(value) for value in images]
    # several elements may be one bytearray: convert it to bytes once
    as_bytes = {id(value): None if value is None else bytes(value) for value in encoded}
    return [as_bytes[id(value)] for value in encoded], [value is True for value in booleans]


def _scan(data: bytes) -> None:
    """Raise Refused for a pickle that must not be run at all."""
    for count, (name, argument) in enumerate(_operations(data)):
        if name in FORBIDDEN:
            raise Refused(f"it has the operation {name}, which no list of images and booleans needs")
        if name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > count + 1:
            raise Refused(f"it uses the memo index {argument} after {count} operations")


def _operations(data: bytes) -> Iterator[tuple[str, Any]]:
    """Yield (name, argument) of each operation.

    Like `pickletools.genops`, except for STRING: genops decodes its argument as ASCII and fails on the byte strings
    that Python 2 wrote at protocol 0.
    """
    stream = io.BytesIO(data)
    name = ""
    while name != "STOP":
        code = stream.read(1)
        if code not in OPERATIONS:
            raise ValueError(f"unknown operation {code!r}" if code else "it has no end")
        operation = OPERATIONS[code]
        name = operation.name
        if name != "STRING":
            yield name, operation.arg.reader(stream) if operation.arg is not None else None
        elif stream.readline().endswith(b"\n"):  # the unpickler checks the quotes and resolves the escapes
            yield name, None
        else:
            raise ValueError("a string has no end")


def _elements(value: Any, what: str) -> list[Any]:
    """Return a list, a tuple, or an array of objects or booleans as a list."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, _Array) and isinstance(value.dtype, _Dtype):
        if value.dtype.code.startswith("O") and isinstance(value.raw, list):
            return value.raw
        if value.dtype.code in BOOLEANS and isinstance(value.raw, bytes | bytearray):
            return [byte != 0 for byte in value.raw]
    raise ValueError(f"has no list of {what}")


def _boolean(value: Any) -> bool | None:
    """Return the value of a boolean, 0, 1 or a boolean scalar of NumPy; None for anything else."""
    if isinstance(value, _Array) and isinstance(value.dtype, _Dtype) and value.dtype.code in BOOLEANS:
        return bool(value.raw == b"\1") if value.raw in (b"\0", b"\1") else None
    return bool(value) if isinstance(value, int) and value in (0, 1) else None


def _encoded(value: Any) -> bytes | bytearray | None:
    """Return the bytes of one image: given as bytes, or as an array of bytes (`cv2.imencode`); else None."""
    if isinstance(value, _Array) and isinstance(value.dtype, _Dtype) and value.dtype.code in BYTE_ARRAYS:
        raw = value.raw
        if not isinstance(raw, bytes | bytearray) or not isinstance(value.shape, tuple):
            return None
        complete = all(isinstance(n, int) for n in value.shape) and math.prod(value.shape) == len(raw)
        return raw if complete else None
    return value if isinstance(value, bytes | bytearray) else None
