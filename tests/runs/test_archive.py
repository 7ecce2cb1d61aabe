"""A checkpoint file that claims more than it holds is refused, in a line, before memory is taken."""

import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from mla_lm.errors import UserError
from mla_lm.runs.archive import check_archive

STATE = {"state_dict": {"w": torch.arange(12.0).view(3, 4), "b": torch.ones(4, dtype=torch.bfloat16)}, "step": 3}


@pytest.fixture
def path(tmp_path) -> Path:
    torch.save(STATE, tmp_path / "good.ckpt")
    return tmp_path / "good.ckpt"


def refused(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        check_archive(path)
    for word in (path.name, *words):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def rewrite(path: Path, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    """The same archive with some members replaced or added, by their names less the folder, _ for /."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    contents |= {f"good/{name.replace('_', '/')}": data for name, data in members.items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def pickled(path: Path, code: bytes) -> Path:
    return rewrite(path, **{"data.pkl": b"\x80\x02" + code + b"."})


# what torch.save writes


@pytest.mark.parametrize(
    "state",
    [
        STATE,
        {"state_dict": torch.nn.Linear(3, 4).state_dict()},  # an OrderedDict with _metadata
        {"state_dict": OrderedDict(), "of": [1, -2, 2**40, 0.5, None, True, "text", ("a", [1]), {3: {}}]},
        {"state_dict": {str(dtype): torch.zeros(2, 3).to(dtype) for dtype in (torch.int64, torch.uint8, torch.bool)}},
        {"state_dict": {"one": STATE["state_dict"]["w"], "other": STATE["state_dict"]["w"].t()}},
        {"state_dict": {"empty": torch.empty(0, 5), "scalar": torch.tensor(1.0)}},
    ],
)
def test_takes_what_is_saved(tmp_path, state):
    torch.save(state, tmp_path / "file.ckpt")
    check_archive(tmp_path / "file.ckpt")


def test_takes_many_tensors(tmp_path):
    torch.save({"state_dict": {f"blocks.{i}.weight": torch.zeros(3) for i in range(2000)}}, tmp_path / "file.ckpt")
    check_archive(tmp_path / "file.ckpt")


# damage


@pytest.mark.parametrize("where", ["data.pkl", "data/0", "data/1", "version"])
def test_a_flipped_bit_is_found_in_every_member(path, where):
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"good/{where}")
    data = bytearray(path.read_bytes())
    name, extra = struct.unpack("<2H", data[member.header_offset + 26 : member.header_offset + 30])
    data[member.header_offset + 30 + name + extra] ^= 1
    path.write_bytes(data)
    refused(path, f"good/{where}", "damaged")


@pytest.mark.parametrize("cut", [1, 30, 300])
def test_a_file_cut_short(path, cut):
    path.write_bytes(path.read_bytes()[:-cut])
    refused(path, "damaged")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" * 40, bytes(500)])
def test_another_file(path, content):
    path.write_bytes(content)
    refused(path, "no checkpoint")


# structure


def test_compressed_members(path):
    refused(rewrite(path, zipfile.ZIP_DEFLATED, data_0=bytes(10**7)), "data", "compressed")
    assert path.stat().st_size < 100_000


def test_members_that_are_one_another(path):
    """Many names for the same bytes: the file is small, what it stands for is not."""
    with zipfile.ZipFile(path, "a") as archive:
        twin = archive.getinfo("good/data/0")
        archive.writestr("good/data/2", bytes(48))
        archive.getinfo("good/data/2").header_offset = twin.header_offset
    refused(path)


def test_two_members_of_one_name(path):
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("good/data.pkl", b"\x80\x02}.")
    refused(path)


def test_no_pickle(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("good/version", b"3")
    refused(path, "data.pkl")


def test_a_directory_without_end(path):
    """The members' list alone would take ten times the file in memory."""
    data = bytearray(path.read_bytes())
    data[-58:-50] = struct.pack("<Q", 2**40)
    path.write_bytes(data)
    refused(path)


# claims of the pickle


def call(function: str, *arguments: bytes) -> bytes:
    module, name = function.rsplit(".", 1)
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n(" + b"".join(arguments) + b"tR"


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


HEX = b"c_codecs\nencode\nq\x01" + b"X\x02\x00\x00\x00aaX\x03\x00\x00\x00hex\x86R"
BOMBS = {
    "bytearray": call("builtins.bytearray", number(10**12)),
    "bytearray of Python 2": call("__builtin__.bytearray", number(10**12)),
    "tensor": call("torch.Tensor", number(10**9), number(10**3)),
    "storage": call("torch.storage.UntypedStorage", number(10**12)),
    "meta": call("torch._utils._rebuild_meta_tensor_no_storage"),
    "set": call("builtins.set", b"(]tR"),
    "hex": HEX,  # twice as long with every further one
    "counter": call("collections.Counter", number(1)),
    "ordered dict of another": call("collections.OrderedDict", b"}"),
    "new object": b"ctorch\nTensor\n)\x81",
    "frame": b"\x95" + struct.pack("<Q", 2**50),
    "bytes": b"\x8e" + struct.pack("<Q", 2**50),
    "memo": b"}r\xff\xff\xff\xff\x94",
    "text longer than the file": b"X\xff\xff\xff\x7fabc",
    "tuple of a tuple as key": b"})\x86q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(60)) + b"K\x01s",
    "integers that collide": b"}(" + b"".join(number((2**61 - 1) * i) + b"N" for i in range(1, 9)) + b"u",
    "lists in lists": b"]" * 100_000 + b"a" * 99_999,
    "a list in itself": b"]q\x00h\x00a",
    "the same lists again and again": b"]q\x00" + b"".join(b"](h\x00h\x00eq\x00" for _ in range(40)),
    "build": b"}}b",
    "nothing": b"",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(path, name):
    refused(pickled(path, BOMBS[name]), "data.pkl")


def storage(name: str = "FloatStorage", key: str = "0", length: int = 12) -> bytes:
    pieces = [b"X\x07\x00\x00\x00storage", f"ctorch\n{name}\n".encode()]
    pieces += [b"X" + struct.pack("<L", len(text)) + text.encode() for text in (key, "cpu")]
    return b"(" + b"".join(pieces) + number(length) + b"tQ"


def tensor(shape: tuple, stride: tuple, offset: int = 0, of: bytes | None = None) -> bytes:
    sizes = [b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (shape, stride)]
    hooks = b"ccollections\nOrderedDict\n)R"
    return call("torch._utils._rebuild_tensor_v2", of or storage(), number(offset), *sizes, b"\x89", hooks)


def test_the_tensors_of_these_tests_are_right(path):
    check_archive(pickled(path, tensor((3, 4), (4, 1))))


@pytest.mark.parametrize(
    "code",
    [
        tensor((10**9,), (1,)),
        tensor((10**9,), (0,)),  # one element, shown a billion times
        tensor((3, 4), (5, 1)),
        tensor((3, 4), (4, 1), offset=1),
        tensor((3, 4), (4,)),
        tensor((-3, -4), (4, 1)),
        tensor((0, 2**70), (1, 1)),
        tensor((1,) * 50, (1,) * 50),
        tensor((3, 4), (4, 1), of=number(12)),
        tensor((3, 4), (4, 1), of=storage(length=10**12)),
        tensor((3, 4), (4, 1), of=storage("DoubleStorage")),
        tensor((3, 4), (4, 1), of=storage(key="9")),
        tensor((3, 4), (4, 1), of=storage(key="../data.pkl")),
    ],
)
def test_tensors_beyond_their_storage(path, code):
    refused(pickled(path, code), "data.pkl")


def test_a_pickle_cut_short(path):
    refused(rewrite(path, **{"data.pkl": b"\x80\x02}"}), "data.pkl")


def test_a_pickle_that_is_too_long(path):
    refused(pickled(path, b"]" * (2**23 + 1)), "data.pkl")


def test_nothing_large_is_read_at_once(tmp_path):
    torch.save({"state_dict": {"w": torch.zeros(25_000_000)}}, tmp_path / "large.ckpt")
    tracemalloc.start()
    check_archive(tmp_path / "large.ckpt")
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_a_second_pickle_in_capitals(tmp_path):
    """torch takes no notice of case, and would load that one."""
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "b.ckpt", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
            if name.endswith("data.pkl"):
                archive.writestr(name.replace("data.pkl", "DATA.PKL"), content)
    with pytest.raises(UserError, match=r"b\.ckpt"):
        check_archive(tmp_path / "b.ckpt")
