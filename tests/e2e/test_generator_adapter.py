"""A real engine over a frozen base takes LoRA adapters alone, and must equal engines that read them from disk."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nemo_rl.generator.engine import VllmEngine
from nemo_rl.generator.options import AdapterConfig
from nemo_rl.refit.base import RefitOptions
from tests.e2e.engines import (
    FileSource,
    Kind,
    check,
    differ,
    equal,
    logprob_error,
    make_checkpoint,
    observe,
    run,
    trained,
    with_engine,
)

RANK, ALPHA = 4, 10.0
SIZES = {
    "q_proj": (128, 128),
    "v_proj": (128, 64),
    "o_proj": (128, 128),
    "up_proj": (128, 256),
    "down_proj": (256, 128),
}
"""Target -> (in, out); of the packed `qkv_proj` and `gate_up_proj` some parts have no adapter."""
FROZEN = "frozen: loaded when the engine started"
FILE = "adapter_model.safetensors"
CALM = {"initializer_range": 0.05}


def test_adapters_alone_land(tmp_path: Path) -> None:
    check(run(__file__, tmp_path, []))


# ---- inside its process


def adapter_tensors(seed: int, rank: int = RANK) -> dict[str, torch.Tensor]:
    """An adapter of the two layers of the tiny model, by PEFT's names; both halves random."""
    torch.manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for target, (size_in, size_out) in SIZES.items():
            part = "mlp" if target in ("up_proj", "down_proj") else "self_attn"
            name = f"base_model.model.model.layers.{layer}.{part}.{target}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, size_in) * 0.1
            tensors[f"{name}.lora_B.weight"] = torch.randn(size_out, rank) * 0.1
    return tensors


def write_adapter(folder: Path, base: str, seed: int) -> tuple[str, str]:
    """A PEFT folder, and a checkpoint of the base with that adapter merged."""
    tensors, merged = adapter_tensors(seed), load_file(f"{base}/model.safetensors")
    for name in [n for n in tensors if "lora_A" in n]:
        weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
        merged[weight] += ALPHA / RANK * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(SIZES), "bias": "none"}
    (folder / "merged").mkdir(parents=True)
    save_file(tensors, folder / FILE)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(merged, folder / "merged" / "model.safetensors", metadata={"format": "pt"})
    (folder / "merged" / "config.json").write_text(Path(base, "config.json").read_text())
    return str(folder), str(folder / "merged")


def seen_by(engine: VllmEngine) -> Any:
    """Answers, and all tensors of base and adapter."""
    answers, parameters = observe(engine)
    return answers, [base | mine for base, mine in zip(parameters, engine.collective_rpc(stacks), strict=True)]


def stacks(worker: Any) -> dict[str, torch.Tensor]:
    from nemo_rl.generator.adapter import stacked_tensors

    held = stacked_tensors(worker.model_runner.lora_manager._adapter_manager)
    return {name: tensor.clone() for name, tensor in held.items()}


def kind_of(path: str | None) -> Kind:
    return Kind("Qwen3", CALM, engine={"adapter": AdapterConfig(RANK, ALPHA, tuple(SIZES), path)})


def main(folder: Path) -> dict[str, bool]:
    base = make_checkpoint(folder / "base", kind_of(None), 1, "float32")
    (a, merged_a), (b, merged_b) = (write_adapter(folder / name, base, seed) for name, seed in (("a", 1), ("b", 2)))
    fresh = {path: with_engine(base, kind_of(path), "float32", 1, seen_by) for path in (a, b)}
    found = {"A and B differ": differ(fresh[a], fresh[b])}
    found |= with_engine(base, kind_of(None), "float32", 1, lambda engine: lands(engine, fresh, a, b))
    error, stale = logprob_error(fresh[b], merged_b), logprob_error(fresh[b], merged_a)
    return found | {f"log-probabilities are {error:.2g} off, {stale:.2g} from stale ones": error < 1e-5 < stale / 1e4}


def lands(engine: VllmEngine, fresh: dict[str, Any], a: str, b: str) -> dict[str, bool]:
    source = FileSource(a, FILE)
    held, found = sum(t.nbytes for t in source.tensors.values()), {}
    before, (names,) = seen_by(engine), engine.read_parameters()
    found["the base answers before"] = differ(before, fresh[a])
    for transport, start in (("gloo", 1), ("broadcast", 4)):
        with trained(engine, source, RefitOptions(transport=transport, deadline_s=30)) as refit:
            (kept,) = engine.collective_rpc(kept_parameters)
            found[f"the plan by {transport} says that the base is kept"] = kept == dict.fromkeys(names, FROZEN)
            for version, path in enumerate((a, b, a), start):
                for name, tensor in load_file(f"{path}/{FILE}").items():
                    source.tensors[name].copy_(tensor)
                engine.collective_rpc(garble)
                (report,) = refit(version)
                moved = (report.bulk_bytes, report.misc_bytes)
                found[f"{version}: bytes by {transport}"] = moved == ((held, 0) if transport == "gloo" else (0, held))
                found[f"{version}: {Path(path).name} by {transport}"] = equal(seen_by(engine), fresh[path])
    return found


def kept_parameters(worker: Any) -> dict[str, str]:
    return dict(worker._refit_session._agreed.plan.kept)


def garble(worker: Any) -> None:
    from nemo_rl.generator.adapter import stacked_tensors

    for tensor in stacked_tensors(worker.model_runner.lora_manager._adapter_manager).values():
        tensor.normal_()


if __name__ == "__main__":
    answer = json.dumps(main(Path(sys.argv[1])))
    sys.stdout.write(answer + "\n")
    sys.stdout.flush()
    os._exit(0)
