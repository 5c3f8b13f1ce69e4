"""Tiny models, engines that load them, and what is looked at afterwards; shared by tests that start real engines.

A test file runs itself as a program of scenarios, in a process with the environment of an engine (`run`, `answer`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from nemo_rl.generator.engine import VllmEngine, socket_contexts
from nemo_rl.generator.options import GeneratorConfig, worker_env
from nemo_rl.refit.base import RefitOptions, World
from nemo_rl.refit.errors import RefitError
from nemo_rl.refit.layout import Holding, TensorMeta, TensorTable, natural_order
from nemo_rl.refit.region import Region
from tests.e2e.blocks import spread

ROOT = Path(__file__).parents[2]
PROMPTS = [[3, 17, 99, 5, 42, 7], [250, 1, 2, 3, 4, 5, 6, 7, 8, 9], [77], list(range(3, 150))]
"""The last one fills a block of the KV cache, which a later prompt may reuse."""
CAST = (
    "layers.0.self_attn.q_proj.weight",
    "layers.0.self_attn.k_scale",
    "layers.1.mlp.experts.2.down_proj.weight",
    "embed_tokens.weight",
    "norm.weight",
)
Tensors = dict[str, torch.Tensor]
Rewrite = Callable[[Tensors, dict[str, Any], int], Tensors]
"""(tensors, configuration, seed) -> tensors of the checkpoint; the configuration is changed in place."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A tiny model: transformers family and options, how its checkpoint is rewritten, options of its engine."""

    family: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rewrite: Rewrite | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)


KINDS: dict[str, Kind] = {
    "dense": Kind("Qwen3"),
    "tied": Kind("Qwen3", {"tie_word_embeddings": True}),
    "bias": Kind("Qwen2"),
    "moe": Kind("Qwen3Moe", {"moe_intermediate_size": 64}),
    "moe48": Kind("Qwen3Moe", {"moe_intermediate_size": 48}),
}


# ---- processes


def check(found: dict[str, bool]) -> None:
    assert found and all(found.values()), {name: ok for name, ok in found.items() if not ok}


def run(program: str, folder: Path, scenarios: list[str], device: Literal["cpu", "cuda"] = "cpu") -> dict[str, bool]:
    """Run `program`, which ends in `answer`, in a process of its own with the environment of an engine."""
    env = {
        **os.environ,
        **worker_env(GeneratorConfig(str(folder)), device),
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, program, str(folder), *scenarios]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def answer(
    scenarios: Mapping[str, Callable[..., dict[str, bool]]], kinds: Mapping[str, Kind] = KINDS, fresh: bool = True
) -> None:
    """The program: run the scenarios of the command line, and print one JSON line of what was found.

    Args:
        scenarios: called with an engine that loaded A, the checkpoints A and B, and, if `fresh`, what an engine that
            loaded B computes.
    """
    found: dict[str, bool] = {}
    for one in sys.argv[2:]:
        what, kind, precision, size = one.split()
        folder, tp = Path(sys.argv[1]) / one.replace(" ", "_"), int(size)
        a, b = (make_checkpoint(folder / n, kinds[kind], s, precision) for n, s in (("a", 1), ("b", 2)))
        seen = [with_engine(b, kinds[kind], precision, tp, observe)] if fresh else []
        checks = with_engine(a, kinds[kind], precision, tp, lambda e: scenarios[what](e, a, b, *seen))  # noqa: B023
        found |= {f"{one}: {name}": ok for name, ok in checks.items()}
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)


# ---- models and engines


def make_checkpoint(path: Path, kind: Kind, seed: int, precision: str) -> str:
    """A random model in which norms and biases are random too, so that none of them can be left out unseen."""
    import transformers

    common = dict(vocab_size=300, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    common |= dict(intermediate_size=256, max_position_embeddings=256, initializer_range=0.2, head_dim=32)
    common |= dict(tie_word_embeddings=False, eos_token_id=0, bos_token_id=1)
    if kind.family == "Qwen3Moe":
        common |= dict(num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind.family}Config")(**{**common, **kind.options})
    model = getattr(transformers, f"{kind.family}ForCausalLM")(config).to(getattr(torch, precision))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.8, 0.3)
            parameter.copy_(parameter.bfloat16())  # so that a tensor can be fed in either dtype
    model.config.dtype = precision
    model.save_pretrained(path)
    if kind.rewrite is not None:
        where, settings = path / "model.safetensors", json.loads((path / "config.json").read_text())
        save_file(kind.rewrite(load_file(where), settings, seed), where, metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(settings))
    return str(path)


