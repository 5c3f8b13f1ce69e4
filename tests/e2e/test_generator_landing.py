"""Real vLLM engines that loaded checkpoint A take B through `VllmLanding`, and must equal engines that loaded B.

Each test is a process of its own that runs `main` below on a few tiny models; it prints one JSON line of checks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from nemo_rl.generator.engine import GeneratorConfig, VllmEngine, worker_env
from nemo_rl.refit.base import RefitOptions, World
from nemo_rl.refit.errors import RefitError
from nemo_rl.refit.layout import Holding, TensorMeta, TensorTable, natural_order
from nemo_rl.refit.region import Region

ROOT = Path(__file__).parents[2]
PROMPTS = [[3, 17, 99, 5, 42, 7], [250, 1, 2, 3, 4, 5, 6, 7, 8, 9], [77]]
CAST = (
    "layers.0.self_attn.q_proj.weight",
    "layers.1.mlp.experts.2.down_proj.weight",
    "embed_tokens.weight",
    "norm.weight",
)
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"family": "Qwen3"},
    "tied": {"family": "Qwen3", "tie_word_embeddings": True},
    "bias": {"family": "Qwen2"},
    "moe": {"family": "Qwen3Moe", "moe_intermediate_size": 64},
    "moe48": {"family": "Qwen3Moe", "moe_intermediate_size": 48},
}


# ---- tests


def test_one_rank_lands(tmp_path: Path) -> None:
    kinds = ["dense", "tied", "bias", "moe", "moe48"]
    check(run(tmp_path, [f"lands {kind} float32 1" for kind in kinds] + ["lands moe48 bfloat16 1"]))


def test_two_ranks_land_and_refit(tmp_path: Path) -> None:
    check(run(tmp_path, ["both moe48 float32 2"]))


def test_faults_show_and_sessions_refit(tmp_path: Path) -> None:
    """Without the care for experts, tied heads and evidence, results differ or an error says so."""
    check(run(tmp_path, ["faults moe float32 1", "faults tied float32 1", "sessions tied float32 1"]))


def check(found: dict[str, bool]) -> None:
    assert found and all(found.values()), {name: ok for name, ok in found.items() if not ok}


def run(folder: Path, scenarios: list[str]) -> dict[str, bool]:
    """Run `main` in a process of its own, with the environment of an engine."""
    env = {**os.environ, **worker_env(GeneratorConfig(str(folder))), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(folder), *scenarios]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---- inside that process


def main(folder: Path, scenario: str) -> dict[str, bool]:
    what, kind, precision, size = scenario.split()
    tp, folder = int(size), folder / scenario.replace(" ", "_")
    a, b = make_checkpoint(folder / "a", kind, 1, precision), make_checkpoint(folder / "b", kind, 2, precision)
    fresh_b = with_engine(b, precision, tp, observe)
    found = with_engine(a, precision, tp, lambda engine: SCENARIOS[what](engine, a, b, fresh_b))
    return {f"{scenario}: {name}": ok for name, ok in found.items()}


def make_checkpoint(path: Path, kind: str, seed: int, precision: str) -> str:
    """A random model in which norms and biases are random too, so that none of them can be left out unseen."""
    import transformers

    options = dict(KINDS[kind])
    family = options.pop("family")
    common = dict(vocab_size=300, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    common |= dict(intermediate_size=256, max_position_embeddings=256, initializer_range=0.2, head_dim=32)
    common |= dict(tie_word_embeddings=False, eos_token_id=0, bos_token_id=1)
    if family == "Qwen3Moe":
        common |= dict(num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**common, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(getattr(torch, precision))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.8, 0.3)
            parameter.copy_(parameter.bfloat16())  # so that a tensor can be fed in either dtype
    model.config.dtype = precision
    model.save_pretrained(path)
    return str(path)


def with_engine(path: str, precision: str, tp: int, call: Callable[[VllmEngine], Any]) -> Any:
    config = GeneratorConfig(path, tp, precision, max_model_len=64, max_num_seqs=4, kv_cache_memory_bytes=8 << 20)
    engine = VllmEngine(config)
    try:
        return call(engine)
    finally:
        files = engine.shared_files
        engine.close()
        assert not [f for f in files if Path(f).exists()], "shared memory is left behind"


def observe(engine: VllmEngine) -> tuple[list[Any], list[dict[str, torch.Tensor]]]:
    """Greedy answers with log-probabilities, sampled ones with a seed, and every readable parameter."""
    reset = engine._llm.reset_prefix_cache
    reset()
    greedy = engine.generate(PROMPTS, 1, 12, 0.0)
    reset()
    sampled = engine.generate(PROMPTS, 2, 12, 1.0, seed=[5, 6, 7])
    return [[(c.token_ids, c.logprobs) for c in cs] for cs in greedy + sampled], engine.read_parameters()


def equal(one: Any, two: Any) -> bool:
    same_parameters = all(
        mine.keys() == other.keys() and all(bits(mine[n]).equal(bits(other[n])) for n in mine)
        for mine, other in zip(one[1], two[1], strict=True)
    )
    return one[0] == two[0] and same_parameters


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def differ(one: Any, two: Any) -> bool:
    return all(x[0][1] != y[0][1] for x, y in zip(one[0], two[0], strict=True))


def table_of(tensors: dict[str, torch.Tensor]) -> TensorTable:
    return {n: TensorMeta(tuple(tensors[n].shape), tensors[n].dtype) for n in natural_order(tensors)}


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
                parameter.normal_()


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
    return found


def faults(engine: VllmEngine, a: str, b: str, fresh_b: Any) -> dict[str, bool]:
    from nemo_rl.generator import compat

    kind_is_moe = any("experts" in name for name in load_file(f"{a}/model.safetensors"))
    off = {
        "experts' second step": mock.patch.object(compat, "_experts_of", return_value=None),
        "processing in place": mock.patch.object(compat, "reprocess", lambda layer, ran: ran(layer)),
        "evidence": mock.patch.object(compat, "processing_effect", return_value=None),
    }
    names = ["experts' second step", "evidence"] if kind_is_moe else ["processing in place"]
    found = {}
    for name in names:
        for through in ("units", "misc") if name != "evidence" else ("units",):
            with off[name]:
                found[f"{name} through {through}"] = not outcome(engine, b, fresh_b, through)
    found["sound again"] = outcome(engine, b, fresh_b, "units")
    found |= refusals(engine, b)
    return found


def outcome(engine: VllmEngine, path: str, want: Any, through: str) -> bool:
    """Whether landing worked and the engine equals `want`."""
    try:
        with fresh_landing(engine):
            engine._llm.collective_rpc(land, args=(path, 0, through))
            return equal(observe(engine), want)
    except RuntimeError:
        return False


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


def refusals(engine: VllmEngine, path: str) -> dict[str, bool]:
    """What must not pass: a module left out, a tensor left out, a unit opened twice, an update after a rejected one."""
    tensors, found = load_file(f"{path}/model.safetensors"), {}

    def attempt(name: str, words: str, call: Callable[[Any], None]) -> None:
        def in_worker(worker: Any) -> str:
            inner(worker)._refit_landing = None
            landing = worker.refit_landing()
            landing.declare(table_of(tensors))
            landing.begin(1)
            try:
                call(landing)
            except RuntimeError as error:
                return str(error)
            return ""

        found[name] = all(words in said for said in engine._llm.collective_rpc(in_worker))

    attempt("a module left out", "not loaded and processed", lambda landing: landing.finish())
    attempt("an update in an update", "is open", lambda landing: landing.begin(2))
    attempt("an update after a rejected one", "because", lambda landing: (landing.reject("because"), landing.begin(2)))
    attempt("a unit opened twice", "opened before", lambda landing: [landing.open(-1) for _ in range(2)])
    last = natural_order(tensors)[-1]
    others = {name: tensor for name, tensor in tensors.items() if name != last}
    attempt("a tensor left out", last, lambda landing: landing.load_misc(others.items()))
    return found


class FileSource:
    """A trainer that holds one checkpoint."""

    def __init__(self, path: str) -> None:
        self.tensors = load_file(f"{path}/model.safetensors")

    def table(self) -> TensorTable:
        return table_of(self.tensors)

    def holdings(self) -> list[Holding]:
        return [Holding(n, Region.whole(tuple(t.shape)), t) for n, t in self.tensors.items()]

    def unused(self) -> dict[str, str]:
        return {}


def sessions(engine: VllmEngine, a: str, b: str, fresh_b: Any) -> dict[str, bool]:
    """The engine's own calls, with a trainer in a thread: both kinds of refit, then a refused one."""
    fresh_a, found = observe(engine), {}
    source = FileSource(b)
    with trained(engine, source, RefitOptions(deadline_s=30)) as refit:
        reports = refit(1)
        found["bulk: B"] = equal(observe(engine), fresh_b)
        found["bulk: version"] = engine.weight_version == 1 == engine.generate(PROMPTS, 1, 2, 0.0)[0][0].weight_version
        moved, held = sum(r.bulk_bytes for r in reports), sum(t.nbytes for t in source.tensors.values())
        found["bulk: bytes"] = moved == held if len(reports) == 1 else held <= moved <= len(reports) * held
        for name, tensor in load_file(f"{a}/model.safetensors").items():
            source.tensors[name].copy_(tensor)
        refit(2)
        found["bulk: back to A"] = equal(observe(engine), fresh_a)
    with trained(engine, FileSource(b), RefitOptions(transport="broadcast", deadline_s=30)) as refit:
        found["broadcast: misc only"] = all(r.bulk_bytes == 0 < r.misc_bytes for r in refit(3))
        found["broadcast: B"] = equal(observe(engine), fresh_b)
        found["an old version is refused"] = "version 3" in raised(RefitError, lambda: refit(3))
        found["then nothing is served"] = "refuses" in raised(RuntimeError, lambda: engine.generate(PROMPTS, 1, 2, 0.0))
    with trained(engine, FileSource(a), RefitOptions(deadline_s=30)) as refit:
        refit(4)
        found["a new session recovers"] = equal(observe(engine), fresh_a)
    return found


