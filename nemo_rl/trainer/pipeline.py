"""Which layers a pipeline stage has. Imports no Megatron."""

from __future__ import annotations

from itertools import accumulate, pairwise


def stage_layers(split: tuple[int, ...], pipeline: int, stage: int) -> list[range]:
    """Layers of each of a stage's chunks, first chunk first.

    Args:
        split: layers of each chunk in the order in which a token passes them: chunk 0 of every stage, then chunk 1.
    """
    starts = [0, *accumulate(split)]
    chunks = [range(a, b) for a, b in pairwise(starts)]
    return chunks[stage::pipeline]


def split_layers(
    num_layers: int,
    pipeline: int,
    virtual: int = 1,
    first: int | None = None,
    last: int | None = None,
    embedding: bool = False,
    loss: bool = False,
) -> tuple[int, ...]:
    """Layers of each chunk, in the order of `stage_layers`, by Megatron's four options.

    Args:
        virtual: chunks of a stage.
        first, last: layers of the first and the last stage; the other stages share the rest equally.
        embedding, loss: the embedding, or the output layer with the loss, counts as one more layer of its stage.

    Raises:
        ValueError: the stages or chunks do not come out even, or both kinds of options are given; with the numbers.
    """
    if (first is not None or last is not None) and (embedding or loss):
        raise ValueError(
            "num_layers_in_first_pipeline_stage or num_layers_in_last_pipeline_stage and "
            "account_for_embedding_in_pipeline_split or account_for_loss_in_pipeline_split exclude each other; "
            "give the layers of the first and last stage alone"
        )
    if pipeline == 1 and (first is not None or last is not None or embedding or loss or virtual > 1):
        raise ValueError(
            f"virtual_pipeline_model_parallel_size={virtual} or uneven stages with pipeline_model_parallel_size=1: "
            f"there is one stage; raise the latter"
        )
    given = {0: first, pipeline - 1: last}
    fixed = {stage: count for stage, count in given.items() if count is not None}
    rest = num_layers + embedding + loss - sum(fixed.values())
    free = pipeline - len(fixed)
    if rest < 0 or (rest % free if free else rest):
        raise ValueError(
            f"pipeline_model_parallel_size={pipeline}: {rest} of {num_layers} layers are left for {free} stages, which "
            f"does not come out even; change the size, or give the layers of each stage in pipeline_layers"
        )
    stages = [fixed.get(stage, rest // free if free else 0) for stage in range(pipeline)]
    if any(count % virtual for count in stages):
        raise ValueError(
            f"virtual_pipeline_model_parallel_size={virtual} does not divide the layers of the stages {stages}; "
            f"choose a divisor, or give the layers of each chunk in pipeline_layers"
        )
    chunks = [count // virtual for _ in range(virtual) for count in stages]
    chunks[0] -= embedding
    chunks[-1] -= loss
    return tuple(chunks)
