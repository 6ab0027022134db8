"""Load files of unknown origin, written by torch.save or safetensors, without executing or trusting anything in them.

torch.load(weights_only=True) runs no code of the file, but it allocates the sizes that the file claims, decompresses
its records and hashes its keys. So the pickle is first simulated without building objects; torch gets it only if every
tensor lies within a storage that is present. The safetensors package checks offsets, shapes and the coverage of the
file; here the header's length, the types and the number of dimensions are limited as well.
"""

import io
import math
import os
import pickletools
import warnings
import zipfile
from typing import NamedTuple

import safetensors.torch
import torch

MAX_FILE_BYTES = 2**31  # nearly 50 times a ResNet18
MAX_HEADER_BYTES = 10**6  # of safetensors; a ResNet18 has 11 kB, and an entry takes 20 times its bytes in memory
MAX_OPCODES = 10**6  # of a pickle; a ResNet18 with its optimizer state has 10,000
MAX_TUPLE_NODES = 1000  # nested tuples can double with every byte, and hashing one as a key visits every node
MAX_DIMENSIONS = 8

STORAGE_DTYPES = {
    "torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}  # fmt: skip
REBUILDS = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"}
CALLABLES = REBUILDS | {"collections.OrderedDict", "collections.Counter"}
CALLABLES |= {"torch.Size", "torch._utils._rebuild_parameter"}
# What pickled numpy arrays and numbers are made of, by the names of numpy 1 and 2. None of it is built: see Skipped.
ARRAY_PARTS = {"numpy.ndarray", "numpy.dtype"}
ARRAY_PARTS |= {f"numpy.{core}.multiarray.{part}" for core in ("core", "_core") for part in ("_reconstruct", "scalar")}
ENCODE = "_codecs.encode"  # of the bytes of an array, from a string
CALLABLES |= ARRAY_PARTS | {ENCODE}
CONSTANTS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
CONSTANTS |= {"NONE", "NEWTRUE", "NEWFALSE", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET"}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
INTO_CONTAINER = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}


class UnsafeFile(Exception):
    """A file that is not loaded; the message gives the reason, as a clause about "it"."""


class Skipped:
    """Stands for a numpy array, number or type of the file."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


def safe_load(path: str):
    """Load what torch.save or safetensors wrote: tensors on the CPU and plain values; Skipped for numpy's.

    Raises:
        UnsafeFile: the file is damaged, would execute code, or claims sizes that it does not have.
    """
    try:
        with open(path, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            if file_bytes > MAX_FILE_BYTES:
                limit = f"{MAX_FILE_BYTES / 2**30:.0f} GiB"
                raise UnsafeFile(f"it has {file_bytes / 2**30:.1f} GiB; a checkpoint has at most {limit}")
            data = file.read(MAX_FILE_BYTES)
        if not data:
            raise UnsafeFile("it is empty")
        if data[8:9] == b"{":
            return _load_safetensors(data)
        validated = _validate_zip(data) if data.startswith(b"PK\x03\x04") else _validate_legacy(data)
        skipped = torch.serialization.safe_globals([(Skipped, part) for part in ARRAY_PARTS])
        with warnings.catch_warnings(), skipped:
            warnings.simplefilter("ignore")  # torch warns about unusual pickles; the error says it in one line
            return torch.load(validated, map_location="cpu", weights_only=True)
    except (UnsafeFile, MemoryError):
        raise
    except OSError as error:
        raise UnsafeFile(error.strerror or str(error)) from None
    except Exception as error:  # noqa: BLE001 - a malformed file can raise anything
        raise UnsafeFile(f"it is damaged, truncated, or of an unknown format ({type(error).__name__})") from None


def printable(text) -> str:
    """A string from a file, shortened and without control characters, for a one-line message."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:60])


def _load_safetensors(data):
    """8 bytes of header length (little-endian), a JSON header, then the bytes of the tensors."""
    if int.from_bytes(data[:8], "little") > MAX_HEADER_BYTES:
        raise UnsafeFile(f"its safetensors header claims more than {MAX_HEADER_BYTES:,} bytes")
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing: ")
        raise UnsafeFile(f"it is not valid safetensors ({printable(reason)})") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in STORAGE_DTYPES.values() or tensor.dim() > MAX_DIMENSIONS:
            kind = f"{tensor.dim()}-dimensional {tensor.dtype}"
            raise UnsafeFile(f"its tensor {printable(name)} is a {kind}, which no architecture here has")
    return tensors


def _validate_zip(data):
    """Validate an archive of torch.save and copy it, keeping the records that torch.load needs.

    Two zip readers can disagree about the content of one archive; torch gets the content that was validated.
    """
    archive = zipfile.ZipFile(io.BytesIO(data))
    pickles = [name for name in archive.namelist() if name.rsplit("/", 1)[-1] == "data.pkl"]
    if any(name.rsplit("/", 1)[-1] == "constants.pkl" for name in archive.namelist()):
        raise UnsafeFile("it is a TorchScript archive, which contains code; save the model's state_dict() instead")
    if len(pickles) != 1:
        raise UnsafeFile("it is a zip archive that torch.save did not write")
    root = pickles[0].removesuffix("data.pkl")
    records = {info.filename.removeprefix(root): info for info in archive.infolist() if info.filename.startswith(root)}
    if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
        raise UnsafeFile("it has compressed records, which torch.save never writes")
    if sum(info.file_size for info in records.values()) > len(data):
        raise UnsafeFile("its records claim more bytes than the file has")
    content = {
        name: archive.read(info)
        for name, info in records.items()
        if name in ("data.pkl", "byteorder") or name.startswith("data/")
    }
    storages = {name.removeprefix("data/"): len(raw) for name, raw in content.items() if name.startswith("data/")}
    simulate_pickle(io.BytesIO(content["data.pkl"]), storages)
    validated = io.BytesIO()
    with zipfile.ZipFile(validated, "w") as copy:
        for name, raw in {**content, "version": b"3\n"}.items():
            copy.writestr(f"archive/{name}", raw)
    validated.seek(0)
    return validated


def _validate_legacy(data):
    """Validate the format before torch 1.6: five pickles (magic number, version, platform, content, storage keys), then
    the storages."""
    stream = io.BytesIO(data)
    claimed = sum(sum(simulate_pickle(stream, None).values()) for _ in range(5))
    if claimed > len(data) - stream.tell():
        raise UnsafeFile(f"its tensors claim {claimed:,} bytes, more than the file has")
    return io.BytesIO(data)


class Value(NamedTuple):
    """A value on the simulated stack: an int, a str, a tuple, a Global, a Storage, or None for anything else."""

    content: object = None
    nodes: int = 1


class Global(NamedTuple):
    path: str


class Storage(NamedTuple):
    numel: int


def simulate_pickle(stream, storage_bytes):
    """Follow the opcodes of one pickle without building any object.

    Args:
        storage_bytes: storage key -> number of bytes in the file; None if the storages follow the pickles.

    Returns:
        storage key -> number of bytes that the pickle claims.

    Raises:
        UnsafeFile: the pickle needs more than plain values and tensors that lie within their storages.
    """
    stack, marks, memo, claimed = [], [], {}, {}

    def pop(count):
        start = len(stack) - count
        if start < (marks[-1] if marks else 0):
            raise UnsafeFile("its pickle is damaged")
        popped = stack[start:]
        del stack[start:]
        return popped

    def pop_to_mark():
        start = marks.pop()
        return pop(len(stack) - start)

    for step, (code, argument, _) in enumerate(pickletools.genops(stream)):
        opcode = code.name
        if step > MAX_OPCODES:
            raise UnsafeFile("its pickle is too long for a checkpoint")
        if opcode == "STOP":
            return claimed
        if opcode in CONSTANTS:
            stack.append(Value(argument))
        elif opcode in TUPLES or opcode == "TUPLE":
            items = pop(TUPLES[opcode]) if opcode in TUPLES else pop_to_mark()
            nested = Value(tuple(item.content for item in items), 1 + sum(item.nodes for item in items))
            if nested.nodes > MAX_TUPLE_NODES:
                raise UnsafeFile("its pickle nests more tuples than a checkpoint needs")
            stack.append(nested)
        elif opcode in INTO_CONTAINER:
            pop(INTO_CONTAINER[opcode])
        elif opcode in ("APPENDS", "SETITEMS"):
            pop_to_mark()
        elif opcode == "MARK":
            marks.append(len(stack))
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif opcode in ("GLOBAL", "INST", "STACK_GLOBAL"):
            path = argument.replace(" ", ".") if argument else ".".join(str(item.content) for item in pop(2))
            if opcode != "GLOBAL" or (path not in CALLABLES and path not in STORAGE_DTYPES and not _is_dtype(path)):
                raise UnsafeFile(f"it would import {printable(path)}, which was not run; save only the state_dict()")
            stack.append(Value(Global(path)))
        elif opcode == "REDUCE":
            function, arguments = (value.content for value in pop(2))
            if not isinstance(function, Global) or function.path not in CALLABLES or not isinstance(arguments, tuple):
                raise UnsafeFile("its pickle calls something that builds no tensor; nothing was run")
            if function.path in REBUILDS:
                _check_tensor(*arguments[:4])
            if function.path == ENCODE and arguments[1:] != ("latin1",):
                raise UnsafeFile("its pickle encodes text as torch.save never does")
            stack.append(Value(arguments[0] if function.path == "torch.Size" else None))
        elif opcode == "BINPERSID":
            key, num_bytes, numel = _parse_storage(pop(1)[0].content)
            is_missing = storage_bytes is not None and storage_bytes.get(key) != num_bytes
            if is_missing or claimed.setdefault(key, num_bytes) != num_bytes:
                raise UnsafeFile(
                    f"its tensor storage {printable(key)} claims {num_bytes:,} bytes that it does not have"
                )
            stack.append(Value(Storage(numel)))
        elif opcode != "PROTO":
            raise UnsafeFile(f"its pickle uses the opcode {opcode}, which torch.save never writes")
    raise UnsafeFile("its pickle is damaged")


def _parse_storage(identifier):
    """("storage", type, key, location, numel[, view]) -> key, number of bytes, numel."""
    kind, storage, key, _, numel, *view = identifier
    if kind != "storage" or not isinstance(key, str) or type(numel) is not int or numel < 0 or view not in ([], [None]):
        raise UnsafeFile("it refers to something outside itself")
    return key, numel * STORAGE_DTYPES[storage.path].itemsize, numel


def _check_tensor(storage, offset, shape, strides):
    """Refuse a tensor that exceeds its storage or has more elements than it."""
    is_whole = all(type(number) is int and number >= 0 for number in (offset, *shape, *strides))
    if not is_whole or len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise UnsafeFile("it has a tensor with an impossible shape")
    end = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    if math.prod(shape) > storage.numel or (math.prod(shape) and end > storage.numel):
        raise UnsafeFile("it has a tensor larger than its storage")


def _is_dtype(path):
    return isinstance(getattr(torch, path.removeprefix("torch."), None), torch.dtype)