def raised(kind: type[Exception], call: Callable[[], object]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    return ""


@contextmanager
def trained(engine: VllmEngine, source: FileSource, options: RefitOptions) -> Iterator[Callable[[int], Any]]:
    from torch.distributed import TCPStore

    from nemo_rl.refit.session import RefitSession

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world, address = World.of(1, engine.num_workers), ("127.0.0.1", store.port)
    session = RefitSession(0, world, address, options, source=source)

    def together(mine: Callable[[], object], engines: Callable[[], object]) -> Any:
        thread = threading.Thread(target=lambda: raised(RefitError, mine))
        with ExitStack() as stack:
            thread.start()
            stack.callback(thread.join)
            return engines()

    together(session.connect, lambda: engine.refit_connect(1, world, address, options))
    together(session.plan, engine.refit_plan)
    yield lambda version: together(lambda: session.refit(version), lambda: engine.refit(version))
    session.close()
    engine.refit_close()


def both(*args: Any) -> dict[str, bool]:
    return lands(*args) | sessions(*args)


SCENARIOS = {"lands": lands, "faults": faults, "sessions": sessions, "both": both}

if __name__ == "__main__":
    checks: dict[str, bool] = {}
    for one in sys.argv[2:]:
        checks |= main(Path(sys.argv[1]), one)
    print(json.dumps(checks), flush=True)
    os._exit(0)
