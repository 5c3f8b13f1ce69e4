"""Real vLLM engines that loaded checkpoint A take B through `VllmLanding`, and must equal engines that loaded B."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from safetensors.torch import load_file

from nemo_rl.generator.engine import VllmEngine
from nemo_rl.refit.base import RefitOptions
from nemo_rl.refit.errors import RefitError
from nemo_rl.refit.layout import natural_order
from tests.e2e.engines import (
    KINDS,
    PROMPTS,
    FileSource,
    answer,
    check,
    equal,
    fresh_landing,
    inner,
    land,
    lands,
    observe,
    raised,
    run,
    table_of,
    trained,
    with_engine,
)

# ---- tests


def test_one_rank_lands(tmp_path: Path) -> None:
    kinds = ["dense", "tied", "bias", "moe", "moe48"]
    check(run(__file__, tmp_path, [f"lands {kind} float32 1" for kind in kinds] + ["lands moe48 bfloat16 1"]))


def test_two_ranks_land_and_refit(tmp_path: Path) -> None:
    check(run(__file__, tmp_path, ["both moe48 float32 2"]))


def test_faults_show_and_sessions_refit(tmp_path: Path) -> None:
    """Without the care for experts, tied heads and evidence, results differ or an error says so."""
    check(run(__file__, tmp_path, ["faults moe float32 1", "faults tied float32 1", "sessions tied float32 1"]))


# ---- inside their processes


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
    said = engine._llm.collective_rpc(replaced, args=(path,))
    found["a parameter in another form"] = all("embed_tokens.weight no longer has the shape" in text for text in said)
    found["views stay as long as storage"] = engine._llm.collective_rpc(live_views, args=(path,)) == [[True, False]]
    return found


def live_views(worker: Any, path: str) -> list[bool]:
    """In a worker: whether views of live storage are the very same on a second look, and on one after storage moved."""
    inner(worker)._refit_landing = None
    landing = inner(worker).refit_landing()
    landing.declare(table_of(load_file(f"{path}/model.safetensors")))
    landing.begin(1)
    first, same = landing.open(-1), []
    norm = inner(worker).model_runner.get_model().model.norm.weight
    for move in (False, True):
        landing.close(-1)
        if move:
            norm.data = norm.data.clone()
        views = landing.open(-1)
        assert views.keys() == first.keys() and norm.data_ptr() in {view.data_ptr() for view in views.values()}
        same.append(views is first)
    inner(worker)._refit_landing = None
    return same


def replaced(worker: Any, path: str) -> str:
    """In a worker: what a landing says of a parameter that was copied into other strides, as kernels may want them."""
    inner(worker)._refit_landing = None
    landing, model = inner(worker).refit_landing(), inner(worker).model_runner.get_model()
    landing.declare(table_of(load_file(f"{path}/model.safetensors")))
    landing.begin(1)
    embedding = model.model.embed_tokens.weight
    before, embedding.data = embedding.data, embedding.data.t().contiguous().t()
    try:
        landing.open(-1)
        return ""
    except RuntimeError as error:
        return str(error)
    finally:
        embedding.data = before
        inner(worker)._refit_landing = None


def sessions(engine: VllmEngine, a: str, b: str, fresh_b: Any) -> dict[str, bool]:
    """The engine's own calls, with a trainer in a thread: both kinds of refit, then a refused one."""
    fresh_a, found = observe(engine), {}
    source = FileSource(b)
    with trained(engine, source, RefitOptions(deadline_s=30)) as refit:
        reports = refit(1)
        found["bulk: B"] = equal(observe(engine), fresh_b)
        found["bulk: version"] = engine.weight_version == 1
        found["bulk: versions of tokens"] = engine.generate(PROMPTS, 1, 2, 0.0)[0][0].versions == (1, 1)
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


def mixed(engine: VllmEngine, a: str, b: str, fresh_b: Any) -> dict[str, bool]:
    """Engines of one and of two ranks in one world take the same trainer's weights."""
    kind, source = KINDS["moe48"], FileSource(b)
    alone_b = with_engine(b, kind, "float32", 1, observe)

    def refit_both(other: VllmEngine) -> dict[str, bool]:
        want = {a: (observe(engine), observe(other)), b: (fresh_b, alone_b)}
        found = {}
        with trained(engine, source, RefitOptions(deadline_s=30), other) as refit:
            for version, path in enumerate((b, a), 10):
                for name, tensor in load_file(f"{path}/model.safetensors").items():
                    source.tensors[name].copy_(tensor)
                refit(version)
                seen = (observe(engine), observe(other))
                for size, one, other_one in zip((2, 1), seen, want[path], strict=True):
                    found[f"{version}: {Path(path).name} on {size} of a mixed world"] = equal(one, other_one)
        return found

    return with_engine(a, kind, "float32", 1, refit_both)


def both(*args: Any) -> dict[str, bool]:
    return lands(*args) | sessions(*args) | mixed(*args)


def direct(engine: VllmEngine, a: str, b: str, fresh_b: Any) -> dict[str, bool]:
    """Where kernels read what the loader fills, as unquantized ones on GPUs do, all bytes land in place."""
    found = lands(engine, a, b, fresh_b)
    units = engine._llm.collective_rpc(units_of, args=(a,))
    found[f"units are {units}"] = units == [[-1]] * engine.num_workers
    return found


def units_of(worker: Any, path: str) -> list[int]:
    declared = inner(worker).refit_landing().declare(table_of(load_file(f"{path}/model.safetensors")))
    return sorted(set(declared.layout.unit.tolist()))


SCENARIOS = {"lands": lands, "faults": faults, "sessions": sessions, "both": both, "direct": direct}

if __name__ == "__main__":
    answer(SCENARIOS)
