"""Files from strangers, torch's and safetensors': nothing in them is executed, and no size in them is taken on trust.

torch.load(weights_only=True) runs none of a file's code, but it allocates what the file asks for, unpacks what it has
compressed, and hashes whatever is a key. So a file is first followed without being built, and handed to torch only
where each size it states is one that the file really has. The safetensors reader is our own: the format is a header
and raw bytes, its package would be a dependency for thirty lines.
"""

import io
import json
import math
import os
import pickletools
import struct
import warnings
import zipfile
from typing import NamedTuple

import torch

LARGEST_FILE = 2**31  # bytes; forty times a ResNet18
MOST_STEPS = 10**6  # of a pickle; a ResNet18 with its optimizer takes some ten thousand
LARGEST_TUPLE = 1000  # nodes, written out: nested ones double with every byte, and those that are keys are hashed
MOST_DIMENSIONS = 8

NUMBERS = (  # safetensors' name, torch's storage, type
    ("F64", "Double", torch.float64),
    ("F32", "Float", torch.float32),
    ("F16", "Half", torch.float16),
    ("BF16", "BFloat16", torch.bfloat16),
    ("I64", "Long", torch.int64),
    ("I32", "Int", torch.int32),
    ("I16", "Short", torch.int16),
    ("I8", "Char", torch.int8),
    ("U8", "Byte", torch.uint8),
    ("BOOL", "Bool", torch.bool),
)
SAFETENSORS = {name: dtype for name, _, dtype in NUMBERS}
STORAGES = {f"torch.{name}Storage": dtype.itemsize for _, name, dtype in NUMBERS}
REBUILDS = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"}
CALLS = REBUILDS | {"collections.OrderedDict", "collections.Counter", "torch.Size", "torch._utils._rebuild_parameter"}
CONSTANTS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
CONSTANTS |= {"NONE", "NEWTRUE", "NEWFALSE", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET"}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
INTO_CONTAINER = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}


class Refused(Exception):
    """The file is not read; the message says why, as the end of a sentence about it."""


def read_untrusted(path: str):
    """What torch.save or safetensors wrote: tensors on the CPU and plain values.

    Raises:
        Refused: the file is damaged, asks for code to be run, or states sizes that it does not have.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_FILE:
                raise Refused(f"it has {size / 2**30:.1f} GiB; a checkpoint has at most {LARGEST_FILE / 2**30:.0f}")
            data = file.read(LARGEST_FILE)
        if not data:
            raise Refused("it is empty")
        if data[8:9] == b"{":
            return _read_safetensors(data)
        checked = _checked_zip(data) if data.startswith(b"PK\x03\x04") else _checked_legacy(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch remarks on odd pickles, a refusal says in one line
            return torch.load(checked, map_location="cpu", weights_only=True)
    except (Refused, MemoryError):
        raise
    except OSError as error:
        raise Refused(error.strerror or str(error)) from None
    except Exception as error:  # noqa: BLE001 - whatever a strange file makes the readers raise
        raise Refused(f"it is damaged, cut short, or of no format known here ({type(error).__name__})") from None


def _checked_zip(data):
    """torch.save's archive, written anew with only the records torch.load needs, stored and of the size they claim.

    Two readers of one zip can disagree on what is in it; torch gets the one that was checked.
    """
    archive = zipfile.ZipFile(io.BytesIO(data))
    mains = [name for name in archive.namelist() if name.rsplit("/", 1)[-1] == "data.pkl"]
    if any(name.rsplit("/", 1)[-1] == "constants.pkl" for name in archive.namelist()):
        raise Refused("it is a TorchScript archive, which is a program; save the model's state_dict() instead")
    if len(mains) != 1:
        raise Refused("it is a zip archive, but not one that torch.save wrote")
    root = mains[0].removesuffix("data.pkl")
    records = {info.filename.removeprefix(root): info for info in archive.infolist() if info.filename.startswith(root)}
    if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
        raise Refused("it has compressed records, which torch.save never writes")
    if sum(info.file_size for info in records.values()) > len(data):
        raise Refused("its records claim more bytes than the file has")
    content = {
        name: archive.read(info)
        for name, info in records.items()
        if name in ("data.pkl", "byteorder") or name.startswith("data/")
    }
    sizes = {name.removeprefix("data/"): len(raw) for name, raw in content.items() if name.startswith("data/")}
    _follow(io.BytesIO(content["data.pkl"]), sizes)
    checked = io.BytesIO()
    with zipfile.ZipFile(checked, "w") as clean:
        for name, raw in {**content, "version": b"3\n"}.items():
            clean.writestr(f"archive/{name}", raw)
    checked.seek(0)
    return checked


def _checked_legacy(data):
    """The format before torch 1.6: pickles of a magic number, a version, the writer's machine, the content and the keys
    of its storages, then the storages."""
    stream = io.BytesIO(data)
    claimed = sum(sum(_follow(stream, None).values()) for _ in range(5))
    if claimed > len(data) - stream.tell():
        raise Refused(f"its tensors claim {claimed:,} bytes, more than the file has")
    return io.BytesIO(data)


class Value(NamedTuple):
    """What a pickle's machine would hold: an int, a str, a tuple, a Name, a Storage, or anything else (None)."""

    what: object = None
    weight: int = 1


