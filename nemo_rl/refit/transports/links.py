"""Whether links are measured, and where measurements are kept from run to run."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import torch

from nemo_rl.refit.base import RefitOptions
from nemo_rl.refit.control import Control
from nemo_rl.refit.cost import Links
from nemo_rl.refit.transports.mover import Facts, Transport
from nemo_rl.refit.transports.probes import measure

log = logging.getLogger(__name__)


def learn(
    control: Control,
    transports: Sequence[Transport],
    facts: Facts,
    options: RefitOptions,
    device: torch.device,
) -> Links | None:
    """What is known of the links of this world, the same on all ranks; every rank calls it.

    `options.measure_links` says when ranks measure: `auto` where several transports could be taken and nothing is
    cached, `always`, or `never`. None where nothing is cached and nothing was measured.

    Raises:
        RefitError: a transport that supports these ranks failed while it was measured.
    """
    cache = Cache(options.cache_dir, facts, options)
    names = [t.name for t in transports]
    told = cache.decide(names, options.measure_links) if control.rank == 0 else b""
    verdict = control.gather("connect", told)[0].decode()
    if verdict != "measure":
        return Links.from_json(verdict) if verdict else None
    started = time.monotonic()
    free = [fact.free_bytes for fact in facts.values() if fact.free_bytes is not None]
    links = measure(control, transports, options, device, min(free, default=None))
    if control.rank == 0:
        cache.keep(links)
        log.info("links measured in %.2f s: %s", time.monotonic() - started, links.to_json())
    return links


class Cache:
    """Measurements of worlds like this one, a file each. Only rank 0 reads and writes.

    Args:
        folder: empty for no cache.
        facts: hosts, devices and versions of all ranks tell worlds apart, and so do the options that rates depend on.
    """

    def __init__(self, folder: str, facts: Facts, options: RefitOptions) -> None:
        ranks = [[r, fact.name, fact.device, fact.hardware, fact.gpu] for r, fact in sorted(facts.items())]
        self._key = json.dumps([ranks, options.bucket_bytes, options.num_streams])
        name = f"links-{sha256(self._key.encode()).hexdigest()[:16]}.json"
        self._path = Path(folder).expanduser() / name if folder else None

    def decide(self, names: Sequence[str], mode: str) -> bytes:
        """`measure`, the cached links, or nothing, as `learn` says."""
        if mode == "always":
            return b"measure"
        found = self.read()
        if found is not None and set(names) <= set(found.rates):
            return found.to_json().encode()
        return b"measure" if mode == "auto" and len(names) > 1 else b""

    def read(self) -> Links | None:
        if self._path is None or not self._path.exists():
            return None
        try:
            said = json.loads(self._path.read_text())
            return Links.from_json(said["links"]) if said["key"] == self._key else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is not read (%s); delete it", self._path, error)
            return None

    def keep(self, links: Links) -> None:
        """Written beside and renamed, so that readers see a whole file."""
        if self._path is None:
            return
        beside = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps({"key": self._key, "links": links.to_json()}))
            beside.replace(self._path)
        except OSError as error:
            log.warning("links are not cached (%s); set policy.refit.cache_dir to a folder that can be written", error)
            with suppress(OSError):
                beside.unlink(missing_ok=True)
