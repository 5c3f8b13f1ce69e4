"""Real engines whose kernels read another format than the trainer holds: FP8 made at the destination, FP8 from the
trainer, and scales of the KV cache. After every refit they must equal engines that loaded the same checkpoint.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from nemo_rl.generator.engine import VllmEngine
from nemo_rl.refit.base import RefitOptions
from nemo_rl.refit.errors import RefitError
from tests.e2e.blocks import BLOCK, install, spread
from tests.e2e.engines import (
    PROMPTS,
    FileSource,
    Kind,
    Tensors,
    answer,
    check,
    differ,
    equal,
    fresh_landing,
    inner,
    land,
    logprob_error,
    observe,
    raised,
    run,
    table_of,
    trained,
)


def scale_of(layer: int, kind: int, seed: int) -> float:
    """A scale of the KV cache; no two are alike, and BF16 holds each."""
    return (seed + kind) / 64 + layer / 16


CHANNELS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
TOKENS = {**CHANNELS, "strategy": "token", "dynamic": True}
CACHE = {**CHANNELS, "strategy": "tensor"}


def fp8_of_channels(tensors: Tensors, settings: dict[str, Any], seed: int) -> Tensors:
    """Linear weights in FP8 with a scale an output channel, and calibrated scales of the KV cache."""
    group = {"targets": ["Linear"], "weights": CHANNELS, "input_activations": TOKENS}
    settings["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        "kv_cache_scheme": CACHE,
    }
    out = dict(tensors)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scale = (weight.abs().amax(1, keepdim=True) / 448).clamp_min(1e-6)
        out[name], out[f"{name}_scale"] = (weight / scale).to(torch.float8_e4m3fn), scale
    for layer in range(2):
        for i, kind in enumerate("kvq"):
            out[f"model.layers.{layer}.self_attn.{kind}_scale"] = torch.tensor([scale_of(layer, i, seed)])
    return out


def fp8_of_blocks(tensors: Tensors, settings: dict[str, Any], seed: int) -> Tensors:
    """Weights in FP8 with a scale a block, and scales of the KV cache without those of queries.

    vLLM's loader keeps the latter in the engine's precision.
    """
    settings["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head", "model.layers.1.mlp.gate"],
    }
    out = dict(tensors)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors[name].float()
        rows, columns = (size // BLOCK for size in weight.shape)
        scale = weight.view(rows, BLOCK, columns, BLOCK).abs().amax((1, 3)) / 448
        out[name], out[f"{name}_scale_inv"] = (weight / spread(scale, weight.shape)).to(torch.float8_e4m3fn), scale
    for layer in range(2):
        for i, kind in enumerate("kv"):
            out[f"model.layers.{layer}.self_attn.{kind}_scale"] = torch.tensor([scale_of(layer, i, seed)]).bfloat16()
    return out


CALM = {"initializer_range": 0.05}
"""Weights at which rounding does not drown in large logits."""
BLOCKS = {**CALM, "head_dim": 64, "moe_intermediate_size": BLOCK, "mlp_only_layers": [0]}
LATENT = {
    **CALM,
    "kv_lora_rank": 512,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}


def biased(tensors: Tensors, settings: dict[str, Any], seed: int) -> Tensors:
    """Biases of the router that matter."""
    noise = torch.Generator().manual_seed(seed)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    return {**tensors, name: torch.randn(4, generator=noise)}


KINDS = {
    "online": Kind("Qwen2", CALM, engine={"quantization": "fp8_per_channel"}),
    "calibrated": Kind("Qwen3", CALM, rewrite=fp8_of_channels),
    "blocks": Kind("Qwen3Moe", BLOCKS, rewrite=fp8_of_blocks, engine={"kv_cache_dtype": "fp8"}),
    "latent": Kind("DeepseekV3", LATENT, rewrite=biased),
    "plain": Kind("Qwen3Moe", BLOCKS),
    "blockwise": Kind("Qwen3Moe", BLOCKS, engine={"quantization": "fp8_per_block"}),
}


# ---- tests


def test_formats(tmp_path: Path) -> None:
    bfloat16 = [f"{kind} {kind} bfloat16 1" for kind in ("online", "calibrated", "blocks")]
    check(run(__file__, tmp_path, [*bfloat16, "latent latent float32 1"]))


# ---- inside its process


def lands(engine: VllmEngine, to_a: tuple[str, Any], to_b: tuple[str, Any]) -> dict[str, bool]:
    """First, second, and A -> B -> A refits, through units and through the engine's own loader."""
    found = {"A and B differ": differ(to_a[1], to_b[1])}
    order = [(to_b, "units"), (to_a, "units"), (to_b, "both"), (to_a, "misc"), (to_b, "units")]
    for version, ((path, want), through) in enumerate(order):
        problems = engine.collective_rpc(land, path, version, through)
        found[f"{version}: no problems"] = problems == [[]] * engine.num_workers
        found[f"{version}: {Path(path).name} through {through}"] = equal(observe(engine), want)
    return found


