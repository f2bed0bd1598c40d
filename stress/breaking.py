"""Ways to break a file that know its grammar: JSON, text, tables, safetensors, the zip and the pickle of a .pt, YAML, words.

Each takes what chooses and good content, and returns broken content; nothing else decides. Some leave the content as good as it was.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import re
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

# What stands where something else is expected. Nothing here asks for work without end, and no text is a path that leaves the folder.
NUMBERS = (0, -1, 1, 2, 7, 2**31, -(2**31) - 1, 2**63, 10**30, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "",
    " ",
    "0",
    "-1",
    "1e5",
    "true",
    "null",
    "None",
    "nan",
    "a\0b",
    "\ud800",
    "龙🦐",
    "e\u0301",
    "\u202etxt",
    "a\nb",
    "x" * 5000,
    "{{",
    "%s",
    "--",
)
DATES = ("2020-01-01", "0x1f", "1_000", "1:30", "~", "off", "!!binary aGk=", "!!set {a, b}")
ODD: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"a": 1}, [1, "a"], *NUMBERS, *TEXTS)
LONG_NUMBER = "1" * 5000
CODE = "open('marker', 'w').close()"  # what code in a file would do


def odd(rng: random.Random) -> Any:
    """A value of whatever type, seldom a deep one."""
    if rng.random() < 0.03:
        value: Any = []
        for _ in range(rng.choice((20, 200))):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    return copy.deepcopy(rng.choice(ODD))


def near(rng: random.Random, value: Any) -> Any:
    """A value that is almost the same."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, float(value), str(value), [value]))
    if isinstance(value, str):
        return rng.choice((value[:-1], value + "x", value.upper(), f" {value}", value[::-1], [value], value * 3))
    return rng.choice(([value], {"a": value}, None, str(value)))


def tree(rng: random.Random, value: Any, times: int | None = None) -> Any:
    """A copy of a JSON value with one to three of its parts changed, removed, added, doubled or exchanged."""
    holder = [copy.deepcopy(value)]
    for _ in range(times or rng.choice((1, 1, 1, 2, 3))):
        _change(rng, *rng.choice(list(_parts(holder, whole=rng.random() < 0.05))))
    return holder[0]


def _parts(parent: Any, whole: bool) -> list[tuple[Any, Any]]:
    """(container, key) of all parts of a value that stands in a list of one; the value itself only where `whole`."""
    found: list[tuple[Any, Any]] = []
    waiting: list[tuple[Any, Any]] = [(parent, 0)]
    while waiting:
        container, key = waiting.pop()
        found.append((container, key))
        inner = container[key]
        if isinstance(inner, dict | list):
            waiting += [(inner, each) for each in (inner if isinstance(inner, dict) else range(len(inner)))]
    return found if whole or len(found) == 1 else found[1:]


def _change(rng: random.Random, container: Any, key: Any) -> None:
    how = rng.random()
    if how < 0.45:
        container[key] = odd(rng)
    elif how < 0.7:
        container[key] = near(rng, container[key])
    elif how < 0.8 and len(container) > 1:
        del container[key]
    elif how < 0.9 and isinstance(container, dict):
        container[rng.choice([*TEXTS, f"{key}s", str(key)[1:], str(key).upper()])] = rng.choice((odd(rng), container[key]))
    elif isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    else:
        other = rng.choice(list(container))
        container[key], container[other] = container[other], container[key]


def data(rng: random.Random, content: bytes) -> bytes:
    """Bytes of any format: flipped, cut, inserted, doubled, zeroed, none at all."""
    found = bytearray(content)
    at = rng.randrange(len(found) + 1)
    length = rng.choice((1, 2, 8, 100, 5000))
    how = rng.randrange(8)
    if how <= 2:
        for _ in range(rng.choice((1, 1, 3, 20))):
            if found:
                found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    elif how == 3:
        del found[at:]
    elif how == 4:
        del found[at : at + length]
    elif how == 5:
        found[at:at] = rng.choice((rng.randbytes(length), bytes(length), found[at : at + length]))
    elif how == 6:
        found[at : at + length] = bytes(len(found[at : at + length]))
    else:
        found = bytearray(rng.choice((b"", b"\0", b"\n", rng.randbytes(50), bytes(1000), found[::-1])))
    return bytes(found)


