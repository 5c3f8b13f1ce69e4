"""What one trainer rank measures of itself against what transformers computed; runs in a child process."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from safetensors.torch import load_file

import nemo_rl.trainer.policy
from nemo_rl.refit.layout import Holding
from nemo_rl.trainer.cpu import megatron_on_cpu
from nemo_rl.trainer.model import Parallel
from nemo_rl.trainer.policy import MegatronPolicy, TrainerConfig
from tests.unit.trainer.models import token_batch
from tests.unit.trainer.ranks import free_port


def probe(rank: int, meet: str, folder: str, parallel: Parallel, out: str, **changes: Any) -> dict[str, Any]:
    """Largest differences to the reference, on every rank the same where they are about the whole model."""
    reference = torch.load(Path(folder) / "reference.pt")
    options = {"micro_batch_size": 2, "logprob_batch_size": 3, "clip_grad": 1e9, "lr": 1e-2, **changes}
    policy = MegatronPolicy(TrainerConfig(folder, parallel, **options), rank, meet)
    ids, mask = reference["ids"], reference["mask"]
    said: dict[str, Any] = {"rows": [(h.fqn, h.region) for h in policy.source().holdings()]}
    said["logits"] = _worst(_logits(policy, ids), reference["logits"])
    policy.export(f"{out}/loaded")
    said["logprobs"] = _worst(policy.logprobs(ids), reference["logprobs"])
    pointers = [h.view.data_ptr() for h in policy.source().holdings()]
    metrics = policy.supervised_step(ids, mask)
    said["loss"] = abs(metrics["loss"] - reference["loss"])
    norm = float(sum(g.double().pow(2).sum() for g in reference["grads"].values()) ** 0.5)
    said["grad_norm"] = abs(metrics["grad_norm"] / norm - 1)
    said["grads"] = max(_worst_relative(g, reference["grads"]) for g in gradients(policy))
    said["stable"] = pointers == [h.view.data_ptr() for h in policy.source().holdings()]
    policy.export(f"{out}/stepped")
    after = policy.logprobs(ids)
    said["moved"] = _worst(after, reference["logprobs"])
    said["reference"] = _worst(policy.reference_logprobs(ids), reference["logprobs"])
    said["restored"] = torch.equal(policy.logprobs(ids), after)
    said["after"] = after
    said["metrics"] = metrics
    policy.close()
    return said


def resume(rank: int, meet: str, folder: str, parallel: Parallel, out: str) -> tuple[list[float], float]:
    """Losses of a short run, and the loss of a policy that loads its export: the last one's weights, again."""
    config = TrainerConfig(folder, parallel, lr=3e-3, micro_batch_size=2, weight_decay=0.01, keep_reference=False)
    policy = MegatronPolicy(config, rank, meet)
    reference = torch.load(Path(folder) / "reference.pt")
    ids, mask = reference["ids"], reference["mask"]
    losses = [policy.supervised_step(ids, mask)["loss"] for _ in range(12)]
    policy.export(out)
    losses.append(_mean_loss(policy.logprobs(ids), mask))
    address = [f"tcp://127.0.0.1:{free_port()}"]
    dist.broadcast_object_list(address, src=0)
    policy.close()
    again = MegatronPolicy(TrainerConfig(out, parallel), rank, address[0])
    resumed = _mean_loss(again.logprobs(ids), mask)
    again.close()
    return losses, resumed


def _mean_loss(logprobs: torch.Tensor, mask: torch.Tensor) -> float:
    return float(-(logprobs * mask).sum() / mask.sum())


def unchecked(rank: int, meet: str, folder: str, parallel: Parallel, out: str) -> float:
    """Worst relative gradient error of a layout that is refused otherwise."""
    with mock.patch.object(nemo_rl.trainer.policy, "check_parallel", lambda *_: []):
        return probe(rank, meet, folder, parallel, out)["grads"][0]


def move_bias(rank: int, meet: str, folder: str, parallel: Parallel) -> list[tuple[str, bool, float]]:
    """A step in bfloat16 that evens the routers' loads: name, whether the view stayed, and how far each bias moved."""
    config = TrainerConfig(folder, parallel, precision="bfloat16", router_bias_update_rate=0.125, micro_batch_size=2)
    policy = MegatronPolicy(config, rank, meet)
    reference = torch.load(Path(folder) / "reference.pt")
    biases = [h for h in policy.source().holdings() if h.fqn.endswith("e_score_correction_bias")]
    before = [(h.view.clone(), h.view.data_ptr()) for h in biases]
    policy.supervised_step(reference["ids"], reference["mask"])
    alive = {h.fqn: h.view.data_ptr() for h in policy.source().holdings()}
    routers = {t.data_ptr() for chunk in policy._chunks for n, t in chunk.named_buffers() if n.endswith("expert_bias")}
    said = [
        (h.fqn, alive[h.fqn] == pointer and pointer in routers, float((h.view - was).abs().max()))
        for h, (was, pointer) in zip(biases, before, strict=True)
    ]
    policy.close()
    return said


