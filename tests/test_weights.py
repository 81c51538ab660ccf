"""Weights out and back in: bit for bit, whole or not at all, and never without their contract."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftv2 import weights
from swiftv2.config.model import LossConfig, MaskConfig, ModelConfig
from swiftv2.errors import SwiftError
from swiftv2.files import sha256
from swiftv2.models import SimMIM, Swin4D
from swiftv2.weights import Card

CONFIG = ModelConfig(
    name="small",
    image_size=(8, 8, 8),
    frames=4,
    embed_dim=12,
    depths=(1, 1),
    num_heads=(2, 2),
    patch_size=(2, 2, 2, 2),
    window_size=(2, 2, 2, 2),
    first_window_size=(2, 2, 2, 2),
)
MASK = MaskConfig(patch_size=(4, 4, 4, 2))
INPUT: dict[str, Any] = {
    "orientation": "RAS",
    "space": "MNI152NLin2009cAsym",
    "grid": [8, 8, 8],
    "voxel_mm": [4.0, 4.0, 4.0],
    "tr_seconds": 0.8,
    "frames": 4,
    "normalisation": {"kind": "znorm_minback", "scope": "run"},
    "mask": "template",
}


def card(**changes: Any) -> dict[str, Any]:
    tree = {
        "kind": "simmim",
        "model": CONFIG.model_dump(mode="json"),
        "mask": MASK.model_dump(mode="json"),
        "loss": LossConfig().model_dump(mode="json"),
        "input": INPUT,
        "subjects": weights.hash_subjects(["a", "b"], "00ff").model_dump(mode="json"),
        "provenance": {"step": 3},
    }
    return tree | changes


@pytest.fixture
def simmim() -> SimMIM:
    return SimMIM(CONFIG, MASK, LossConfig(), seed=4)


@pytest.fixture
def folder(tmp_path: Path, simmim: SimMIM) -> Path:
    weights.export(tmp_path / "out", simmim, card())
    return tmp_path / "out"


def test_simmim_comes_back_bit_for_bit(folder: Path, simmim: SimMIM) -> None:
    again = weights.load_simmim(folder)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in simmim.state_dict().items())
    batch = torch.randn(1, 1, 8, 8, 8, 4), torch.rand(1, 2, 2, 2, 2) < 0.5, torch.ones(1, 8, 8, 8, dtype=torch.bool)
    assert torch.equal(again(*batch).reconstruction, simmim(*batch).reconstruction)
    again(*batch).clip_loss.mean().backward()


def test_the_encoder_comes_out_of_either_kind(folder: Path, simmim: SimMIM, tmp_path: Path) -> None:
    weights.export(tmp_path / "encoder", simmim.encoder, card(kind="encoder", mask=None, loss=None))
    volume = torch.randn(1, 1, 8, 8, 8, 4)
    for path in (folder, tmp_path / "encoder"):
        assert torch.equal(weights.load_encoder(path)(volume), simmim.encoder(volume))
    with pytest.raises(SwiftError, match="holds an encoder alone"):
        weights.load_simmim(tmp_path / "encoder")


def test_the_card_comes_back(folder: Path) -> None:
    read = weights.read_card(folder)
    assert read.model == CONFIG
    assert read.input.normalisation.kind == "znorm_minback"
    assert read.subjects is not None
    assert weights.hash_subject("a", read.subjects.salt) in read.subjects.hashes
    assert "a" not in read.subjects.hashes
    assert read.bytes == (folder / weights.TENSORS).stat().st_size
    assert sorted(p.name for p in folder.parent.iterdir()) == ["out"]


def test_state_dicts_in_bf16_keep_their_format(tmp_path: Path, simmim: SimMIM) -> None:
    weights.export(tmp_path / "out", simmim.to(torch.bfloat16).state_dict(), card())
    assert weights.load_encoder(tmp_path / "out").norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", [weights.TENSORS, weights.CARD])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(SwiftError, match=name):
        weights.load(folder)


def test_truncated_and_altered_tensors_are_refused(folder: Path) -> None:
    path = folder / weights.TENSORS
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(SwiftError, match="cut short"):
        weights.load(folder)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(SwiftError, match="SHA-256"):
        weights.load(folder)


def recard(folder: Path, **changes: Any) -> None:
    path = folder / weights.CARD
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_file_that_is_not_safetensors_is_refused(folder: Path) -> None:
    path = folder / weights.TENSORS
    path.write_bytes(b"not tensors")
    recard(folder, bytes=11, sha256=sha256(path))
    with pytest.raises(SwiftError, match="not a safetensors file"):
        weights.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": CONFIG.model_dump(mode="json") | {"depths": [2, 1]}}, "lacks encoder.layers.0.blocks.1"),
        ({"model": CONFIG.model_dump(mode="json") | {"qkv_bias": False}}, "has unknown encoder.layers.0"),
        ({"model": CONFIG.model_dump(mode="json") | {"embed_dim": 24}}, "has shape"),
        ({"colour": "red"}, "unknown key colour"),
        ({"format": 2}, "format"),
        ({"mask": None}, "needs mask and loss"),
    ],
)
def test_a_card_that_does_not_fit_is_refused_in_one_line(folder: Path, change: dict[str, Any], message: str) -> None:
    recard(folder, **change)
    with pytest.raises(SwiftError, match=message) as error:
        weights.load_simmim(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_card_that_is_no_card_is_refused(folder: Path, text: str) -> None:
    (folder / weights.CARD).write_text(text)
    with pytest.raises(SwiftError, match=weights.CARD):
        weights.read_card(folder)


def test_weights_that_need_mup_are_not_loaded_without(folder: Path) -> None:
    recard(folder, mup={"base_embed_dim": 36})
    with pytest.raises(SwiftError, match="muP"):
        weights.load(folder)


def test_a_refused_export_leaves_nothing(tmp_path: Path, simmim: SimMIM, folder: Path) -> None:
    state = simmim.state_dict()
    state.pop("mask_token")
    with pytest.raises(SwiftError, match="lacks mask_token"):
        weights.export(tmp_path / "new", state, card())
    with pytest.raises(SwiftError, match="already exists"):
        weights.export(folder, simmim, card())
    (tmp_path / "file").write_text("")
    with pytest.raises(SwiftError, match="cannot be written"):
        weights.export(tmp_path / "file" / "new", simmim, card())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]


def test_an_interrupted_export_leaves_nothing(tmp_path: Path, simmim: SimMIM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt(path)

    monkeypatch.setattr(weights, "sync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        weights.export(tmp_path / "new", simmim, card())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"orientation": "LAS"}, r"orientation LAS \(made for RAS\)"),
        ({"grid": [8, 8, 9]}, "grid"),
        ({"voxel_mm": [2.0, 4.0, 4.0]}, "voxel_mm"),
        ({"tr_seconds": 2.0}, "tr_seconds"),
        ({"tr_seconds": None}, "tr_seconds unknown"),
        ({"space": "Talairach"}, "space"),
        ({"frames": 5}, "frames"),
        ({"stride_within": 2}, "stride_within"),
        ({"normalisation": {"kind": "minmax"}}, r"normalisation minmax by run \(made for znorm_minback by run\)"),
    ],
)
def test_input_that_the_weights_were_not_made_for_is_refused(change: dict[str, Any], message: str) -> None:
    made_for = Card.model_validate(card())
    weights.check_contract(made_for, INPUT | {"frames": 3, "tr_seconds": 0.8000001})
    with pytest.raises(SwiftError, match=message):
        weights.check_contract(made_for, INPUT | change)


def test_decoupled_models_take_longer_clips_than_they_were_trained_on() -> None:
    model = CONFIG.model_dump(mode="json") | {"variant": "decoupled", "embed_dim": 24}
    made_for, longer = Card.model_validate(card(model=model)), INPUT | {"frames": 40}
    weights.check_contract(made_for, longer)
    with pytest.raises(SwiftError, match="tr_seconds") as error:
        weights.check_contract(made_for, longer | {"tr_seconds": 2.0})
    assert "frames" not in str(error.value)


V1 = ModelConfig.model_validate(CONFIG.model_dump() | {"variant": "swift_v1", "patch_size": (2, 2, 2, 1)})
HYPER: dict[str, Any] = {
    "img_size": [8, 8, 8, 4],
    "embed_dim": 12,
    "first_window_size": [2, 2, 2, 2],
    "window_size": [2, 2, 2, 2],
    "patch_size": [2, 2, 2, 1],
    "depths": [1, 1],
    "num_heads": [2, 2],
    "last_layer_full_MSA": True,
    "learning_rate": 1e-3,
}
V1_INPUT = {"space": None, "voxel_mm": [2, 2, 2], "tr_seconds": 0.72, "normalisation": {"kind": "znorm_zeroback"}}


def lightning(path: Path, **changes: Any) -> Path:
    state = {f"model.{k}": v for k, v in Swin4D(V1, seed=9).state_dict().items()}
    state["output_head.hidden.weight"] = torch.zeros(2)
    torch.save({"state_dict": state, "hyper_parameters": HYPER, "epoch": 3} | changes, path)
    return path


@pytest.mark.parametrize("wrap", [dict, lambda h: argparse.Namespace(**h)])
def test_swift_v1_checkpoints_become_exports(tmp_path: Path, wrap: Any) -> None:
    path = lightning(tmp_path / "v1.ckpt", hyper_parameters=wrap(HYPER))
    model, made = weights.import_swift_v1(path, V1_INPUT)
    assert made.input.orientation == "LAS"
    assert made.input.grid == (8, 8, 8)
    weights.export(tmp_path / "v1", model, made)
    volume = torch.randn(1, 1, 8, 8, 8, 4)
    assert torch.equal(weights.load_encoder(tmp_path / "v1")(volume), Swin4D(V1, seed=9)(volume))


def test_swift_v1_checkpoints_that_tell_too_little_are_refused(tmp_path: Path) -> None:
    path = lightning(tmp_path / "v1.ckpt", hyper_parameters={})
    with pytest.raises(SwiftError, match="last_layer_full_MSA not given"):
        weights.import_swift_v1(path, V1_INPUT)
    config = {k: v for k, v in HYPER.items() if k != "learning_rate"}
    assert weights.import_swift_v1(path, V1_INPUT, config)[0].config.embed_dim == 12
    with pytest.raises(SwiftError, match="LAS"):
        weights.import_swift_v1(path, V1_INPUT | {"orientation": "RAS"}, config)
    with pytest.raises(SwiftError, match=r"input.normalisation is required"):
        weights.import_swift_v1(path, {k: v for k, v in V1_INPUT.items() if k != "normalisation"}, config)


class Payload:
    """Would write a file if a loader ran it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    path = lightning(tmp_path / "v1.ckpt", callbacks=Payload(tmp_path / "owned"))
    with pytest.raises(SwiftError, match="without running code"):
        weights.import_swift_v1(path, V1_INPUT)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken"])
def test_damaged_checkpoints_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "v1.ckpt"
    path.write_bytes(content)
    with pytest.raises(SwiftError, match=r"v1\.ckpt"):
        weights.import_swift_v1(path, V1_INPUT)


def test_a_checkpoint_without_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 1}, tmp_path / "v1.ckpt")
    with pytest.raises(SwiftError, match="no state_dict"):
        weights.import_swift_v1(tmp_path / "v1.ckpt", V1_INPUT)
