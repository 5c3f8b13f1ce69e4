"""What is seen of tensors that a module was given in place of others."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from nemo_rl.trainer.fsdp import FsdpSource
from nemo_rl.trainer.places import Places


def module() -> torch.nn.Sequential:
    made = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    made.register_parameter("tied", made[0].weight)
    return made


def other_parameter(made: torch.nn.Sequential) -> None:
    made[0].weight = Parameter(made[0].weight.detach())  # the same storage: the tie is lost all the same


def other_buffer(made: torch.nn.Sequential) -> None:
    made[1].running_mean = torch.ones(3)


def other_module(made: torch.nn.Sequential) -> None:
    made[1] = torch.nn.BatchNorm1d(3)


def other_storage(made: torch.nn.Sequential) -> None:
    made[0].bias.data = torch.ones(3)


def assigned_state(made: torch.nn.Sequential) -> None:
    made.load_state_dict({name: t.clone() for name, t in made.state_dict().items()}, assign=True)


def one_more(made: torch.nn.Sequential) -> None:
    made[1].register_parameter("scale", Parameter(torch.ones(3)))


def one_less(made: torch.nn.Sequential) -> None:
    del made.tied


CHANGES = (one_more, one_less, other_parameter, other_buffer, other_module, other_storage, assigned_state)


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_took_a_place_is_seen(change) -> None:
    places = Places([made := module()])
    with torch.no_grad():
        made[0].weight.add_(1)
    assert not places.moved, "an optimizer's step"
    change(made)
    assert places.moved and not Places([made]).moved


def test_holdings_are_those_of_the_tensors_that_a_module_has() -> None:
    made = torch.nn.Sequential(torch.nn.Linear(2, 3))
    source = FsdpSource(made)
    made[0].weight = Parameter(torch.full((3, 2), 7.0))
    assert (source.holdings()[0].view == 7).all()
    made[0] = torch.nn.Linear(2, 3, bias=True).requires_grad_(False).apply(lambda m: m.weight.fill_(8))
    assert source.holdings()[0].view.data_ptr() == made[0].weight.data_ptr()
    assert source.holdings() == source.holdings() and (source.holdings()[0].view == 8).all()


def test_a_module_that_became_another_one_is_refused_by_name() -> None:
    source = FsdpSource(made := module())
    before = source.holdings()
    made[0].weight = Parameter(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"0\.weight was tied to tied when .*, and is TensorMeta"):
        source.holdings()
    made[0].weight = made.tied
    assert [h.fqn for h in source.holdings()] == [h.fqn for h in before]
    made[0].bias = Parameter(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"0\.bias was .*float32.*, and is .*bfloat16"):
        source.holdings()