def with_engine(path: str, kind: Kind, precision: Any, tp: int, call: Callable[[VllmEngine], Any]) -> Any:
    small = {"max_model_len": 192, "max_num_seqs": 4, "kv_cache_memory_bytes": 8 << 20, "gpu_memory_utilization": 0.2}
    config = GeneratorConfig(path, tp, precision, **{**small, **kind.engine})
    engine = VllmEngine(config)
    try:
        return call(engine)
    finally:
        files, contexts = engine.shared_files, socket_contexts(engine._llm)
        engine.close()
        assert not [f for f in files if Path(f).exists()], "shared memory is left behind"
        assert len(contexts) > tp if tp > 1 else not contexts, "a queue to the workers, and one from each"
        assert all(context.closed for context in contexts), "Python would wait for them when it collects them"


def observe(engine: VllmEngine) -> tuple[list[Any], list[dict[str, torch.Tensor]]]:
    """Greedy answers with log-probabilities, sampled ones with a seed, and every readable parameter."""
    reset = engine._llm.reset_prefix_cache
    reset()
    greedy = engine.generate(PROMPTS, 1, 12, 0.0)
    reset()
    sampled = engine.generate(PROMPTS, 2, 12, 1.0, seed=[5, 6, 7, 8])
    return [[(c.token_ids, c.logprobs) for c in cs] for cs in greedy + sampled], engine.read_parameters()


def equal(one: Any, two: Any) -> bool:
    same_parameters = all(
        mine.keys() == other.keys() and all(bits(mine[n]).equal(bits(other[n])) for n in mine)
        for mine, other in zip(one[1], two[1], strict=True)
    )
    return one[0] == two[0] and same_parameters


def logprob_error(seen: Any, path: str) -> float:
    """How far the greedy log-probabilities are from transformers', in float32 with the values of checkpoint `path`."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(plain(path), dtype=torch.float32).eval()
    worst = 0.0
    for prompt, ((tokens, logprobs),) in zip(PROMPTS, seen[0][: len(PROMPTS)], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        want = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        worst = max(worst, float((want - torch.tensor(logprobs)).abs().max()))
    return worst


def plain(path: str) -> str:
    """A copy of the checkpoint in float32: weights times the scales of their channels, no other scales."""
    folder = Path(f"{path}-plain")
    if not folder.exists():
        folder.mkdir()
        tensors, settings = load_file(f"{path}/model.safetensors"), json.loads(Path(path, "config.json").read_text())
        kept = {n: t.float() * scales_of(tensors, n) for n, t in tensors.items() if "scale" not in n}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        settings.pop("quantization_config", None)
        (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


def scales_of(tensors: Tensors, name: str) -> Any:
    """What the elements of a weight count: its scales of channels or blocks, or 1."""
    if f"{name}_scale_inv" in tensors:
        return spread(tensors[f"{name}_scale_inv"], tensors[name].shape)
    return tensors.get(f"{name}_scale", 1.0)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def differ(one: Any, two: Any) -> bool:
    return all(x[0][1] != y[0][1] for x, y in zip(one[0], two[0], strict=True))


def table_of(tensors: dict[str, torch.Tensor]) -> TensorTable:
    return {n: TensorMeta(tuple(tensors[n].shape), tensors[n].dtype) for n in natural_order(tensors)}


# ---- landing without a session


def land(worker: Any, path: str, version: int, through: str) -> list[str]:
    """In a worker: bring a checkpoint in through units, whole tensors or both; problems of the declaration."""
    tensors = load_file(f"{path}/model.safetensors")
    if through == "both":  # tensors that the loader must cast take their modules along
        for name in [n for n in tensors if n.endswith(CAST)]:
            tensors[name] = tensors[name].to(torch.float32 if tensors[name].dtype is torch.bfloat16 else torch.bfloat16)
    landing = worker.refit_landing()
    declared = landing.declare(table_of(tensors))
    garble_kernels(worker.model_runner.get_model())
    landing.begin(version)
    if through == "misc":
        landing.load_misc((name, tensors[name]) for name in table_of(tensors))
    else:
        layout = declared.layout
        for unit in sorted(set(layout.unit.tolist()), reverse=True):
            for row, view in landing.open(unit).items():
                view.copy_(torch.full_like(view, float("nan")))
                full = tensors[layout.fqn(row)]
                view.copy_(full[layout.region(row).slices_in(Region.whole(tuple(full.shape)))])
            landing.close(unit)
        assert (through == "both") == any(declared.misc), declared.misc
        if declared.misc:
            landing.load_misc((name, tensors[name]) for name in table_of(tensors) if name in declared.misc)
    landing.finish()
    landing.commit(version)
    return list(declared.problems)


def garble_kernels(model: torch.nn.Module) -> None:
    """Random values in staged tensors that kernels read; `land` does the same to all others through their views."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" not in name and "lm_head" not in name:  # their padding is written when the engine starts
                parameter.copy_(torch.randn(parameter.shape))


