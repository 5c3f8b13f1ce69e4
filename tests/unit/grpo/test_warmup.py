"""The start model: made once, equal on every machine, and what vLLM and the trainers load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_rl.grpo import warmup
from nemo_rl.grpo.data import EOS, byte_tokenizer, load_tokenizer
from nemo_rl.grpo.types import RunError
from nemo_rl.grpo.warmup import ensure_start_model, start_model_path
from nemo_rl.schema import Config, StartModelConfig


def configured(folder: Path, **settings: object) -> Config:
    small = StartModelConfig(
        hidden_size=32, intermediate_size=32, head_dim=8, warmup_steps=4, warmup_batch_size=4, cache_dir=str(folder)
    )
    return Config(start_model=replace(small, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_made_once_and_again_the_same(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ensure_start_model(configured(tmp_path / "a", kind=kind, moe_intermediate_size=16))
    second = ensure_start_model(configured(tmp_path / "b", kind=kind, moe_intermediate_size=16))
    weights = [load_file(folder / "model.safetensors") for folder in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert load_tokenizer(first).get_vocab() == byte_tokenizer().get_vocab()
    monkeypatch.setattr(warmup, "warm_up", lambda *_: pytest.fail("the cached model was made again"))
    assert ensure_start_model(configured(tmp_path / "a", kind=kind, moe_intermediate_size=16)) == first


def test_another_run_was_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, made = configured(tmp_path, warmup_steps=1), warmup.warm_up

    def meanwhile(*args: object) -> object:
        monkeypatch.setattr(warmup, "warm_up", made)
        ensure_start_model(config)
        return made(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(warmup, "warm_up", meanwhile)
    path = ensure_start_model(config)
    assert (path / "model.safetensors").is_file() and list(tmp_path.iterdir()) == [path]


def test_config_names_the_end_token(tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = ensure_start_model(configured(tmp_path, warmup_steps=1))
    assert AutoConfig.from_pretrained(folder).eos_token_id == byte_tokenizer().token_to_id(EOS)


def test_other_settings_are_another_model(tmp_path: Path) -> None:
    base = configured(tmp_path)
    others = [configured(tmp_path, seed=1), configured(tmp_path, kind="moe"), configured(tmp_path, warmup_steps=5)]
    others.append(replace(base, data=replace(base.data, max_items=5)))
    assert len({start_model_path(c) for c in [base, *others]}) == 5


def test_a_failed_warm_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(warmup, "warm_up", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        ensure_start_model(configured(tmp_path))
    assert not list(tmp_path.iterdir())


def test_warm_up_learns(tmp_path: Path) -> None:
    """Loss on answers falls well below that of a uniform guess."""
    config = configured(tmp_path, warmup_steps=60, warmup_batch_size=16, warmup_lr=1e-2, hidden_size=64)
    model = warmup.warm_up(config.start_model, config.data, 32)
    task = warmup.Task("sort", 4, 8, 0)
    ids, labels = warmup._solved_batch(task, byte_tokenizer(), 999, config.start_model)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert loss.item() < 2.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_a_process_of_its_own_that_fails_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the start model failed; see its error above"):
        ensure_start_model(configured(tmp_path, warmup_steps=1), "cuda")