def online(engine: VllmEngine, a: str, b: str, fresh_b: Any) -> dict[str, bool]:
    """BF16 travels; the engine makes FP8 weights and their scales of it in every version."""
    fresh_a = observe(engine)
    found = lands(engine, (a, fresh_a), (b, fresh_b))
    kept = {str(p.dtype) for name, p in fresh_b[1][0].items() if "_proj.weight" in name}
    found["kernels hold FP8 and scales"] = kept == {"torch.float8_e4m3fn", "torch.float32"}
    staged = engine.collective_rpc(staging, b)
    found["staging is BF16, all of it bulk"] = staged == [({"torch.bfloat16"}, 8, 0)]
    return found | logprobs(engine, a, b, 0.2)


def staging(worker: Any, path: str) -> tuple[set[str], int, int]:
    """dtypes that units take, number of units, misc tensors."""
    landing = worker.refit_landing()
    declared = landing.declare(table_of(load_file(f"{path}/model.safetensors")))
    landing.begin(100)
    units = sorted(set(declared.layout.unit.tolist()) - {-1})
    dtypes = {str(view.dtype) for unit in units for view in landing.open(unit).values()}
    landing.reject("only looked at")
    worker._refit_landing = None
    return dtypes, len(units), len(declared.misc)


def logprobs(engine: VllmEngine, a: str, b: str, bound: float) -> dict[str, bool]:
    """The engine serves B: its log-probabilities are close to those of B's values in float32, and far from A's."""
    seen = observe(engine)
    error, stale = logprob_error(seen, b), logprob_error(seen, a)
    return {f"log-probabilities are {error:.2g} off, {stale:.2g} from stale weights": error < min(bound, stale / 5)}


def calibrated(engine: VllmEngine, a: str, b: str, fresh_b: Any) -> dict[str, bool]:
    """FP8 weights and scales of weights and cache come from the trainer."""
    found = lands(engine, (a, observe(engine)), (b, fresh_b))
    tensors = load_file(f"{b}/model.safetensors")
    want = [[float(tensors[f"model.layers.{i}.self_attn.{k}_scale"]) for k in "kvq"] * 2 for i in range(2)]
    found["the cache's scales are the trainer's"] = engine.collective_rpc(cache_scales) == [want]
    found |= refusals(engine, tensors) | logprobs(engine, a, b, 0.2)
    engine.collective_rpc(land, a, 5, "units")
    return found | cached(engine, a, b, fresh_b) | unprocessed(engine, b, fresh_b)


def cache_scales(worker: Any) -> list[list[float]]:
    layers = [layer.self_attn.attn for layer in worker.model_runner.get_model().model.layers]
    on_host = [[layer._k_scale_float, layer._v_scale_float, layer._q_scale_float] for layer in layers]
    return [[*host, *map(float, (x._k_scale, x._v_scale, x._q_scale))] for host, x in zip(on_host, layers, strict=True)]


def refusals(engine: VllmEngine, tensors: Tensors) -> dict[str, bool]:
    """Scales without their weights, weights without their scales, and scales of some layers."""
    at = "model.layers.1.self_attn."
    lacking = {
        f"{at}o_proj.weight": f"{at}o_proj.weight: nothing is written",
        f"{at}o_proj.weight_scale": f"{at}o_proj.weight_scale: nothing is written",
        f"{at}k_scale": f"{at}attn.k_scale: nothing is written",
        f"{at}v_scale": f"{at}attn.v_scale: nothing is written",
        f"{at}q_scale": f"{at}attn.q_scale: no tensor brings it",
    }
    found = {}
    with fresh_landing(engine):
        for name, words in lacking.items():
            table = table_of({n: t for n, t in tensors.items() if n != name})
            problems = engine.collective_rpc(lambda w, table: inner(w).refit_landing().declare(table).problems, table)
            found[f"{name} is missing"] = all(len(p) == 1 and p[0].startswith(words) for p in problems)
    return found


def cached(engine: VllmEngine, a: str, b: str, fresh_b: Any) -> dict[str, bool]:
    """Keys and values of other weights or scales are never read, and an engine that keeps them refuses."""
    source = FileSource(b)
    fresh = {a: observe(engine)[0], b: fresh_b[0]}
    told = mock.patch.object(engine._llm, "reset_prefix_cache", return_value=True)
    failed = mock.patch.object(engine._llm, "reset_prefix_cache", return_value=False)

    def served(path: str) -> bool:
        """Whether fresh results come; the next ones would come from what these leave in the cache."""
        answers = engine.generate(PROMPTS, 1, 12, 0.0)
        return [[(c.token_ids, c.logprobs) for c in cs] for cs in answers] == fresh[path][: len(PROMPTS)]

    def hold(path: str) -> None:
        for name, tensor in load_file(f"{path}/model.safetensors").items():
            source.tensors[name].copy_(tensor)

    found = {"a prompt leaves something to reuse": hits(engine) == 0 < hits(engine)}
    with trained(engine, source, RefitOptions(deadline_s=30)) as refit:
        refit(1)
        found["nothing to reuse after a refit"] = hits(engine) == 0
        found["B"] = served(b)
        hold(a)
        with told:
            refit(2)
        found["a kept cache has something to reuse"] = hits(engine) > 0
        found["and yet A is served"] = served(a)
        with failed:
            found["kept blocks are named"] = "still holds blocks" in raised(RefitError, lambda: refit(3))
        found["then nothing is served"] = "still holds" in raised(RuntimeError, lambda: engine.generate([[1]], 1, 1, 0))
        refit(4)
        found["A again"] = served(a)
    return found