def lands(engine: VllmEngine, a: str, b: str, fresh_b: Any) -> dict[str, bool]:
    fresh_a, found = observe(engine), {}
    found["A and B differ"] = differ(fresh_a, fresh_b)
    to_a, to_b = (a, fresh_a), (b, fresh_b)
    order = [(*to_b, "units"), (*to_a, "misc"), (*to_b, "both"), (*to_b, "units"), (*to_a, "both"), (*to_b, "misc")]
    order += [(*to_a, "units")]
    for version, (path, want, through) in enumerate(order):
        problems = engine._llm.collective_rpc(land, args=(path, version, through))
        found[f"{version}: no problems"] = problems == [[]] * engine.num_workers
        found[f"{version}: {Path(path).name} through {through}"] = equal(observe(engine), want)
    if engine.config.precision == "float32":
        error, stale = logprob_error(fresh_a, a), logprob_error(fresh_a, b)
        found[f"log-probabilities are {error:.2g} off, {stale:.2g} from stale weights"] = error < 1e-5 < stale / 1e4
    return found


class FileSource:
    """A trainer that holds one checkpoint."""

    def __init__(self, path: str, file: str = "model.safetensors") -> None:
        self.tensors = load_file(f"{path}/{file}")

    def table(self) -> TensorTable:
        return table_of(self.tensors)

    def holdings(self) -> list[Holding]:
        return [Holding(n, Region.whole(tuple(t.shape)), t) for n, t in self.tensors.items()]

    def unused(self) -> dict[str, str]:
        return {}


def raised(kind: type[Exception], call: Callable[[], object]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    return ""


@contextmanager
def trained(
    engine: VllmEngine, source: FileSource, options: RefitOptions, *others: VllmEngine
) -> Iterator[Callable[[int], Any]]:
    """One world of a trainer, in a thread, and engines; yields `refit(version)`, which returns the first's reports."""
    from torch.distributed import TCPStore

    from nemo_rl.refit.session import RefitSession

    engines = [engine, *others]
    starts = [1 + sum(e.num_workers for e in engines[:i]) for i in range(len(engines))]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world, address = World.of(1, sum(e.num_workers for e in engines)), ("127.0.0.1", store.port)
    session = RefitSession(0, world, address, options, source=source)

    def together(mine: Callable[[], object], theirs: Callable[[VllmEngine, int], object]) -> Any:
        calls = [mine, *(partial(theirs, e, start) for e, start in zip(others, starts[1:], strict=True))]
        threads = [threading.Thread(target=partial(raised, RefitError, call)) for call in calls]
        with ExitStack() as stack:
            for thread in threads:
                thread.start()
                stack.callback(thread.join)
            return theirs(engine, 1)

    together(session.connect, lambda e, start: e.refit_connect(start, world, address, options))
    together(session.plan, lambda e, _: e.refit_plan())
    yield lambda version: together(lambda: session.refit(version), lambda e, _: e.refit(version))
    session.close()
    for one in engines:
        one.refit_close()


@contextmanager
def fresh_landing(engine: VllmEngine) -> Iterator[Any]:
    def forget(worker: Any) -> None:
        inner(worker)._refit_landing = None

    engine._llm.collective_rpc(forget)
    yield
    engine._llm.collective_rpc(forget)


def inner(worker: Any) -> Any:
    """vLLM hands functions the wrapper of the worker."""
    return worker.worker
