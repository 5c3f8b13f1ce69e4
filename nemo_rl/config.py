"""How a YAML file, `key=value` overrides and the environment become one `Config` (schema.py), or are refused.

This module is the only reader of the environment: the variables of `ENVIRONMENT` override file and command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_rl.schema import Config


class ConfigError(ValueError):
    """The configuration is refused. `violations` lists everything that is wrong with it, each with its remedy."""

    def __init__(self, violations: Sequence[str]) -> None:
        self.violations = tuple(violations)
        count = f"{len(self.violations)} violation" + ("s" if len(self.violations) != 1 else "")
        super().__init__(f"configuration refused, {count}:\n" + "\n".join(f"  - {v}" for v in self.violations))


ENVIRONMENT: Mapping[str, str] = {
    "NRL_NCCL_XFER_REFIT": "policy.nccl_xfer_refit",
    "NRL_REFIT_TRANSPORT": "policy.refit.transport",
    "NRL_REFIT_BUCKET_BYTES": "policy.refit.bucket_bytes",
    "NRL_REFIT_NUM_STREAMS": "policy.refit.num_streams",
    "NRL_REFIT_DEADLINE_S": "policy.refit.deadline_s",
    "NRL_REFIT_VERIFY": "policy.refit.verify",
    "NRL_REFIT_MEASURE_LINKS": "policy.refit.measure_links",
    "NRL_REFIT_CACHE_DIR": "policy.refit.cache_dir",
    "NRL_RAY_ADDRESS": "cluster.address",
    "NRL_LOG_DIR": "logger.log_dir",
}
"""Variable -> key it overrides. `NRL_XFERDTENSOR_GOLDEN=1` also sets `policy.refit.transport=golden`."""


def load_config(path: str | Path, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Config:
    """Read `path`, apply `overrides` (`key=value`, Hydra's grammar), then the environment's.

    A file may name another of the same folder under `defaults`; its own keys win.

    Args:
        environ: stands in for the process environment.

    Raises:
        ConfigError: the file cannot be read, or keys are unknown or mistyped; all violations at once.
    """
    environ = os.environ if environ is None else environ
    raw = _read(Path(path))
    problems = _apply_overrides(raw, overrides) + _unknown_variables(environ)
    for key, value in environment_overrides(environ).items():
        OmegaConf.update(raw, key, value, force_add=True)
    return _build(raw, problems)


def environment_overrides(environ: Mapping[str, str]) -> dict[str, str]:
    """Keys and values that `NRL_*` variables set; empty variables set nothing."""
    found = {key: environ[name] for name, key in ENVIRONMENT.items() if environ.get(name)}
    if environ.get("NRL_XFERDTENSOR_GOLDEN", "0").lower() not in ("", "0", "false"):
        found["policy.refit.transport"] = "golden"
    return found


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Misspelt variables of the refit; other `NRL_*` ones may be somebody else's."""
    unknown = sorted(name for name in environ if name.startswith("NRL_REFIT_") and name not in ENVIRONMENT)
    return [f"{name}: unknown variable; unset it, or use one of {', '.join(ENVIRONMENT)}" for name in unknown]


def inherited_environment() -> dict[str, str]:
    """A copy of this process's environment, for processes that it starts."""
    return dict(os.environ)


def to_yaml(config: Config) -> str:
    """The resolved configuration; `load_config` reads it back to an equal value."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def _read(path: Path) -> DictConfig:
    try:
        raw = OmegaConf.load(path)
    except (OSError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read ({error}); pass --config an existing YAML file"]) from error
    except Exception as error:  # PyYAML's errors share no base with the others
        raise ConfigError([f"{path}: is not YAML ({error})"]) from error
    if not isinstance(raw, DictConfig):
        raise ConfigError([f"{path}: holds a {type(raw).__name__}, not a mapping of sections"])
    base = raw.pop("defaults", None)
    if base is None:
        return raw
    merged = OmegaConf.merge(_read(path.parent / str(base)), raw)
    assert isinstance(merged, DictConfig)
    return merged


def _apply_overrides(raw: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Update `raw` in place; returns a message for each override that is not `key=value`."""
    problems = []
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
            if override.is_delete() or override.is_sweep_override():
                problems.append(f"{text!r}: only key=value overrides are understood, one value each")
                continue
            OmegaConf.update(raw, override.key_or_group, override.value(), merge=True, force_add=True)
        except (HydraException, OmegaConfBaseException) as error:
            problems.append(f"{text!r}: cannot be applied ({str(error).splitlines()[0]}); write key=value")
    return problems


def _build(raw: DictConfig, problems: list[str]) -> Config:
    try:
        tree = OmegaConf.to_container(raw, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([*problems, f"an interpolation does not resolve: {error}"]) from error
    assert isinstance(tree, dict)
    config = _section(Config, tree, "", problems)
    if problems:
        raise ConfigError(problems)
    return config


def _section(schema: type, tree: Mapping[Any, Any], prefix: str, problems: list[str]) -> Any:
    """Instance of dataclass `schema` from `tree`; appends to `problems` what does not fit."""
    hints = typing.get_type_hints(schema)
    values: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in hints:
            problems.append(f"{key}: unknown key; {_suggestion(str(name), prefix, hints)}")
        elif dataclasses.is_dataclass(hints[name]):
            if isinstance(value, Mapping):
                values[name] = _section(typing.cast(type, hints[name]), value, f"{key}.", problems)
            else:
                known = ", ".join(f.name for f in dataclasses.fields(typing.cast(type, hints[name])))
                problems.append(f"{key}: is {value!r}, but a section with keys {known} is needed")
        else:
            try:
                values[name] = _convert(key, hints[name], value)
            except ValueError as error:
                problems.append(str(error))
    return schema(**values)


def _convert(key: str, hint: Any, value: Any) -> Any:
    """`value` as OmegaConf converts it to `hint`. Raises ValueError naming the key, the value and the type."""
    optional = type(None) in typing.get_args(hint)
    kind = next(k for k in (typing.get_args(hint) or (hint,)) if k is not type(None))
    if value is None and optional:
        return None
    if typing.get_origin(kind) is tuple:
        return _convert_list(key, typing.get_args(kind)[0], value)
    leaf = OmegaConf.structured(dataclasses.make_dataclass("Leaf", [("value", kind, kind())]))
    try:
        if value is None or isinstance(value, bool) is not (kind is bool) and not isinstance(value, str):
            raise TypeError(f"{type(value).__name__} is never taken for {kind.__name__}")
        if kind is str and not isinstance(value, str):
            raise TypeError("text is needed")
        leaf.value = value
        if kind is float and not math.isfinite(leaf.value):  # no comparison with nan fails
            raise TypeError("a finite number is needed")
    except (OmegaConfBaseException, TypeError) as error:
        needed = f"{kind.__name__} or null" if optional else kind.__name__
        raise ValueError(f"{key}: {value!r} is not of type {needed}; give a value of that type") from error
    return leaf.value


def _convert_list(key: str, item: type, value: Any) -> tuple[Any, ...]:
    """A list of `item`. Raises ValueError naming the key and what is wrong."""
    if not isinstance(value, list):
        raise ValueError(f"{key}: {value!r} is not a list; give a list of {item.__name__}")
    return tuple(_convert(f"{key}[{i}]", item, entry) for i, entry in enumerate(value))


def _suggestion(name: str, prefix: str, hints: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, hints, n=3, cutoff=0.6)
    if not near:  # the name may belong to another section
        near = [key for key in leaf_keys() if key.rsplit(".", 1)[-1] == name]
        return f"did you mean {' or '.join(near)}?" if near else f"known keys here are {', '.join(hints)}"
    return f"did you mean {' or '.join(prefix + n for n in near)}?"


def leaf_keys(schema: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    keys: list[str] = []
    for name, hint in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint):
            keys += leaf_keys(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys
