"""Checkpoints from strangers: hundreds of broken and hostile ones at main.py's door, each loaded right or refused in
one line, with nothing executed, no hang and no memory taken on a file's word."""

import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import time
import zipfile

import pytest
import torch

import config
from attacks.victim import load_victim
from data_loader import ImageSet
from models import select_model
from utils.errors import UserError

CANARY = "executed"
SECONDS, MEGABYTES = 5, 600  # for one file; a few times what the base file takes
NORMALIZATION = [[0.5] * 3, [0.25] * 3]
ATTACK = {"trigger_type": "gridTrigger", "target_type": "all2one", "target_label": 5, "num_class": 10}
ATTACK |= {"inject_portion": 0.1, "trigger_options": {}}


def base():
    torch.manual_seed(0)
    weights = dict(select_model("WRN-10-1", 10).network.state_dict())
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    return {
        "state_dict": weights,
        "arch": "WRN-10-1",
        "num_class": 10,
        "normalization": NORMALIZATION,
        "attack": ATTACK,
    }


def saved(content, **how):
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def legacy(content):
    return saved(content, _use_new_zipfile_serialization=False)


def safetensors(weights):
    names = {torch.float32: "F32", torch.int64: "I64"}
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in weights.items():
        raw = tensor.numpy().tobytes()
        place = [len(body), len(body) + len(raw)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        body += raw
    return with_header(json.dumps(header), body)


def with_header(header, body=b""):
    return struct.pack("<Q", len(header)) + header.encode() + body


def zipped(records, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in {"version": b"3\n", **records}.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def damaged(rng, whole):
    """Bytes flipped (mostly where the structure is), cut, put in, taken out."""
    for i in range(110):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(content) if i % 2 else 4000)
            content[-1 - place if i % 3 == 0 else place] ^= 1 << rng.randrange(8)
        yield bytes(content)
    for _ in range(20):
        cut, end = rng.randrange(len(whole)), rng.randrange(len(whole))
        yield whole[:cut]
        yield whole[:cut] + rng.randbytes(rng.randint(1, 99)) + whole[cut:]
        yield whole[: min(cut, end)] + whole[max(cut, end) :]


def other_contents():
    """Well-formed files whose keys, shapes or facts are not what they should be."""
    weights = base()["state_dict"]
    for name in ("conv1.weight", "fc.weight", "bn1.running_var", "block1.layer.0.conv1.weight"):
        tensor = weights[name]
        for other in (
            tensor[:1], tensor[0], tensor.flatten(), tensor.double() * 1e300, tensor.long(), tensor * float("nan"),
            torch.tensor(1.0), torch.empty(0), torch.zeros(1).expand(9999, 9999), "x", None, {}, [tensor],
            torch.zeros(2, 2).to_sparse(), tensor.to(torch.complex64), torch.empty(3, device="meta"),
        ):  # fmt: skip
            yield {"state_dict": {**weights, name: other}}
        yield {"state_dict": {key: value for key, value in weights.items() if key != name}}
    for name in (7, ("a", "b"), "x" * 100_000, "a\nb\x1b[31m", None, torch.float32):
        yield {"state_dict": {**weights, name: torch.zeros(1)}}
    facts = {
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
    for name, values in facts.items():
        for value in values:
            yield base() | {name: value}
    yield from ([], 3, None, {}, {"state_dict": {}}, {"model": {"net": {}}}, {"state_dict": [weights]}, {"epoch": 3})


class Call:
    """Pickles as a call of any function."""

    def __init__(self, module, name, *arguments):
        self.called = module, name, arguments

    def __reduce__(self):
        module, name, arguments = self.called
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


def hostile():
    for thing in hostile_objects():
        for protocol in range(6):
            content = pickle.dumps(thing, protocol)
            yield content
            yield zipped({"data.pkl": content})
        yield legacy(thing)


def rebuilt(pid, offset, size, strides):
    """A state_dict of one tensor, as torch.save writes it, of any claimed numbers."""

    def number(n):
        raw = n.to_bytes(max(1, n.bit_length() // 8 + 1), "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    text = lambda word: b"X" + struct.pack("<I", len(word)) + word.encode()
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(pid[0]) + text("cpu") + number(pid[1]) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    call = b"(" + storage + number(offset) + numbers(size) + numbers(strides) + b"\x89" + hooks + b"t"
    return b"\x80\x02}" + text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n" + call + b"Rs."


def claims():
    """Sizes that are not there, and pickles that grow."""
    four = {"data/0": bytes(16)}
    for count in (4, 5, 10**9, 2**62, 2**70, 0, -1):
        shapes = ((4,), (1,)), ((10**9,), (0,)), ((10**9,), (1,)), ((2, 2), (9, 9)), ((4,), (-1,)), ((4,), ())
        for size, strides in shapes:
            yield zipped({"data.pkl": rebuilt(("0", count), 0, size, strides), **four})
    for offset in (1, -1, 10**18):
        yield zipped({"data.pkl": rebuilt(("0", 4), offset, (4,), (1,)), **four})
    yield zipped({"data.pkl": rebuilt(("1", 4), 0, (4,), (1,)), **four})
    yield zipped({"data.pkl": rebuilt(("0", 4), 0, (1,) * 100, (1,) * 100), **four})
    head = legacy({})[: -len(pickle.dumps({}, 2) + pickle.dumps([], 2))]
    for count in (4, 10**9, 10**13, 2**70, -1):
        body = rebuilt(("0", count), 0, (4,), (1,)) + pickle.dumps(["0"], 2)
        yield head + body + struct.pack("<q", count % 2**63) + bytes(16)
    start = b"\x80\x02"
    doubling = start + b"}(" + b")" + b"q\x00h\x00\x86" * 200 + b"K\x01u."
    for content in (
        doubling, start + b"}q\x00X\x05\x00\x00\x00modelh\x00s.", start + b"(" * 10**5 + b".",
        start + b"]" + b"\x85" * 10**5,
        start + b"]r\xff\xff\xff\x7f.", start + b"R.", start + b"t.", start + b"}u.", start + b"h\x07.",
        start + b"N" + b"K\x01" * 3 * 10**6 + b".", b"\x80\x04\x95" + b"\xff" * 8, start + b"\x8b\xff\xff\xff\x7f",
        start + b"X\xff\xff\xff\xff", b"I" + b"9" * 10**6 + b"\n.",
        start + b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb.",
        start + b"cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x7f\x85R.",
    ):  # fmt: skip
        yield content
        yield zipped({"data.pkl": content})


def odd_archives():
    whole = saved(base())
    archive = zipfile.ZipFile(io.BytesIO(whole))
    records = {name.removeprefix("archive/"): archive.read(name) for name in archive.namelist()}
    yield zipped(records)
    yield zipped(records, zipfile.ZIP_DEFLATED)
    yield zipped({**records, "data/0": bytes(2 * 10**8)}, zipfile.ZIP_DEFLATED)
    for name in ("../evil", "constants.pkl", "code/a.py", "other/data.pkl", "x" * 60_000):
        yield zipped({**records, name: b"x"})
    for missing in ("data.pkl", "data/0", "byteorder"):
        yield zipped({name: content for name, content in records.items() if name != missing})
    for order in (b"big", b"middle", b"\xff"):
        yield zipped({**records, "byteorder": order})
    yield from (zipped({}), b"PK\x05\x06" + bytes(18), b"PK\x03\x04", whole + whole, b"x" + whole, bytes(10**6))
    place = whole.rindex(b"PK\x01\x02")
    for offset, value in ((8, 1), (10, 99), (20, 2**31), (24, 2**31), (24, 2**32 - 1), (42, 2**31)):  # of its directory
        yield whole[: place + offset] + struct.pack("<I", value) + whole[place + offset + 4 :]


def odd_safetensors():
    def entry(dtype="F32", shape=(4,), place=(0, 16)):
        return json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": place}})

    yield struct.pack("<Q", 2**62) + b"{}"
    for shape in ((5,), (2**62, 2**62), (-4,), (-2, -2), (4.0,), (True, 4), ("4",), "4", None, (1,) * 999, 4, ((4,),)):
        yield with_header(entry(shape=shape), bytes(16))
    for place in ((0, 17), (1, 17), (16, 0), (-16, 0), (0, 2**62), (0,), None, (0, 16, 16), ("0", "16"), (0.0, 16.0)):
        yield with_header(entry(place=place), bytes(16))
    for dtype in ("F8_E4M3", "X", None, [], "I64"):
        yield with_header(entry(dtype=dtype), bytes(16))
    both = {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in "ab"}
    for header in (
        json.dumps(both),
        "{}",
        "{",
        "[]",
        "{" + '"a":[' * 10**5,
        '{"w": 1}',
        '{"w": {}}',
        '{"w": 1' + "0" * 5000 + "}",
    ):
        yield with_header(header, bytes(16))


def write_cases(folder):
    rng, whole = random.Random(0), base()
    formats = {"zip": saved(whole), "legacy": legacy(whole), "safetensors": safetensors(whole["state_dict"])}
    kinds = {name: damaged(rng, content) for name, content in formats.items()}
    kinds |= {"content": map(saved, other_contents()), "legacy content": map(legacy, other_contents())}
    kinds |= {"hostile": hostile(), "claims": claims(), "archives": odd_archives(), "header": odd_safetensors()}
    kinds["bytes"] = (rng.randbytes(size) for size in (0, 1, 7, 8, 9, 100, 10**6))
    count = 0
    for kind, contents in kinds.items():
        for i, content in enumerate(contents):
            (folder / f"{kind} {i}").write_bytes(content)
            count += 1
    return count


def at_the_door(path):
    """What main.py does with --model, on pictures of ten classes."""
    opt, _ = config.parse("main.py", ["--dataset", "shapes", "--arch", "WRN-10-1"])
    pictures = ImageSet(
        torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), list("0123456789")
    )
    return load_victim(opt, set(), str(path), pictures, torch.device("cpu"))[0].network.state_dict()


def try_all(folder, report):
    os.chdir(folder)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends even what holds the interpreter
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    expected, outcomes = base()["state_dict"], {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in sorted(folder.iterdir()):
        signal.alarm(SECONDS)
        try:
            weights = at_the_door(path)
            same = all(torch.equal(weights[name], expected[name]) for name in expected)
            outcomes[path.name] = "same" if same else "other"
        except UserError as error:
            outcomes[path.name] = f"refused: {error}"
        except BaseException as error:  # noqa: BLE001 - that is what the test is for
            outcomes[path.name] = f"raised {error!r}"
        report.write_text(json.dumps(outcomes))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        if grown > MEGABYTES:
            outcomes[path.name] += f" raised memory by {grown:.0f} MB"
            before += grown * 1024
    signal.alarm(0)
    report.write_text(json.dumps(outcomes))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder, report = tmp_path_factory.mktemp("cases"), tmp_path_factory.mktemp("report") / "outcomes.json"
    count = write_cases(folder)
    began = time.monotonic()
    process = multiprocessing.get_context("forkserver").Process(target=try_all, args=(folder, report))
    process.start()
    process.join(300)
    process.kill()
    process.join()
    told = json.loads(report.read_text())
    print(f"{count} files in {time.monotonic() - began:.0f} s")
    assert (process.exitcode, len(told)) == (0, count), f"stopped after {list(told)[-1:]}"
    assert not (folder / CANARY).exists()
    yield told
    shutil.rmtree(folder)


def test_every_file_is_loaded_or_refused_in_one_line(outcomes):
    assert len(outcomes) > 500
    assert not {name: told for name, told in outcomes.items() if "raised" in told or "\n" in told}
    assert {told.split(":")[0] for told in outcomes.values()} == {"same", "other", "refused"}


def test_nothing_hostile_is_loaded_and_checksums_hold(outcomes):
    for kind in ("hostile", "claims", "header", "bytes", "content", "legacy content"):
        loaded = [name for name, told in outcomes.items() if name.startswith(f"{kind} ") and told[:7] != "refused"]
        assert not loaded or kind in ("content", "legacy content"), loaded
    damaged_zips = {told.split(":")[0] for name, told in outcomes.items() if name.startswith("zip ")}
    assert damaged_zips <= {"same", "refused"}
    assert outcomes["archives 0"] == "same"


def test_undamaged_files_of_every_format_are_loaded(tmp_path):
    whole = base()
    deep = {"epoch": 3, "model": {"net": {f"module.{name}": w for name, w in whole["state_dict"].items()}}}
    parameters = {
        name: torch.nn.Parameter(w) if w.is_floating_point() else w for name, w in whole["state_dict"].items()
    }
    for i, content in enumerate(
        (saved(whole), legacy(whole), safetensors(whole["state_dict"]), saved(deep), legacy(parameters))
    ):
        (tmp_path / str(i)).write_bytes(content)
        weights = at_the_door(tmp_path / str(i))
        assert all(torch.equal(weights[name], tensor) for name, tensor in whole["state_dict"].items())


@pytest.mark.parametrize(
    ("arch", "num_class", "told"),
    [
        ("WRN-16-2", 10, "it seems to hold WRN-16-2 with 10 classes: --arch WRN-16-2 --num_class 10"),
        ("WRN-10-1", 43, "of another shape: fc.weight, fc.bias); it seems to hold WRN-10-1 with 43 classes"),
        ("ResNet18", 100, "it seems to hold ResNet18 with 100 classes"),
        ("PreActResNet18", 10, "it seems to hold PreActResNet18 with 10 classes"),
    ],
)
def test_what_does_not_fit_is_told_in_the_users_words(tmp_path, arch, num_class, told):
    torch.save(select_model(arch, num_class).network.state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError) as caught:
        at_the_door(tmp_path / "a.pth")
    assert told in str(caught.value)
    torch.save({"features.0.weight": torch.zeros(3, 3)}, tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"missing: conv1.weight, .* \.\.\.; too many: features.0.weight.* no architecture"
    ):
        at_the_door(tmp_path / "a.pth")
