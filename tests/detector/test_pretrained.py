"""Weight files: what is read, what is refused, and that no code in them ever runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pbd_ray.detector.pretrained import Import, PretrainedError, read_weights

ONE = {"weight": torch.ones(2)}
TWO = {"weight": torch.full((2,), 2.0)}


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    torch.save({"epoch": 3}, tmp_path / "meta.pth")
    torch.save({}, tmp_path / "empty.pth")
    for name, message in (
        ("none.safetensors", "no such file"),
        ("junk.safetensors", "not a safetensors file"),
        ("junk.pth", "cannot be read as weights only"),
        ("meta.pth", "expected a mapping of names to tensors"),
        ("empty.pth", "expected a mapping of names to tensors"),
    ):
        with pytest.raises(PretrainedError, match=message) as error:
            read_weights(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["state_dict_ema", "state_dict", "model", "module"])
def test_where_checkpoints_keep_their_tensors(tmp_path: Path, key: str) -> None:
    """With what else VideoMAE's release keeps there: its command line."""
    torch.save({"args": argparse.Namespace(lr=1e-3), key: ONE, "epoch": 7}, tmp_path / "c.pth")
    assert list(read_weights(tmp_path / "c.pth").tensors) == ["weight"]
    torch.save(ONE, tmp_path / "plain.pth")
    assert list(read_weights(tmp_path / "plain.pth").tensors) == ["weight"]


def test_ema_is_preferred_unless_told_otherwise(tmp_path: Path) -> None:
    torch.save({"state_dict": ONE, "state_dict_ema": TWO}, tmp_path / "c.pth")
    assert float(read_weights(tmp_path / "c.pth").tensors["weight"][0]) == 2.0
    assert float(read_weights(tmp_path / "c.pth", ema=False).tensors["weight"][0]) == 1.0


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("exploded"),)


def test_pickled_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Bomb()}, tmp_path / "evil.pth")
    with pytest.raises(
        PretrainedError, match="cannot be read as weights only: pickled getattr in it"
    ) as error:
        read_weights(tmp_path / "evil.pth")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_facts_of_the_model(tmp_path: Path) -> None:
    """In the metadata, else beside the file; a config.json of anything else is not looked at."""
    save_file(ONE, tmp_path / "w.safetensors")
    assert read_weights(tmp_path / "w.safetensors").facts == {}
    beside = tmp_path / "config.json"
    for text in ("not json", "[1]", json.dumps({"format_version": 1, "classes": []})):
        beside.write_text(text)
        assert read_weights(tmp_path / "w.safetensors").facts == {}
    beside.write_text(json.dumps({"num_attention_heads": 3}))
    assert read_weights(tmp_path / "w.safetensors").facts == {"num_attention_heads": 3}
    save_file(ONE, tmp_path / "w.safetensors", metadata={"config": json.dumps({"num_attention_heads": 6})})
    assert read_weights(tmp_path / "w.safetensors").facts == {"num_attention_heads": 6}


def test_report_in_one_line() -> None:
    work = Import("w.pth", {key: torch.zeros(1) for key in ("weight", "bias", "head.a", "head.b")})
    work.values = {"weight": work.take("weight", 1).view(1, 1), "bias": work.take("bias")}
    for key in ("head.a", "head.b", "weight", "absent"):
        work.ignore(key, "a classifier")
    report = work.write(torch.nn.Linear(1, 1))
    assert report.text() == "w.pth: 2 tensors loaded; 2 ignored: a classifier"