def calibrate(rank: int, meet: str, folder: str, parallel: Parallel, out: str, **changes: Any) -> dict[str, Any]:
    """The cache's scales by name, whether their views were theirs all along, and how far the model still is off."""
    reference = torch.load(Path(folder) / "reference.pt")
    policy = MegatronPolicy(TrainerConfig(folder, parallel, **changes), rank, meet)
    held = [h for h in policy.source().holdings() if h.fqn.endswith("_scale")]
    fresh = all(float(h.view) == 1.0 and h.view.dtype == torch.float32 for h in held)
    policy.calibrate(reference["ids"])
    said = {"scales": {h.fqn: float(h.view) for h in held}, "fresh": fresh}
    said["logprobs"] = _worst(policy.logprobs(reference["ids"]), reference["logprobs"])
    said["rows"] = [(h.fqn, h.region) for h in policy.source().holdings()]
    policy.export(out)
    policy.close()
    return said


def load_and_export(rank: int, meet: str, folder: str, parallel: Parallel, out: str) -> torch.Tensor:
    """Log-probabilities of a loaded checkpoint, after a step of no size; export it."""
    policy = MegatronPolicy(TrainerConfig(folder, parallel, lr=0.0, clip_grad=0.0), rank, meet)
    ids, mask = token_batch(4, 12, 128)
    policy.supervised_step(ids, mask)
    policy.export(out)
    found = policy.logprobs(ids)
    policy.close()
    return found


def step_fails(rank: int, meet: str, folder: str, parallel: Parallel) -> tuple[str, bool]:
    """The error of a step whose loss is infinite on part of the batch, and whether all weights stayed."""
    policy = MegatronPolicy(TrainerConfig(folder, parallel, micro_batch_size=2), rank, meet)
    before = [h.view.clone() for h in policy.source().holdings()]

    def loss_fn(logprobs: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, dict[str, float]]:
        return logprobs.sum() * (float("inf") if start else 1.0), {}

    try:
        policy.train_step(torch.load(Path(folder) / "reference.pt")["ids"], loss_fn)
    except RuntimeError as error:
        same = [torch.equal(h.view, b) for h, b in zip(policy.source().holdings(), before, strict=True)]
        policy.close()
        return str(error), all(same)
    return "no error", False


def refuse(rank: int, meet: str, folder: str, parallel: Parallel) -> str:
    """The refusal of a rank whose peers never start."""
    try:
        MegatronPolicy(TrainerConfig(folder, parallel, deadline_s=5), rank, meet)
    except ValueError as error:
        return str(error)
    return "no error"


def _logits(policy: MegatronPolicy, ids: torch.Tensor) -> torch.Tensor | None:
    """Whole logits on the last pipeline stage, cut to the vocabulary; None on other stages or other rows."""
    found = []

    def finish(logits: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
        found.append(gather_from_tensor_model_parallel_region(logits))
        return logits

    multiple = policy._sequence_multiple
    padded = torch.nn.functional.pad(ids, (0, -ids.shape[1] % multiple))

    def step(data: Any, model: torch.nn.Module) -> Any:
        positions = torch.arange(padded.shape[1]).expand_as(padded).contiguous()
        return model(padded, positions, None), finish

    parallel = policy.config.parallel
    count = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
    with megatron_on_cpu(), torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter([0] * count) for _ in policy._ddp],
            model=policy._ddp,
            num_microbatches=count,
            seq_length=padded.shape[1],
            micro_batch_size=padded.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    return found[0][:, : ids.shape[1], : policy._shape.vocab_size] if found else None


def gradients(policy: MegatronPolicy) -> list[Holding]:
    """This rank's reduced gradients, as boxes: the holdings' views moved from parameters to their gradients."""
    owners = {p.untyped_storage().data_ptr(): p for p in policy._weights()}
    out = []
    for h in policy.source().holdings():
        parameter = owners[h.view.untyped_storage().data_ptr()]
        if not isinstance(parameter, torch.nn.Parameter):
            continue  # a router's bias, which is a buffer
        grad = parameter.main_grad
        offset = grad.storage_offset() + h.view.storage_offset() - parameter.storage_offset()
        out.append(Holding(h.fqn, h.region, grad.as_strided(h.view.shape, h.view.stride(), offset)))
    return out


def same_checkpoint(one: str, other: str) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    a, b = ({k: v for f in Path(d).glob("*.safetensors") for k, v in load_file(f).items()} for d in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def _worst(found: torch.Tensor | None, wanted: torch.Tensor) -> float:
    """Largest difference on any rank."""
    worst = torch.zeros(()) if found is None else (found - wanted).abs().max().float().cpu()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def _worst_relative(held: Holding, wanted: dict[str, torch.Tensor]) -> tuple[float, str]:
    whole = wanted[held.fqn]
    part = whole[held.region.slices_in(type(held.region).whole(tuple(whole.shape)))]
    return float((held.view - part).abs().max() / whole.abs().max()), held.fqn
