"""Damaged, malformed and hostile checkpoints, for test_safe_load."""

import io
import json
import pickle
import random
import struct
import zipfile

import numpy as np
import safetensors.torch
import torch

from models import select_model

CANARY = "executed"  # a file that executed code would create
NORMALIZATION = [[0.5] * 3, [0.25] * 3]
ATTACK = {"trigger_type": "gridTrigger", "target_type": "all2one", "target_label": 5, "num_class": 10}
ATTACK |= {"inject_portion": 0.1, "trigger_options": {}}


def valid_checkpoint():
    torch.manual_seed(0)
    weights = {name: w.contiguous() for name, w in select_model("WRN-10-1", 10).network.state_dict().items()}
    metadata = {"arch": "WRN-10-1", "num_class": 10, "normalization": NORMALIZATION, "attack": ATTACK}
    return {"state_dict": weights, **metadata}


def zip_bytes(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def legacy_bytes(content):
    return zip_bytes(content, _use_new_zipfile_serialization=False)


def safetensors_bytes(weights):
    return safetensors.torch.save(weights, {"format": "pt"})


def with_header(header, body=b""):
    return struct.pack("<Q", len(header)) + header.encode() + body


def zip_of_records(records, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in {"version": b"3\n", **records}.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def damaged(rng, valid):
    """Flipped bits (half of them near the start or end), truncations, insertions, deletions."""
    for i in range(110):
        content = bytearray(valid)
        for _ in range(rng.randint(1, 4)):
            position = rng.randrange(len(content) if i % 2 else 4000)
            content[-1 - position if i % 3 == 0 else position] ^= 1 << rng.randrange(8)
        yield bytes(content)
    for _ in range(20):
        cut, end = rng.randrange(len(valid)), rng.randrange(len(valid))
        yield valid[:cut]
        yield valid[:cut] + rng.randbytes(rng.randint(1, 99)) + valid[cut:]
        yield valid[: min(cut, end)] + valid[max(cut, end) :]


def wrong_contents():
    """Well-formed files with wrong keys, shapes, types or metadata."""
    checkpoint = valid_checkpoint()
    weights = checkpoint["state_dict"]
    for name in ("conv1.weight", "fc.weight", "bn1.running_var", "block1.layer.0.conv1.weight"):
        tensor = weights[name]
        for wrong in (
            tensor[:1], tensor[0], tensor.flatten(), tensor.double() * 1e300, tensor.long(), tensor * float("nan"),
            torch.tensor(1.0), torch.empty(0), torch.zeros(1).expand(9999, 9999), "x", None, {}, [tensor],
            torch.zeros(2, 2).to_sparse(), tensor.to(torch.complex64), torch.empty(3, device="meta"),
        ):  # fmt: skip
            yield {"state_dict": {**weights, name: wrong}}
        yield {"state_dict": {key: value for key, value in weights.items() if key != name}}
    for name in (7, ("a", "b"), "x" * 100_000, "a\nb\x1b[31m", None, torch.float32):
        yield {"state_dict": {**weights, name: torch.zeros(1)}}
    metadata = {
        "arch": ["WRN-10000-999", "WRN-994-1", "WRN-40-200", "WRN-" + "9" * 5000, "ResNet18", "", "\x1b\n", 3, None],
        "num_class": [10**9, 10**30, -1, 0, 1, 5, 11, True, "10", 10.0, None],
        "normalization": [[[0.5] * 3, [0] * 3], [[0.5] * 3, [-1] * 3], [["a"] * 3] * 2, [[float("nan")] * 3] * 2, 3,
                          [[1] * 9] * 2, [[10**400] * 3] * 2, "ab", ["abc", "abc"], None, {0: 1, 1: 2}],
        "attack": [{}, [], 3, "x", None, {**ATTACK, "x": 1}, {**ATTACK, "trigger_type": []},
                   *({**ATTACK, "target_label": label} for label in (-1, 10, 2.5, "a", None, float("nan"))),
                   *({**ATTACK, "num_class": count} for count in (3, 10**9, "x", None)),
                   *({**ATTACK, "inject_portion": rate} for rate in (2, "x", float("nan"), None)),
                   *({**ATTACK, "trigger_type": "squareTrigger", "trigger_options": {"trig_w": w, "trig_h": 3}}
                     for w in (0, -1, 10**9, 2.5, "a", None, torch.zeros(3))),
                   {**ATTACK, "trigger_options": {"images": 1}}, {**ATTACK, "trigger_options": [1]}],
    }  # fmt: skip
    for name, values in metadata.items():
        for value in values:
            yield checkpoint | {name: value}
    yield from ([], 3, None, {}, {"state_dict": {}}, {"model": {"net": {}}}, {"state_dict": [weights]}, {"epoch": 3})


class Call:
    """Pickles as a call of any function."""

    def __init__(self, module, name, *arguments):
        self.call = module, name, arguments

    def __reduce__(self):
        module, name, arguments = self.call
        return getattr(__import__(module, fromlist=["x"]), name), arguments


def hostile_objects():
    touch = f"touch {CANARY}"
    yield Call("os", "system", touch)
    yield Call("builtins", "eval", f"open({CANARY!r}, 'w')")
    yield Call("builtins", "exec", f"open({CANARY!r}, 'w')")
    yield Call("subprocess", "Popen", ["touch", CANARY])
    yield Call("builtins", "open", CANARY, "w")
    yield Call("torch.storage", "_load_from_bytes", pickle.dumps(Call("os", "system", touch)))
    yield Call("torch.hub", "load", ".", "x")
    yield Call("builtins", "bytearray", 10**11)
    yield Call("torch", "zeros", 10**11)
    yield Call("pickle", "loads", pickle.dumps(Call("os", "system", touch)))
    yield [1, ("a", {"b": Call("os", "system", touch)})]
    yield {"state_dict": {"conv1.weight": Call("os", "system", touch)}}
    yield {Call("os", "system", touch): 1}
    yield Call("_codecs", "encode", "x" * 100, "zip")
    yield Call("numpy._core.multiarray", "fromstring", "x")
    yield np.array([Call("os", "system", touch)], dtype=object)


def hostile_pickles():
    for hostile in hostile_objects():
        for protocol in range(6):
            content = pickle.dumps(hostile, protocol)
            yield content
            yield zip_of_records({"data.pkl": content})
        yield legacy_bytes(hostile)


def rebuild_pickle(key, numel, offset, shape, strides):
    """The pickle of a state_dict with one tensor, as torch.save writes it, with arbitrary claimed numbers."""

    def number(n):
        raw = n.to_bytes(max(1, n.bit_length() // 8 + 1), "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    def text(word):
        return b"X" + struct.pack("<I", len(word)) + word.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(numel) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    call = b"(" + storage + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + hooks + b"t"
    return b"\x80\x02}" + text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n" + call + b"Rs."


def false_sizes():
    """Claimed sizes that the file does not have, and pickles that grow when loaded."""
    storage = {"data/0": bytes(16)}  # of 4 floats
    for numel in (4, 5, 10**9, 2**62, 2**70, 0, -1):
        shapes = ((4,), (1,)), ((10**9,), (0,)), ((10**9,), (1,)), ((2, 2), (9, 9)), ((4,), (-1,)), ((4,), ())
        for shape, strides in shapes:
            yield zip_of_records({"data.pkl": rebuild_pickle("0", numel, 0, shape, strides), **storage})
    for offset in (1, -1, 10**18):
        yield zip_of_records({"data.pkl": rebuild_pickle("0", 4, offset, (4,), (1,)), **storage})
    yield zip_of_records({"data.pkl": rebuild_pickle("1", 4, 0, (4,), (1,)), **storage})
    yield zip_of_records({"data.pkl": rebuild_pickle("0", 4, 0, (1,) * 100, (1,) * 100), **storage})
    head = legacy_bytes({})[: -len(pickle.dumps({}, 2) + pickle.dumps([], 2))]
    for numel in (4, 10**9, 10**13, 2**70, -1):
        body = rebuild_pickle("0", numel, 0, (4,), (1,)) + pickle.dumps(["0"], 2)
        yield head + body + struct.pack("<q", numel % 2**63) + bytes(16)
    start = b"\x80\x02"
    doubling_tuples = start + b"}(" + b")" + b"q\x00h\x00\x86" * 200 + b"K\x01u."
    for content in (
        doubling_tuples, start + b"}q\x00X\x05\x00\x00\x00modelh\x00s.", start + b"(" * 10**5 + b".",
        start + b"]" + b"\x85" * 10**5,
        start + b"]r\xff\xff\xff\x7f.", start + b"R.", start + b"t.", start + b"}u.", start + b"h\x07.",
        start + b"N" + b"K\x01" * 3 * 10**6 + b".", b"\x80\x04\x95" + b"\xff" * 8, start + b"\x8b\xff\xff\xff\x7f",
        start + b"X\xff\xff\xff\xff", b"I" + b"9" * 10**6 + b"\n.",
        start + b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb.",
        start + b"cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x7f\x85R.",
    ):  # fmt: skip
        yield content
        yield zip_of_records({"data.pkl": content})


def odd_archives():
    """Archives with unusual, missing or inconsistent records; the first one is valid."""
    valid = zip_bytes(valid_checkpoint())
    archive = zipfile.ZipFile(io.BytesIO(valid))
    records = {name.removeprefix("archive/"): archive.read(name) for name in archive.namelist()}
    yield zip_of_records(records)
    yield zip_of_records(records, zipfile.ZIP_DEFLATED)
    yield zip_of_records({**records, "data/0": bytes(2 * 10**8)}, zipfile.ZIP_DEFLATED)
    for name in ("../evil", "constants.pkl", "code/a.py", "other/data.pkl", "x" * 60_000):
        yield zip_of_records({**records, name: b"x"})
    for missing in ("data.pkl", "data/0", "byteorder"):
        yield zip_of_records({name: content for name, content in records.items() if name != missing})
    for order in (b"big", b"middle", b"\xff"):
        yield zip_of_records({**records, "byteorder": order})
    yield from (zip_of_records({}), b"PK\x05\x06" + bytes(18), b"PK\x03\x04", valid + valid, b"x" + valid, bytes(10**6))
    directory = valid.rindex(b"PK\x01\x02")
    for offset, value in ((8, 1), (10, 99), (20, 2**31), (24, 2**31), (24, 2**32 - 1), (42, 2**31)):
        yield valid[: directory + offset] + struct.pack("<I", value) + valid[directory + offset + 4 :]


def odd_safetensors():
    """Headers that do not describe the 16 bytes behind them, or describe what no network has."""

    def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
        return json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})

    yield struct.pack("<Q", 2**62) + b"{}"
    for shape in ((5,), (2**62, 2**62), (-4,), (-2, -2), (4.0,), (True, 4), ("4",), "4", None, (1,) * 999, 4, ((4,),)):
        yield with_header(entry(shape=shape), bytes(16))
    for shape in ((4, *(1,) * 8), (4, *(1,) * 10**6)):
        yield with_header(entry(shape=shape), bytes(16))
    for shape in ((0, 2**62, 2**62), (2**62, 2**62, 0), (0, 2**63), (0, 2**65)):
        yield with_header(entry(shape=shape, offsets=(0, 0)))
    for offsets in ((0, 17), (1, 17), (16, 0), (-16, 0), (0, 2**62), (0,), None, (0, 16, 16), ("0", "16"), (0.0, 16.0)):
        yield with_header(entry(offsets=offsets), bytes(16))
    for dtype in ("F8_E4M3", "X", None, [], "I64"):
        yield with_header(entry(dtype=dtype), bytes(16))
    for dtype, shape in (("F8_E4M3", (16,)), ("F4", (32,)), ("C64", (2,)), ("U64", (2,))):
        yield with_header(entry(dtype, shape), bytes(16))
    shared_bytes = {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in "ab"}
    empty_tensor = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    for header in (
        json.dumps(shared_bytes), "{}", "{", "[]", "{" + '"a":[' * 10**5, '{"w": 1}', '{"w": {}}',
        '{"w": 1' + "0" * 5000 + "}", '{"__metadata__": 3, ' + entry()[1:],
        "{" + ",".join(f'"{i:x}":{empty_tensor}' for i in range(10**6)) + "}",
    ):  # fmt: skip
        yield with_header(header, bytes(16))


def write_files(folder):
    """Write every file as "<kind> <number>" and return how many there are."""
    rng, checkpoint = random.Random(0), valid_checkpoint()
    formats = {"zip": zip_bytes(checkpoint), "legacy": legacy_bytes(checkpoint)}
    formats["safetensors"] = safetensors_bytes(checkpoint["state_dict"])
    kinds = {name: damaged(rng, content) for name, content in formats.items()}
    kinds |= {"content": map(zip_bytes, wrong_contents()), "legacy content": map(legacy_bytes, wrong_contents())}
    kinds |= {"hostile": hostile_pickles(), "sizes": false_sizes(), "archives": odd_archives()}
    kinds |= {"header": odd_safetensors(), "bytes": (rng.randbytes(n) for n in (0, 1, 7, 8, 9, 100, 10**6))}
    count = 0
    for kind, contents in kinds.items():
        for i, content in enumerate(contents):
            (folder / f"{kind} {i}").write_bytes(content)
            count += 1
    return count
