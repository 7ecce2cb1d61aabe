"""Validates a checkpoint file before torch.load: that its sizes are those of its content, and that it is undamaged.

With `weights_only`, torch.load runs no code. But the pickle can make it call functions such as `bytearray` and
`torch.Tensor` with any size, and it does not verify the checksums of the archive's members.
"""

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import torch

from mla_lm.errors import UserError

PICKLE_BYTES = 2**23  # largest data.pkl; 100 layers with two moments each take half a megabyte
DIRECTORY_BYTES = 2**24  # largest list of members, enough for 100,000 tensors
DEPTH = 50  # most levels of nested containers
OPCODES = (
    *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.REDUCE, pickle.BUILD, pickle.BINPERSID),
    *(pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(
        pickle.BINFLOAT,
        pickle.BINUNICODE,
        pickle.EMPTY_TUPLE,
        pickle.TUPLE,
        pickle.TUPLE1,
        pickle.TUPLE2,
        pickle.TUPLE3,
    ),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
)
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def check_archive(path: Path, tensors: bool = True) -> None:
    """Check that a file is complete and as torch.save writes it, and that nothing in it claims more than is there.

    Its members must lie one after another, uncompressed, each matching its checksum. Its pickle may hold dicts, lists,
    tuples, text, numbers and tensors, and each tensor must lie within its storage.

    Args:
        tensors: verify the tensors' checksums too, which reads the whole file

    Raises:
        UserError: a check fails; the message names the file and the member.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 98))
        if _directory_bytes(file.read(), size) > DIRECTORY_BYTES:
            raise UserError(f"{path} is damaged or no checkpoint: it is no archive of torch.save")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive)
            _check_pickle(path, archive)
            for member in archive.infolist() if tensors else ():
                _check_contents(path, archive, member)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, UnicodeDecodeError, struct.error) as error:
        raise UserError(f"{path} is damaged or no checkpoint: {error}") from error


def _directory_bytes(tail: bytes, size: int) -> int:
    """Length of the list of members in bytes, read from the end of a zip file; 2^64 if that is not as torch writes it.

    torch and Python interpret the end of the file differently, so it must mean the same to both.
    """
    if tail[-22:-18] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        return 2**64
    if tail[-42:-38] != b"PK\x06\x07":  # there is no pointer to a 64-bit directory
        return struct.unpack("<L", tail[-10:-6])[0]
    if tail[:4] != b"PK\x06\x06" or struct.unpack("<Q", tail[64:72])[0] != size - 98:
        return 2**64
    return struct.unpack("<Q", tail[40:48])[0]


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    names = [member.filename for member in members]
    top = names[0].split("/")[0] if names else ""
    end = 0
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise UserError(f"{path}: {member.filename} is compressed, which torch.save never does")
        if member.header_offset < end or not member.filename.startswith(f"{top}/"):
            raise UserError(f"{path}: {member.filename} lies where torch.save would not put it")
        end = member.header_offset + 30 + len(member.filename.encode()) + member.file_size
    if members and (
        members[0].header_offset != 0 or end > archive.start_dir or len({name.lower() for name in names}) < len(names)
    ):
        raise UserError(f"{path} is damaged: its members do not lie one after another")
    if f"{top}/data.pkl" not in names:
        raise UserError(f"{path} is no checkpoint: it has no data.pkl")


def _check_contents(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    try:
        with archive.open(member) as file:
            while file.read(2**20):  # reading to the end verifies the checksum
                pass
    except (zipfile.BadZipFile, EOFError, RuntimeError) as error:
        raise UserError(f"{path} is damaged: {member.filename} is not what was written ({error})") from error


def _check_pickle(path: Path, archive: zipfile.ZipFile) -> None:
    sizes = {member.filename.partition("/")[2]: member.file_size for member in archive.infolist()}
    if sizes["data.pkl"] > PICKLE_BYTES:
        raise UserError(f"{path}: data.pkl has {sizes['data.pkl']:,} bytes, more than any checkpoint's")
    member = next(member for member in archive.infolist() if member.filename.endswith("/data.pkl"))
    _check_contents(path, archive, member)
    data = archive.read(member)
    try:
        _check_nesting(_Rehearsal(data, sizes).load(), len(data))
    except UserError as error:
        raise UserError(f"{path}: data.pkl {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged or no checkpoint: data.pkl cannot be read") from error


class _Rehearsal(pickle._Unpickler):
    """Reads a pickle as torch.load would, but only checks whether the tensors could be made, and makes none.

    It uses Python's own unpickler, since the one in C allocates memory for whatever index a pickle names.

    Args:
        sizes: size of each member of the archive, in bytes

    Raises, from `load`:
        UserError: the pickle holds what no checkpoint does; the message continues a sentence that begins with its name.
    """

    stack: list  # which the stubs of `pickle` leave out
    dispatch: ClassVar[dict[int, Any]] = {opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in OPCODES}

    def __init__(self, data: bytes, sizes: dict[str, int]):
        super().__init__(BytesIO(data), encoding="utf-8")
        self.sizes = sizes

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) in FUNCTIONS:
            return FUNCTIONS[module, name]
        raise UserError(f"asks for {module}.{name}, which no checkpoint of this project has")

    def persistent_load(self, pid: tuple) -> "_Storage":
        kind, dtype, key, _, length = pid
        there = self.sizes.get(f"data/{key}")
        if (kind, type(dtype), type(length), there) != ("storage", torch.dtype, int, length * dtype.itemsize):
            raise UserError(f"asks for a storage data/{key} that is not there in this size")
        return _Storage(length)

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()  # pyright: ignore[reportAttributeAccessIssue] - as `stack`

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])
        super().load_setitems()  # pyright: ignore[reportAttributeAccessIssue] - as `stack`

    def load_build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) is not OrderedDict or list(state) != ["_metadata"]:  # from Module.state_dict()
            raise UserError("changes an object, which no checkpoint of this project does")

    dispatch |= {pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems, pickle.BUILD[0]: load_build}


class _Storage:
    def __init__(self, length: int):
        self.length = length  # in elements


def _check_keys(keys: list) -> None:
    """Raise UserError for keys other than text and small integers.

    Nested tuples that repeat one tuple, and integers chosen to collide, take forever to hash.
    """
    if not all(type(key) is str or (type(key) is int and abs(key) < 2**31) for key in keys):
        raise UserError("has a dict with keys other than text and numbers")


def _tensor(
    storage: _Storage, offset: int, shape: tuple, stride: tuple, requires_grad: bool, hooks: OrderedDict
) -> None:
    """Stand in for torch._utils._rebuild_tensor_v2, which can turn one element into a tensor of any size."""
    numbers = (offset, *shape, *stride)
    if len(numbers) > 20 or not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
        raise UserError("has a tensor of impossible sizes")
    if type(requires_grad) is not bool or type(hooks) is not OrderedDict or hooks:
        raise UserError("has a tensor with more to it than numbers")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if (count := math.prod(shape)) and (count > storage.length or last >= storage.length):
        raise UserError(f"has a tensor {list(shape)} that is larger than its storage of {storage.length} elements")


def _no_arguments(*arguments: object) -> OrderedDict:
    if arguments:
        raise UserError("makes an OrderedDict in an unusual way")
    return OrderedDict()


FUNCTIONS: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): _no_arguments,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
}


def _check_nesting(content: object, most: int) -> None:
    """Raise UserError if walking through the content would exceed Python's recursion limit or take too long.

    Args:
        most: largest number of values; those in a container that occurs twice count twice
    """
    left = [(content, 0)]
    while left:
        item, depth = left.pop()
        inner = list(item.values()) if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()
        most -= 1 + len(inner)
        if depth > DEPTH or most < 0:
            raise UserError("has containers in one another without end")
        left += [(value, depth + 1) for value in inner]
