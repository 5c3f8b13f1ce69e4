"""The start model: a small Qwen3 with random weights and a short supervised warm-up, made once and cached."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from nemo_rl.grpo.data import EOS, PAD, Task, byte_tokenizer, padded_vocab_size, save_tokenizer
from nemo_rl.grpo.types import RunError
from nemo_rl.schema import Config, DataConfig, StartModelConfig

log = logging.getLogger(__name__)
KINDS = ("dense", "moe")


def start_model_path(config: Config) -> Path:
    """Folder of the start model of these settings, made or not."""
    settings = {"start_model": asdict(config.start_model), "data": asdict(config.data), "format": 1}
    settings["length"] = config.policy.max_total_sequence_length
    if config.policy.precision != "float32":
        settings["precision"] = config.policy.precision
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return Path(config.start_model.cache_dir) / name


def ensure_start_model(config: Config, device: str = "cpu") -> Path:
    """Make the start model unless it is cached; returns its checkpoint folder.

    A model appears under its name only when it is complete; where several runs make it, the first one's stays. On
    `cuda` a process of its own makes it, so that the GPU is free again afterwards; only models made on the CPU are bit
    for bit the same on every machine.
    """
    path = start_model_path(config)
    if (path / "config.json").is_file():
        log.info("start model: cached in %s", path)
        return path
    if device == "cpu":
        _make(config, path, device)
    else:
        _make_apart(config, path, device)
    log.info("start model: made in %s", path)
    return path


def _make_apart(config: Config, path: Path, device: str) -> None:
    """Raises RunError where the process failed or took longer than actors may to start."""
    maker = get_context("spawn").Process(target=_make, args=(config, path, device), daemon=True)
    maker.start()
    maker.join(config.cluster.start_deadline_s)
    if maker.exitcode != 0:
        late = maker.exitcode is None
        maker.kill()
        why = f"was not made within {config.cluster.start_deadline_s:g} s; lower start_model.warmup_steps or its size"
        raise RunError(f"the start model {why if late else 'failed; see its error above'}")


def _make(config: Config, path: Path, device: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=path.parent))
    try:
        with _one_thread():
            model = warm_up(config.start_model, config.data, config.policy.max_total_sequence_length, device)
        model.to(getattr(torch, config.policy.precision)).save_pretrained(work)
        save_tokenizer(work)
        os.chmod(work, 0o755)
        _place(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _place(work: Path, path: Path) -> None:
    try:
        os.replace(work, path)
    except OSError:
        if not (path / "config.json").is_file():
            raise


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small matrices gain nothing from threads, and their number would change the model in its last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def start_model_config(settings: StartModelConfig, max_length: int) -> Any:
    """The transformers configuration of the start model."""
    from transformers import Qwen3Config, Qwen3MoeConfig

    tokenizer = byte_tokenizer()
    common: dict[str, Any] = dict(
        vocab_size=padded_vocab_size(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_key_value_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=max_length,
        tie_word_embeddings=settings.tie_word_embeddings,
        pad_token_id=tokenizer.token_to_id(PAD),
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(EOS),
        dtype="float32",
    )
    if settings.kind == "dense":
        return Qwen3Config(architectures=["Qwen3ForCausalLM"], **common)
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        num_experts=settings.num_experts,
        num_experts_per_tok=settings.num_experts_per_tok,
        moe_intermediate_size=settings.moe_intermediate_size,
        norm_topk_prob=True,
        **common,
    )


def warm_up(settings: StartModelConfig, data: DataConfig, max_length: int, device: str = "cpu") -> Any:
    """Train in float32 on solved problems with AdamW, linear decay, and loss on the answers only.

    On a GPU, products are computed in TF32.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(settings.seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(start_model_config(settings, max_length), dtype=torch.float32)
    task = Task(data.task, data.min_items, data.max_items, settings.seed)
    tokenizer = byte_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.warmup_lr, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(settings.warmup_steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.warmup_lr * min(1.0, (step + 1) / 20) * (1.0 - step / settings.warmup_steps)
        input_ids, labels = (t.to(device) for t in _solved_batch(task, tokenizer, step, settings))
        logits = model(input_ids=input_ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            log.info("warm-up step %d/%d: loss %.4f", step + 1, settings.warmup_steps, loss.item())
    return model.eval()


def _solved_batch(
    task: Task, tokenizer: Tokenizer, step: int, settings: StartModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels (-100 where no loss is taken) of a batch of demonstrations; both `[count, L]`."""
    count = settings.warmup_batch_size
    rng = random.Random(f"{settings.seed}/reversed/{step}")
    eos, pad = tokenizer.token_to_id(EOS), tokenizer.token_to_id(PAD)
    width = task.max_prompt_tokens + task.max_answer_tokens
    input_ids = torch.full((count, width), pad)
    labels = torch.full((count, width), -100)
    for row in range(count):
        problem = task.problem(f"warm-up {step}", row)
        prompt = tokenizer.encode(problem.question, add_special_tokens=False).ids
        text = problem.answer[::-1] if rng.random() < settings.warmup_reversed else problem.answer
        answer = [*tokenizer.encode(text, add_special_tokens=False).ids, eos]
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return input_ids, labels
