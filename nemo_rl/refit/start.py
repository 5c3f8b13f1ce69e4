"""The first refit as a test of the layouts: weights that the engine loaded itself come again and change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from nemo_rl.refit.base import Declaration, Landing
from nemo_rl.refit.digest import Ledger
from nemo_rl.refit.layout import TensorTable
from nemo_rl.refit.region import Region

Tensors = Callable[[], Mapping[str, torch.Tensor]]


class UnchangedByStart:
    """A landing around `inner` whose version 0 must leave the engine's tensors as the engine's own loader left them.

    Digests of refits compare what one layout sends with what another receives; whether a layout says what the loader
    does, only the loader knows. It loaded the checkpoint into this engine before.

    Args:
        inner: the engine's landing, untouched since the engine loaded the checkpoint that the trainers start from.
        tensors: everything that the engine computes with, by name.
    """

    def __init__(self, inner: Landing, tensors: Tensors) -> None:
        self._inner, self._tensors = inner, tensors
        self._before: dict[str, tuple[tuple[int, ...], int]] | None = None

    @property
    def version(self) -> int | None:
        return self._inner.version

    def declare(self, table: TensorTable) -> Declaration:
        return self._inner.declare(table)

    def begin(self, version: int) -> None:
        if version == 0:
            self._before = _digests(self._tensors())
        self._inner.begin(version)

    def open(self, unit: int) -> Mapping[int, torch.Tensor]:
        return self._inner.open(unit)

    def close(self, unit: int) -> None:
        self._inner.close(unit)

    def load_misc(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._inner.load_misc(tensors)

    def finish(self) -> None:
        """Raises RuntimeError, besides what `inner` raises, where version 0 changed a tensor; all of them by name."""
        self._inner.finish()
        before, self._before = self._before, None
        if before is None:
            return
        after = _digests(self._tensors())
        changed = [name for name in before | after if before.get(name) != after.get(name)]
        if changed:
            shown = ", ".join(changed[:8]) + (f" and {len(changed) - 8} more" if len(changed) > 8 else "")
            raise RuntimeError(
                f"version 0 brings other bytes than the engine's own loader read from the checkpoint: {shown}; the "
                f"trainers start from other weights, or the layout of one side does not say what its loader does"
            )

    def commit(self, version: int) -> None:
        self._inner.commit(version)

    def reject(self, reason: str) -> None:
        self._inner.reject(reason)


def _digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], int]]:
    """Name -> shape and digest; tensors without plain storage are left out."""
    plain = {name: t for name, t in tensors.items() if t.layout is torch.strided and not t.is_meta}
    ledger = Ledger(len(plain))
    for number, tensor in enumerate(plain.values()):
        ledger.take(number, tensor, Region.whole(tuple(tensor.shape)))
    found = ledger.read().tolist()
    return {name: (tuple(t.shape), digest) for (name, t), digest in zip(plain.items(), found, strict=True)}