def unprocessed(engine: VllmEngine, b: str, fresh_b: Any) -> dict[str, bool]:
    """An engine that leaves out its processing of loaded bytes commits nothing and serves nothing."""
    from nemo_rl.generator import compat

    source, found, before = FileSource(b), {}, engine.weight_version
    skipped = {
        "qkv_proj": mock.patch.object(compat, "process_staged", lambda layer, ran: compat.restore(layer)),
        "lm_head": mock.patch.object(compat, "reprocess", lambda layer, ran: None),
        "self_attn.attn": mock.patch.object(compat, "finish_model"),
    }
    for version, (name, planted) in enumerate(skipped.items(), 10):
        with planted, trained(engine, source, RefitOptions(deadline_s=30)) as refit:
            said = raised(RefitError, partial(refit, version))
        found[f"{name} left as loaded is named"] = name in said and "version" in said and "commit" in said
        found[f"{name}: nothing committed"] = engine.weight_version == before
        refusal = raised(RuntimeError, lambda: engine.generate([[1]], 1, 1, 0.0))
        found[f"{name}: nothing served"] = name in refusal
    with trained(engine, source, RefitOptions(deadline_s=30)) as refit:
        refit(20)
    found["a sound refit recovers"] = equal(observe(engine), fresh_b)
    return found


def hits(engine: VllmEngine) -> int:
    """Tokens of the long prompt that vLLM finds in the prefix cache, asked without the salt that versions give."""
    from vllm import SamplingParams

    (answer,) = engine._llm.generate([{"prompt_token_ids": PROMPTS[-1]}], SamplingParams(max_tokens=1), use_tqdm=False)
    return int(answer.num_cached_tokens)


def latent(engine: VllmEngine, a: str, b: str, fresh_b: Any) -> dict[str, bool]:
    """What attention derives from `kv_b_proj` is derived in every version; without that, nothing is served."""
    from nemo_rl.generator import compat

    found = lands(engine, (a, observe(engine)), (b, fresh_b))
    derived = {name.rpartition(".")[2] for name in fresh_b[1][0] if "W_" in name}
    found["attention keeps derived tensors"] = derived == {"W_UV", "W_UK_T"}
    with mock.patch.object(compat, "finish_model"), fresh_landing(engine):
        said = raised(RuntimeError, lambda: engine.collective_rpc(land, a, 6, "units"))
        found["a hook that did not run is named"] = "mla_attn.mla_attn did not run" in said
    engine.collective_rpc(land, b, 7, "units")
    return found | logprobs(engine, a, b, 1e-5)


def blocks(engine: VllmEngine, a: str, b: str, fresh_b: Any) -> dict[str, bool]:
    """FP8 weights and their scales travel as they are; the kernels' format is theirs, the experts' scales too."""
    found = lands(engine, (a, observe(engine)), (b, fresh_b))
    tensors = load_file(f"{b}/model.safetensors")
    want = [[*(float(tensors[f"model.layers.{i}.self_attn.{k}_scale"]) for k in "kv"), 1.0] * 2 for i in range(2)]
    found["the cache's scales are the trainer's"] = engine.collective_rpc(cache_scales) == [want]
    at = "model.layers.1.mlp.experts.2.down_proj.weight"
    for name in (at, f"{at}_scale_inv"):
        table = table_of({n: t for n, t in tensors.items() if n != name})
        with fresh_landing(engine):
            said = engine.collective_rpc(lambda w, t: inner(w).refit_landing().declare(t).problems, table)
        found[f"{name} is missing"] = all(len(p) == 1 and "experts.w2_weight" in p[0] for p in said)
    return found | logprobs(engine, a, b, 0.4)


def landed(engine: VllmEngine, a: str, b: str, fresh_b: Any) -> dict[str, bool]:
    """What holds on every platform."""
    return lands(engine, (a, observe(engine)), (b, fresh_b)) | logprobs(engine, a, b, 0.4)


SCENARIOS = {"landed": landed, "blocks": blocks, "latent": latent, "online": online, "calibrated": calibrated}


if __name__ == "__main__":
    install()
    answer(SCENARIOS, KINDS)
