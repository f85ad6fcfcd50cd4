"""The reader of safetensors files, against the library."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from loraplex.engine.adapters.open_file import NotRegularFileError
from loraplex.engine.adapters.safetensors_file import (
    DamagedFileError,
    open_safetensors,
    parse_header,
)


def read_all(path: Path, names: list[str] | None = None) -> dict[str, torch.Tensor]:
    with open_safetensors(path) as file:
        places = parse_header(file.read_header(), file.status.st_size)
        names = list(places) if names is None else names
        wanted = [places[name] for name in names]
        if not wanted:
            return {}
        arrays = [np.full(place.num_bytes, 0xAA, dtype=np.uint8) for place in wanted]
        file.read(zip(wanted, arrays, strict=True))
        return {
            name: torch.from_numpy(array.copy()).view(place.dtype).view(place.shape)
            for name, place, array in zip(names, wanted, arrays, strict=True)
        }


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return got.keys() == want.keys() and all(
        got[name].dtype == want[name].dtype
        and got[name].shape == want[name].shape
        and torch.equal(got[name].view(torch.uint8), want[name].view(torch.uint8))
        for name in want
    )


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return {
        f"t{i}": torch.randn(3 + i, 2 * i + 1, generator=generator).to(dtypes[i % 4])
        for i in range(9)
    } | {"bytes": torch.arange(7, dtype=torch.uint8), "flags": torch.tensor([True, False])}


def test_reads_what_the_library_wrote(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "file"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    assert same(read_all(path), safetensors.torch.load_file(path))
    rng = random.Random(1)
    for _ in range(30):  # any of them, in one run or many
        names = rng.sample(sorted(tensors), rng.randrange(1, 6))
        assert same(read_all(path, names), {name: tensors[name] for name in names})


def test_whatever_it_accepts_the_library_accepts(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Headers with values changed, bytes flipped, cut or added."""
    data = safetensors.torch.save(tensors)
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    rng, accepted = random.Random(0), 0
    path = tmp_path / "file"
    for attempt in range(400):
        changed = _damage(header, body, rng) if attempt % 2 else _flip(data, rng)
        path.write_bytes(changed)
        try:
            got = read_all(path)
        except (DamagedFileError, UnicodeEncodeError):
            continue
        accepted += 1
        assert same(got, safetensors.torch.load(changed))
    assert 5 < accepted < 395


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randrange(3)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed[: len(changed) - rng.choice((0, 0, 0, 1, 40))])


def _damage(header: dict[str, Any], body: bytes, rng: random.Random) -> bytes:
    copy = json.loads(json.dumps(header))
    name = rng.choice(sorted(copy))
    entry, what = copy[name], rng.randrange(7)
    if what == 0:
        entry["data_offsets"][rng.randrange(2)] += rng.choice((-8, -1, 1, 8, 1 << 70))
    elif what == 1:
        entry["shape"][0] += rng.choice((-9, -1, 1))
    elif what == 2:
        entry["dtype"] = rng.choice(("F32", "F64", "Q4", 3))
    elif what == 3:
        del entry[rng.choice(sorted(entry))]
    elif what == 4:
        copy["__metadata__"] = {"note": "harmless"}
    elif what == 5:
        del copy[name]
    text = json.dumps(copy).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data, reason in (
        (b"", "header is not whole"), (b"\xff" * 64, "header is not whole"),
        ((4).to_bytes(8, "little") + b"[[[[", "no JSON"),
        ((2).to_bytes(8, "little") + b"[]", "no map"),
        ((2).to_bytes(8, "little") + b"{}x", "11 bytes, its header says 10"),
    ):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(DamagedFileError, match=reason):
            read_all(path)
    with pytest.raises(NotRegularFileError), open_safetensors(tmp_path):
        pass
    with pytest.raises(SafetensorError):
        safetensors.torch.load(b"\xff" * 64)


def test_truncated_while_it_is_read(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "file"
    safetensors.torch.save_file(tensors, path)
    with open_safetensors(path) as file:
        places = list(parse_header(file.read_header(), file.status.st_size).values())
        with path.open("r+b") as other:
            other.truncate(path.stat().st_size - 30)
        with pytest.raises(DamagedFileError, match="truncated while"):
            file.read((place, np.empty(place.num_bytes, dtype=np.uint8)) for place in places)
