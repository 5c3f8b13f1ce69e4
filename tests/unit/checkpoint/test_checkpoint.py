"""Checkpoints are read by boxes, refused with everything that is wrong, and written whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_rl import checkpoint
from nemo_rl.refit.layout import Holding, TensorMeta, TensorTable
from nemo_rl.refit.region import Region

TABLE: TensorTable = {
    "a.weight": TensorMeta((6, 4), torch.float32),
    "b.bias": TensorMeta((5,), torch.float32),
    "c.weight": TensorMeta((3, 2, 2), torch.float32),
}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.randn(meta.shape) for name, meta in TABLE.items()}


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Two files and an index."""
    root = tmp_path / "model"
    root.mkdir()
    files = {"one.safetensors": ["a.weight"], "two.safetensors": ["b.bias", "c.weight"]}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, root / file)
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "config.json").write_text(json.dumps({"model_type": "toy", "torch_dtype": "float32"}))
    (root / "tokenizer.json").write_text("{}")
    (root / "pytorch_model.bin").write_text("old weights")
    return root


def box(fqn: str, offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Holding:
    wide = torch.full((*sizes[:-1], sizes[-1] + 3), torch.nan, dtype=dtype)
    return Holding(fqn, Region(offsets, sizes), wide[..., 1:-2])


def whole(tensors: dict[str, torch.Tensor]) -> list[Holding]:
    return [Holding(name, Region.whole(tuple(t.shape)), t) for name, t in tensors.items()]


def test_a_rank_reads_its_own_boxes_into_strided_views(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    mine = [box("a.weight", (2, 1), (3, 2)), box("b.bias", (4,), (1,)), box("c.weight", (1, 0, 1), (2, 2, 1))]
    checkpoint.read_into(mine, folder)
    for h in mine:
        assert torch.equal(h.view, tensors[h.fqn][h.region.slices_in(Region.whole(TABLE[h.fqn].shape))])


def test_values_are_converted_to_the_dtype_of_the_reader(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    half = box("a.weight", (0, 0), (6, 4), torch.bfloat16)
    checkpoint.read_into([half], folder)
    assert torch.equal(half.view, tensors["a.weight"].bfloat16())
    assert checkpoint.check(folder, {n: TensorMeta(m.shape, torch.bfloat16) for n, m in TABLE.items()}) == []


def test_check_names_every_violation_with_its_remedy(folder: Path) -> None:
    save_file({"b.bias": torch.zeros(5, dtype=torch.int8), "d.weight": torch.zeros(1)}, folder / "two.safetensors")
    table = {**TABLE, "a.weight": TensorMeta((6, 5), torch.float32)}
    found = checkpoint.check(folder, table)
    said = "\n".join(found)
    assert "1 tensors are missing: c.weight; fetch" in said
    assert "a.weight: one.safetensors holds shape (6, 4), the model needs (6, 5); fix config.json" in said
    assert "b.bias: two.safetensors holds dtype I8, which is none of F32, BF16, F16" in said
    assert "1 tensors that the model does not have: d.weight" in said
    assert len(found) == 4
    assert not any("d.weight" in f for f in checkpoint.check(folder, table, droppable={"d.weight"}))


def test_read_into_refuses_all_at_once_and_reads_nothing(folder: Path) -> None:
    good, outside, missing = box("b.bias", (0,), (5,)), box("a.weight", (4, 0), (3, 4)), box("z", (0,), (1,))
    with pytest.raises(ValueError, match=r"(?s)missing: z.*a.weight: .* reads up to \(7, 4\)"):
        checkpoint.read_into([good, outside, missing], folder)
    assert bool(good.view.isnan().all())


@pytest.mark.parametrize("size", [0, 4, 40, -1])
def test_truncated_files_are_refused_by_name(folder: Path, size: int) -> None:
    path = folder / "two.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:size])
    (text,) = checkpoint.check(folder, TABLE)
    assert str(path) in text and "truncated" in text and "fetch the file again" in text
    with pytest.raises(ValueError, match="truncated"):
        checkpoint.read_into([box("a.weight", (0, 0), (1, 1))], folder)


def test_damaged_headers_and_lost_files_are_refused_together(folder: Path) -> None:
    path = folder / "one.safetensors"
    data = bytearray(path.read_bytes())
    data[8:12] = b"xxxx"
    path.write_bytes(bytes(data))
    (folder / "two.safetensors").unlink()
    said = checkpoint.check(folder, TABLE)
    assert any("header is damaged" in s and "one.safetensors" in s for s in said)
    assert any("two.safetensors is missing, though model.safetensors.index.json names it" in s for s in said)
    assert len(said) == 2


def test_folders_without_weights_and_broken_indices_are_refused(folder: Path, tmp_path: Path) -> None:
    (text,) = checkpoint.check(tmp_path / "empty", TABLE)
    assert "no *.safetensors file" in text
    (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')
    (text,) = checkpoint.check(folder, TABLE)
    assert "not an index of safetensors files" in text


@pytest.mark.parametrize("file_bytes", [1, 120, 1 << 20])
def test_what_is_written_is_what_was_held(
    folder: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], file_bytes: int
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.safetensors").write_text("from an earlier export")
    a = tensors.pop("a.weight")
    rows = [Holding("a.weight", Region((0, c), (6, 2)), a[:, c : c + 2]) for c in (0, 2)]
    checkpoint.write([*rows, rows[0], *whole(tensors)], TABLE, out, beside=folder, file_bytes=file_bytes)
    assert checkpoint.check(out, TABLE) == []
    loaded = {k: v for path in out.glob("*.safetensors") for k, v in load_file(path).items()}
    assert all(torch.equal(loaded[n], t) for n, t in {**tensors, "a.weight": a}.items())
    assert len(list(out.glob("*.safetensors"))) == {1: 3, 120: 2, 1 << 20: 1}[file_bytes]
    assert {"config.json", "tokenizer.json"} <= {p.name for p in out.iterdir()}
    assert not (out / "pytorch_model.bin").exists()
    assert json.loads((out / "config.json").read_text()) == {"model_type": "toy", "dtype": "float32"}


def test_holes_overlaps_and_strangers_are_not_written(folder: Path, tmp_path: Path) -> None:
    ones = torch.ones(6, 4)
    held = [
        Holding("a.weight", Region((0, 0), (4, 4)), ones[:4]),
        Holding("a.weight", Region((3, 0), (2, 4)), ones[:2]),
        Holding("b.bias", Region((0,), (3,)), torch.ones(3)),
        Holding("x", Region((0,), (3,)), torch.ones(3)),
    ]
    with pytest.raises(ValueError) as error:
        checkpoint.write(held, TABLE, tmp_path / "out", beside=folder)
    for text in (
        "x: held, but not a tensor of the model",
        "a.weight: box [3:5, 0:4] overlaps",
        "b.bias: the ranks hold 3 of 5 elements",
        "c.weight: the ranks hold 0 of 12 elements",
    ):
        assert text in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_source_folder_is_never_overwritten(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="export to another one"):
        checkpoint.write(whole(tensors), TABLE, folder, beside=folder)


def test_a_failed_write_leaves_no_complete_folder(
    folder: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").mkdir()
    with pytest.raises(OSError, match=r"export to .*out failed: model.safetensors"):
        checkpoint.write(whole(tensors), TABLE, out, beside=folder)
    assert not (out / "config.json").exists()


def test_differences_are_told_by_box_and_bit(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    mine = [box("a.weight", (2, 1), (3, 2)), box("b.bias", (4,), (1,), torch.bfloat16), box("b.bias", (5,), (0,))]
    checkpoint.read_into(mine, folder)
    assert checkpoint.differences([*mine, *whole(tensors)], folder) == []
    mine[0].view[1, 1] = -mine[0].view[1, 1]
    found = checkpoint.differences(mine, folder)
    assert found == [f"a.weight [2:5, 1:3]: 1 of 6 elements are not those of {folder}"]
    tensors["c.weight"].view(torch.int32)[0, 0, 0] ^= 1
    assert [text.split(":")[0] for text in checkpoint.differences(whole(tensors), folder)] == ["c.weight [0"]
