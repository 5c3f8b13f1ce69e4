"""The schema, overrides, the environment, and refusals that name every violation at once."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from nemo_rl.config import ENVIRONMENT, ConfigError, leaf_keys, load_config, to_yaml
from nemo_rl.schema import Config


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text("policy: {megatron_cfg: {tensor_model_parallel_size: 2}}\ngrpo: {max_num_steps: 7}\n")
    return file


def refusals(path: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, {})
    return caught.value.violations


def test_file_then_overrides_then_environment(path: Path) -> None:
    config = load_config(
        path,
        ["policy.megatron_cfg.optimizer.lr=3e-5", "policy.nccl_xfer_refit=false", "policy.refit.num_streams=3"],
        {"NRL_REFIT_NUM_STREAMS": "5", "NRL_REFIT_VERIFY": "0", "NRL_REFIT_TRANSPORT": ""},
    )
    assert config.policy.megatron_cfg.tensor_model_parallel_size == 2
    assert config.grpo.max_num_steps == 7
    assert config.policy.megatron_cfg.optimizer.lr == 3e-5
    assert config.policy.nccl_xfer_refit is False
    assert config.policy.refit.num_streams == 5
    assert config.policy.refit.verify is False
    assert config.policy.refit.transport == "auto"


def test_golden_variable_wins_over_the_transport(path: Path) -> None:
    environ = {"NRL_XFERDTENSOR_GOLDEN": "1", "NRL_REFIT_TRANSPORT": "gloo"}
    assert load_config(path, ["policy.refit.transport=auto"], environ).policy.refit.transport == "golden"
    assert load_config(path, [], {"NRL_XFERDTENSOR_GOLDEN": "0"}).policy.refit.transport == "auto"


def test_a_misspelt_variable_is_refused(path: Path) -> None:
    environ = {"NRL_REFIT_STREAMS": "2", "NRL_REFIT_NUM_STREAMS": "2", "NRL_OF_OTHERS": "1"}
    with pytest.raises(ConfigError) as caught:
        load_config(path, [], environ)
    (said,) = caught.value.violations
    assert said.startswith("NRL_REFIT_STREAMS: unknown variable; ") and "NRL_REFIT_NUM_STREAMS" in said


def test_variables_name_keys_of_the_schema() -> None:
    assert set(ENVIRONMENT.values()) <= set(leaf_keys())


def test_all_violations_at_once_by_name(path: Path) -> None:
    said = refusals(
        path,
        "grpo.num_prompt_per_step=3",
        "grpo.max_num_steps=abc",
        "policy.nccl_xfer_refit=maybe",
        "policy.refit=3",
        "policy.model_name=null",
        "lr=3",
        "~grpo",
        "grpo.seed",
    )
    assert len(said) == 8
    text = "\n".join(said)
    assert "grpo.num_prompt_per_step: unknown key; did you mean grpo.num_prompts_per_step?" in text
    assert "grpo.max_num_steps: 'abc' is not of type int" in text
    assert "policy.nccl_xfer_refit: 'maybe' is not of type bool" in text
    assert "policy.refit: is 3, but a section with keys transport" in text
    assert "policy.model_name: None is not of type str" in text
    assert "lr: unknown key; did you mean policy.megatron_cfg.optimizer.lr?" in text
    assert "'~grpo'" in text and "'grpo.seed'" in text


@pytest.mark.parametrize(
    "override",
    ["grpo.seed=1.5", "grpo.seed=true", "loss_fn.ratio_clip_min=high", "logger.run_name=[a]", "policy.refit.verify=2"]
    + ["grpo.max_gen_kl_error=nan", "policy.refit.deadline_s=inf", "policy.refit.deadline_s=.nan"],
)
def test_wrong_types(path: Path, override: str) -> None:
    (said,) = refusals(path, override)
    assert said.startswith(override.split("=")[0] + ":")


def test_optional_values(path: Path) -> None:
    config = load_config(path, ["loss_fn.truncated_importance_sampling_ratio=null", "cluster.address=auto"], {})
    assert config.loss_fn.truncated_importance_sampling_ratio is None
    assert config.cluster.address == "auto"


def sections(schema: type) -> list[type]:
    """`schema` and every section below it."""
    kinds = [hint for hint in typing.get_type_hints(schema).values() if dataclasses.is_dataclass(hint)]
    return [schema, *(found for kind in kinds for found in sections(kind))]


@pytest.mark.parametrize("section", sections(Config)[1:], ids=lambda section: section.__name__)
def test_every_key_is_explained_where_it_stands(section: type) -> None:
    named = {name for words in re.findall(r"`([^`]+)`", str(section.__doc__)) for name in re.findall(r"\w+", words)}
    keys = {name for name, hint in typing.get_type_hints(section).items() if not dataclasses.is_dataclass(hint)}
    assert keys and keys - named == set()


def test_yaml_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["logger.run_name=x"], {})
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(config))
    assert load_config(saved, [], {}) == config


def test_defaults_name_a_base_file(path: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("defaults: run.yaml\ngrpo: {seed: 5}\n")
    config = load_config(child, [], {})
    assert (config.grpo.max_num_steps, config.grpo.seed) == (7, 5)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [", "policy: {model_name: ${nowhere}}"])
def test_unreadable_files(tmp_path: Path, text: str) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(text)
    refusals(bad)


def test_missing_file(tmp_path: Path) -> None:
    (said,) = refusals(tmp_path / "none.yaml")
    assert "none.yaml" in said and "--config" in said


@pytest.mark.parametrize("name", ["grpo_qwen3_tiny_cpu.yaml", "grpo_qwen3_moe_tiny_cpu.yaml"])
def test_example_files_fit_the_schema(name: str) -> None:
    folder = Path(__file__).parents[2] / "examples" / "configs"
    assert isinstance(load_config(folder / name, [], {}), Config)
