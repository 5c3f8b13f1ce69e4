"""Micro-batches of a data-parallel rank, and token log-probabilities from a tensor-parallel rank's logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows `start .. stop - 1` of a batch, run as `size` rows: rows beyond `stop` are filler."""

    start: int
    stop: int
    size: int


def micro_batches(num_rows: int, data_size: int, data_rank: int, limit: int, group: int = 1) -> list[MicroBatch]:
    """The micro-batches of one data-parallel rank, of at most `limit` rows each; a multiple of `group` of them.

    Every rank gets the same number of micro-batches of the same size, as pipelines and expert parallelism need; where
    rows do not divide evenly, the last ones are partly or wholly filler.

    Raises:
        ValueError: there are no rows, or `limit` is below 1.
    """
    if num_rows < 1 or limit < 1:
        raise ValueError(f"a batch of {num_rows} rows in micro-batches of {limit}; both must be at least 1")
    share = -(-num_rows // data_size)
    count = -(-share // (limit * group)) * group
    size = -(-share // count)
    first, last = min(data_rank * share, num_rows), min((data_rank + 1) * share, num_rows)
    starts = [min(first + i * size, last) for i in range(count + 1)]
    return [MicroBatch(a, b, size) for a, b in zip(starts, starts[1:], strict=False)]


def padded_rows(input_ids: torch.Tensor, rows: MicroBatch, multiple: int) -> torch.Tensor:
    """Token ids `[rows.size, L']` of a micro-batch, L' the length rounded up to `multiple`; padding is token 0.

    Padding stands to the right, so that causal attention never reads it.
    """
    length = -(-input_ids.shape[1] // multiple) * multiple
    out = input_ids.new_zeros(rows.size, length)
    out[: rows.stop - rows.start, : input_ids.shape[1]] = input_ids[rows.start : rows.stop]
    return out


def token_logprobs(logits: torch.Tensor, input_ids: torch.Tensor, temperature: float, vocab_size: int) -> torch.Tensor:
    """Log-probability of every token given those before it, summed over the vocabulary of all tensor-parallel ranks.

    Args:
        logits: this rank's columns, `[N, L, V / TP]`.
        input_ids: `[N, L]`.
        temperature: divides the logits.
        vocab_size: tokens that exist; columns beyond are padding and have no probability.

    Returns:
        float32 `[N, L]`; column t belongs to token t, and column 0 is 0.
    """
    scaled = logits[:, :-1].float() / temperature
    columns = scaled.shape[-1]
    first = parallel_state.get_tensor_model_parallel_rank() * columns
    if first + columns > vocab_size:
        padding = torch.arange(first, first + columns, device=scaled.device) >= vocab_size
        scaled = scaled.masked_fill(padding, torch.finfo(torch.float32).min)
    loss = vocab_parallel_cross_entropy(scaled.transpose(0, 1).contiguous(), input_ids[:, 1:].t().contiguous())
    return torch.nn.functional.pad(-loss.t(), (1, 0))