class Name(NamedTuple):
    path: str


class Storage(NamedTuple):
    count: int


def _follow(stream, records):
    """Go through one pickle without building anything.

    Args:
        records: the bytes that each storage has, by key; None where they lie behind the pickles.

    Returns:
        the bytes of each storage that it asks for, by key.

    Raises:
        Refused: it asks for more than tensors within their storages and plain values.
    """
    stack, marks, memo, storages = [], [], {}, {}

    def pop(count):
        start = len(stack) - count
        if start < (marks[-1] if marks else 0):
            raise Refused("its pickle is damaged")
        taken = stack[start:]
        del stack[start:]
        return taken

    def pop_to_mark():
        start = marks.pop()
        return pop(len(stack) - start)

    for step, (code, argument, _) in enumerate(pickletools.genops(stream)):
        name = code.name
        if step > MOST_STEPS:
            raise Refused("its pickle is too long for a checkpoint's")
        if name == "STOP":
            return storages
        if name in CONSTANTS:
            stack.append(Value(argument))
        elif name in TUPLES or name == "TUPLE":
            parts = pop(TUPLES[name]) if name in TUPLES else pop_to_mark()
            whole = Value(tuple(part.what for part in parts), 1 + sum(part.weight for part in parts))
            if whole.weight > LARGEST_TUPLE:
                raise Refused("its pickle nests more tuples than a checkpoint's")
            stack.append(whole)
        elif name in INTO_CONTAINER:
            pop(INTO_CONTAINER[name])
        elif name in ("APPENDS", "SETITEMS"):
            pop_to_mark()
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            path = argument.replace(" ", ".") if argument else ".".join(str(part.what) for part in pop(2))
            if name != "GLOBAL" or (path not in CALLS and path not in STORAGES and not _is_dtype(path)):
                raise Refused(f"it asks for {printable(path)}, code that was not run; save the state_dict() alone")
            stack.append(Value(Name(path)))
        elif name == "REDUCE":
            function, arguments = (value.what for value in pop(2))
            if not isinstance(function, Name) or function.path not in CALLS or not isinstance(arguments, tuple):
                raise Refused("it calls what is no function of tensors; nothing was run")
            if function.path in REBUILDS:
                _check_tensor(*arguments[:4])
            stack.append(Value(arguments[0] if function.path == "torch.Size" else None))
        elif name == "BINPERSID":
            key, size, count = _storage(pop(1)[0].what)
            if (records is not None and records.get(key) != size) or storages.setdefault(key, size) != size:
                raise Refused(f"its tensor storage {printable(key)} claims {size:,} bytes, which are not there")
            stack.append(Value(Storage(count)))
        elif name != "PROTO":
            raise Refused(f"its pickle does what torch.save never does ({name})")
    raise Refused("its pickle is damaged")


def _storage(identity):
    """("storage", type, key, location, count[, view]) -> key, bytes, count."""
    kind, storage, key, _, count, *view = identity
    if kind != "storage" or not isinstance(key, str) or type(count) is not int or count < 0 or view not in ([], [None]):
        raise Refused("it refers to something outside itself")
    return key, count * STORAGES[storage.path], count


def _check_tensor(storage, offset, shape, strides):
    """Refuse a tensor that reaches beyond its storage, or repeats it."""
    whole = all(type(number) is int and number >= 0 for number in (offset, *shape, *strides))
    if not whole or len(shape) != len(strides) or len(shape) > MOST_DIMENSIONS:
        raise Refused("it holds a tensor of no possible shape")
    reach = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    if math.prod(shape) > storage.count or (math.prod(shape) and reach > storage.count):
        raise Refused("it holds a tensor larger than its own storage")


def _is_dtype(path):
    return isinstance(getattr(torch, path.removeprefix("torch."), None), torch.dtype)


def _read_safetensors(data):
    """8 bytes little-endian length, a JSON header of name -> dtype, shape, data_offsets, then the raw bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data) - 8:
        raise Refused("its header claims more bytes than the file has")
    header, body = json.loads(data[8 : 8 + length]), memoryview(data)[8 + length :]
    tensors, total = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (start, end) = SAFETENSORS.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
        if dtype is None:
            raise Refused(f"it holds numbers of type {printable(entry['dtype'])}")
        whole = all(type(number) is int and number >= 0 for number in (*shape, start, end))
        if not whole or len(shape) > MOST_DIMENSIONS:
            raise Refused("it holds a tensor of no possible shape")
        size, total = math.prod(shape) * dtype.itemsize, total + end - start
        if size != end - start or end > len(body) or total > len(body):
            raise Refused(f"tensor {printable(name)} claims {size:,} bytes, which are not there")
        raw = bytearray(body[start:end])
        tensors[name] = (torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)).reshape(shape)
    return tensors


def printable(text) -> str:
    """A file's own word, fit for one line of a message."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:60])