def text(rng: random.Random, content: str) -> bytes:
    """Text in a wrong encoding, with bytes that are none, with marks, NULs, huge lines, other line ends, or cut."""
    how = rng.randrange(12)
    at = rng.randrange(len(content) + 1)
    if how == 0:
        return content.encode(rng.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-7")))
    if how == 1:
        return (content[:at] + "Größe é ñ" + content[at:]).encode(rng.choice(("latin-1", "cp1252", "cp850")), "replace")
    if how == 2:
        return b"\xef\xbb\xbf" * rng.choice((1, 2)) + content.encode()
    if how == 3:
        return data(rng, content.encode())
    if how == 4:
        return content[:at].encode()
    if how == 5:
        return content.replace("\n", rng.choice(("\r\n", "\r", "\n\n", "", "\u2028", "\x0b"))).encode()
    inserted = rng.choice(
        (
            b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x1a", b"\x1b[2J", "\u2028".encode(), "\ufeff".encode(),
            b"x" * 300_000, b" " * 100_000, b"\n" * 3000, b'"', b"\\u12", b"\\ud83d", b"\\", b"<|endoftext|>", b"\n<|endoftext|>\n",
        )
    )  # fmt: skip
    return content[:at].encode() + inserted + content[at:].encode()


def json_text(rng: random.Random, value: Any) -> bytes:
    """A JSON value, changed in itself or in how it is written."""
    if rng.random() < 0.6:
        return json.dumps(tree(rng, value)).encode()
    good = json.dumps(value, indent=rng.choice((None, 2)))
    numbers = [*re.finditer(r"(?<=[ \[:,])-?\d+(\.\d+)?", good)]
    how = rng.randrange(7)
    if how <= 1 and numbers:
        place = rng.choice(numbers)
        return (
            good[: place.start()] + rng.choice((LONG_NUMBER, "1e999", "-Infinity", "NaN", "01", "+1", ".5", "0x1")) + good[place.end() :]
        ).encode()
    if how == 2:
        depth = rng.choice((500, 3000, 200_000))
        return (good[:-1] + f', "deep": {"[" * depth}{"]" * depth}' + good[-1:]).encode()
    if how == 3:
        return re.sub(r'("\w+"): ', r"\1: 1, \1: ", good, count=1).encode()
    if how == 4:
        return (good + rng.choice((",", "}", "\0", good, "//", "\n\n"))).encode()
    if how == 5:
        return good.replace('"', "'").encode()
    return text(rng, good)


def json_lines(rng: random.Random, rows: list[Any]) -> bytes:
    """A row per line, one or more of them broken."""
    lines = [json.dumps(row).encode() for row in rows]
    for _ in range(rng.choice((1, 1, 2))):
        lines[rng.randrange(len(lines))] = json_text(rng, rng.choice(rows))
    return b"\n".join(lines) + rng.choice((b"\n", b""))


def csv_text(rng: random.Random, rows: list[dict[str, Any]]) -> bytes:
    """A table with quotes, separators or columns astray."""
    lines = [",".join(rows[0]), *(",".join('"' + str(value).replace('"', '""') + '"' for value in row.values()) for row in rows)]
    how, at = rng.randrange(6), rng.randrange(len(lines))
    if how == 0:
        lines[at] = lines[at].replace('"', "", 1)
    elif how == 1:
        lines[at] += "," * rng.choice((1, 50))
    elif how == 2:
        lines[0] = rng.choice(("", ",", "text,text", "Text", " text", '"text', "\ufefftext", "a,b", "text;b"))
    elif how == 3:
        lines = [line.replace(",", rng.choice("\t;|")) for line in lines]
    elif how == 4:
        lines.insert(at, '"')
    return text(rng, "\n".join(lines)) if how == 5 else "\n".join(lines).encode()


def parquet(rng: random.Random, rows: list[dict[str, Any]]) -> bytes:
    """A table of other types, columns or compression, or with bytes astray."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    how = rng.randrange(5)
    if how == 0:
        columns = tree(rng, columns)
    elif how == 1:
        columns[rng.choice(list(columns))] = [odd(rng)] * len(rows)
    elif how == 2:
        columns = {name: [None if rng.random() < 0.5 else value for value in values] for name, values in columns.items()}
    try:
        table = pa.table(columns)
    except (pa.ArrowException, TypeError, ValueError, AttributeError, OverflowError):
        table = pa.table({rng.choice(("text", "other")): pa.array([rng.randbytes(5)] * rng.choice((0, 1, 70)))})
    sink = io.BytesIO()
    try:
        pq.write_table(table, sink, compression=rng.choice(("snappy", "gzip", "none", "zstd")))
    except (pa.ArrowException, NotImplementedError):
        return b"PAR1PAR1"
    return data(rng, sink.getvalue()) if how >= 3 else sink.getvalue()


def safetensors(rng: random.Random, content: bytes) -> bytes:
    """Weights whose header lies: about its length, and about names, types, shapes and places; or whose numbers are flipped or cut."""
    if rng.random() < 0.2:
        return data(rng, content)
    length = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    how = rng.randrange(8)
    if how == 0:
        wrong = rng.choice((0, 1, length - 1, length + 1, length + 8, 2**31, 2**63, 2**64 - 1, len(content), len(content) - 8))
        return struct.pack("<Q", wrong) + content[8:]
    if how == 1:
        written = json_text(rng, header)
    else:
        header = _lying(rng, header) if how <= 5 else header
        body = data(rng, body) if how == 6 else _numbers(rng, body) if how == 7 else body
        written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    return struct.pack("<Q", len(written)) + written + body


def _lying(rng: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry = header[name]
    how = rng.randrange(8)
    if how == 0:
        entry["dtype"] = rng.choice(("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", "", None, 3))
    elif how == 1:
        entry["shape"] = rng.choice(
            ([], [0], entry["shape"][::-1], [*entry["shape"], 1], [2**40, 2**40], [-1, 4], [1.5], "4", [2**63], tree(rng, entry["shape"]))
        )
    elif how == 2:
        entry["data_offsets"] = rng.choice(
            ([0, 0], [8, 4], [0, 2**63], [-4, 0], [0], [], "0", header[other]["data_offsets"], tree(rng, entry["data_offsets"]))
        )
    elif how == 3:
        del header[name]
    elif how == 4:
        header[rng.choice((f"{name}x", "", name.replace("model.", ""), other + ".weight", "../x", "a\0", "lm_head.weight"))] = header.pop(
            name
        )
    elif how == 5:
        header["__metadata__"] = rng.choice((None, {}, {"format": "tf"}, {"format": 3}, {"format": "pt", "x": "y" * 100_000}, []))
    elif how == 6:
        header[name], header[other] = header[other], header[name]
    else:
        return tree(rng, header)
    return header


def _numbers(rng: random.Random, body: bytes) -> bytes:
    """Some numbers of float32 weights at the edge: not a number, infinite, huge, denormal."""
    found = bytearray(body)
    wrong = struct.pack("<f", rng.choice((float("nan"), float("inf"), float("-inf"), 3e38, 1e-44)))
    for at in rng.choices(range(0, len(found) - 3, 4), k=rng.choice((1, 1, 100))):
        found[at : at + 4] = wrong
    return bytes(found)


class _Code:
    """Runs `CODE` where a pickle with it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (CODE,)


def pt(rng: random.Random, content: bytes) -> bytes:
    """A .pt file with other values, other tensors, another pickle, another zip, or bytes astray."""
    how = rng.randrange(10)
    if how <= 3:
        return _saved(_values(rng, torch.load(io.BytesIO(content), weights_only=True)))
    if how <= 5:
        return _zipped(_pickle(rng, _entries(content)), rng)
    if how <= 7:
        return _zipped(_members(rng, _entries(content)), rng)
    if how == 8:
        return rng.choice((pickle.dumps(_Code()), pickle.dumps({"format": "recursify/1"}), _saved(odd(rng)), _saved([_Code()])))
    return data(rng, content)


def _saved(value: Any) -> bytes:
    sink = io.BytesIO()
    torch.save(value, sink)
    return sink.getvalue()


def _values(rng: random.Random, content: dict[str, Any]) -> Any:
    """A checkpoint with one of its parts changed."""
    part = rng.choice(list(content))
    if part == "model_state_dict":
        content[part] = _tensors(rng, content[part])
    elif rng.random() < 0.1:
        content.pop(part)
    else:
        content[part] = tree(rng, content[part])
    return content


def _tensors(rng: random.Random, state: dict[str, Any]) -> Any:
    names = list(state)
    name = rng.choice(names)
    tensor = state[name]
    how = rng.randrange(9)
    if how == 0:
        del state[name]
    elif how == 1:
        other_name: Any = rng.choice((f"{name}x", "", "x", 3, None))
        state[other_name] = state.pop(name)
    elif how == 2:
        state[name] = odd(rng)
    elif how == 3:
        state[name] = rng.choice(
            (
                tensor.transpose(0, -1) if tensor.ndim else tensor,
                tensor[:0],
                tensor.flatten(),
                tensor[None],
                tensor.sum(),
                tensor.to_sparse(),
            )
        )
    elif how == 4:
        kinds = (torch.float64, torch.int64, torch.bool, torch.complex64, torch.bfloat16, torch.uint8, torch.float8_e4m3fn)
        state[name] = tensor.to(rng.choice(kinds))
    elif how == 5:
        state[name] = torch.zeros(1).expand(rng.choice((10, 10**6, 10**12)), 1)  # one number, of a shape that would fill memory
    elif how == 6:
        state[name] = torch.full_like(tensor, rng.choice((float("nan"), float("inf"), 3e38)))
    elif how == 7:
        return {}
    else:
        state[name], other = state[names[0]], state[name]
        state[names[0]] = other
    return state


def _entries(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(each.filename, archive.read(each)) for each in archive.infolist()]


def _pickle(rng: random.Random, entries: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Entries with another pickle: one that runs code by itself or before the rest, names of functions, flipped bytes."""
    at = next(number for number, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
    name, good = entries[at]
    code = f"cbuiltins\nexec\n(V{CODE}\ntR0".encode()
    names = (b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nload\n", b"ctorch.storage\n_load_from_bytes\n", b"cbuiltins\ngetattr\n")
    numbers = (b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"K\x00", b"\x8a\x09" + b"\xff" * 8 + b"\x00")
    new = rng.choice(
        (
            pickle.dumps(_Code(), protocol=2), good[:2] + code + good[2:],
            re.sub(rb"c(torch\._utils|collections)\n\w+\n", rng.choice(names), good, count=rng.choice((0, 1))),
            re.sub(rb"K.", rng.choice(numbers), good, count=1, flags=re.DOTALL),
            good.replace(b"FloatStorage", rng.choice((b"LongStorage", b"BoolStorage", b"XStorage"))),
            good.replace(b"recursify/1", b"recursify/2"), data(rng, good), data(rng, good),
        )
    )  # fmt: skip
    return [*entries[:at], (name, new), *entries[at + 1 :]]


def _members(rng: random.Random, entries: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Entries with one broken, dropped, doubled or renamed."""
    at = rng.randrange(len(entries))
    name, content = entries[at]
    how = rng.randrange(5)
    if how == 0:
        return [*entries[:at], *entries[at + 1 :]]
    if how == 1:
        return [*entries, (name, data(rng, content))]
    if how == 2:
        renamed = rng.choice(("../marker", "/tmp/x", "", "a/" * 200, name.upper(), name.replace("/", "//")))
        return [*entries[:at], (renamed, content), *entries[at + 1 :]]
    changed = data(rng, content) if how == 3 else content + bytes(rng.choice((1, 3 * 10**7)))
    return [*entries[:at], (name, changed), *entries[at + 1 :]]


def _zipped(entries: list[tuple[str, bytes]], rng: random.Random) -> bytes:
    sink = io.BytesIO()
    packed = zipfile.ZIP_DEFLATED if sum(len(content) for _, content in entries) > 10**7 or rng.random() < 0.2 else zipfile.ZIP_STORED
    with zipfile.ZipFile(sink, "w", packed) as archive:
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content, packed)
    return sink.getvalue()


def recipe(rng: random.Random, sections: dict[str, Any]) -> bytes:
    """YAML, changed in its values or in how they are written: tags that would run code, references without end, tabs, several documents."""
    if rng.random() < 0.5:
        changed = json.loads(json.dumps(tree(rng, sections)))
        return yaml.dump(changed, allow_unicode=True, default_flow_style=rng.choice((None, True, False))).encode("utf-8", "surrogatepass")
    good = yaml.safe_dump(sections)
    lines = good.splitlines()
    at = rng.randrange(len(lines))
    key = lines[at].split(":")[0]
    odds = (
        f"!!python/object/apply:builtins.exec [\"{CODE}\"]", "!!python/name:os.system", "&x [*x]", "*nothing", "[", "{a: ", "!!float x",
        LONG_NUMBER, "0" + LONG_NUMBER, "|", "'", "@", "%", "!!timestamp 2020-99-99", "2020-13-45", "2001-01-01 99:99:99", "!!int x",
        "!!int ''", "!!null x", "<<: 3", *DATES,
    )  # fmt: skip
    lines[at] = f"{key}: {rng.choice(odds)}"
    choices: tuple[Callable[[], bytes], ...] = (
        lambda: "\n".join(lines).encode(),
        lambda: "\n".join(lines).encode(),
        lambda: _bomb_in(rng, good),
        lambda: _bomb_in(rng, good),
        lambda: (good + "\nconvert: &c [*c]\ngenerate: *c\n").encode(),
        lambda: good.replace("  ", "\t").encode(),
        lambda: (good + "---\n" + good).encode(),
        lambda: (good + good).encode(),
        lambda: ("x: " + "[" * (depth := rng.choice((50, 5000))) + "]" * depth + "\n" + good).encode(),
        lambda: text(rng, good),
    )
    return rng.choice(choices)()


def _bomb_in(rng: random.Random, good: str) -> bytes:
    """References to references, many times larger than any memory if written out, in place of a section or of a value."""
    name = rng.choice(("<<", "about", *re.findall(r"^  (\w+):", good, re.MULTILINE)))
    bomb = "[&a0 [x, x]" + "".join(f", &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)) + "]"
    changed = re.sub(rf"^( *{name}:).*", r"\1 *a11", good, count=1, flags=re.MULTILINE)
    return f"cost: {bomb}\n{changed}".encode()


def words(rng: random.Random, good: list[str], flags: list[str], lasting: frozenset[str]) -> list[str]:
    """A command line with words dropped, doubled, exchanged or replaced, and flags added.

    Args:
        flags: Those of the command.
        lasting: Flags of which a large value is a long job, and no mistake: they get no other than mistaken ones.
    """
    found = list(good)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(1, len(found)) if len(found) > 1 else 0
        how = rng.randrange(8)
        if how == 0 and len(found) > 1:
            del found[at]
        elif how == 1:
            found.insert(at, found[at])
        elif how == 2:
            found[at] = word(rng, found[at - 1] in lasting)
        elif how == 3:
            found = [*found[:at], *found[at:][::-1]]
        elif how == 4:
            found[at] = (
                rng.choice((found[at].upper(), found[at][:-1], found[at].replace("_", "-"), found[at].replace("--", "-"), f"{found[at]}="))
                or "-"
            )
        else:
            flag = rng.choice([f"--{name}" for name in flags] + ["--", "-", "-x", "--no_such", "--🦐", "--config", "--version", "-h"])
            value = word(rng, flag in lasting)
            found += rng.choice(([flag], [flag, value], [f"{flag}={value}"], [flag, value, word(rng, flag in lasting)]))
    return found


def word(rng: random.Random, lasting: bool) -> str:
    """A value on a command line."""
    if lasting:
        return rng.choice(("-1", "0", "1", "2", "x", "", "nan", "1e3", "🦐", "-" + LONG_NUMBER))
    texts = [each for each in TEXTS if "\0" not in each and each != "\ud800"]
    numbers = [str(each) for each in NUMBERS]
    return rng.choice(
        [
            *texts,
            *numbers,
            LONG_NUMBER,
            "\udcff",
            "1,2",
            "1,,2",
            "a,b",
            "[1]",
            "1e999",
            "١",
            "text.txt",
            "model.pt",
            "donor",
            "wikitext",
            "gsm8k:",
            "a:b=c",
            ".",
        ]
    )
