"""The networks over rows: any number, any order, and weights from the given generator only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from raise_env.agents import networks
from raise_env.agents.networks import AcquisitionFunction, Critic, mlp


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(1))


@pytest.mark.parametrize("shape", [(5,), (5, 1), (2, 3, 7)])
def test_networks__any_leading_shape__keep_it(shape: tuple[int, ...]) -> None:
    offered = rows(*shape, 4)

    assert AcquisitionFunction(4)(offered).shape == shape
    assert Critic(4)(offered).shape == shape[:-1]


def test_acquisition_function__rows__are_scored_one_by_one() -> None:
    acquisition = AcquisitionFunction(4, (8,), nn.SiLU, generator())
    offered = rows(10, 4)
    one_by_one = torch.stack([acquisition(row) for row in offered])

    torch.testing.assert_close(acquisition(offered), one_by_one)


def test_acquisition_function__fresh__scores_close_to_zero_but_not_equal() -> None:
    scores = AcquisitionFunction(39, generator=generator())(rows(64, 39))

    assert scores.abs().max() < 0.1
    assert scores.std() > 1e-4


def test_critic__permuted_or_repeated_rows__has_the_same_value() -> None:
    critic = Critic(4, generator=generator())
    offered = rows(10, 4)

    torch.testing.assert_close(critic(offered.flip(0)), critic(offered))
    torch.testing.assert_close(critic(torch.cat([offered, offered])), critic(offered))


def test_critic__no_hidden_layers__is_linear_in_the_mean_of_the_rows() -> None:
    critic = Critic(4, (), generator=generator())
    offered = rows(2, 10, 4)
    mask = torch.arange(10).expand(2, 10) < 6

    torch.testing.assert_close(critic(offered), critic.head(offered.mean(-2)).squeeze(-1))
    torch.testing.assert_close(critic(offered, mask), critic(offered[:, :6]))
    assert [tuple(parameter.shape) for parameter in critic.parameters()] == [(1, 4), (1,)]


def test_critic__row_mask__leaves_padding_out() -> None:
    critic = Critic(4, generator=generator())
    offered = rows(2, 10, 4)
    mask = torch.arange(10) < 6

    torch.testing.assert_close(critic(offered, mask.expand(2, 10)), critic(offered[:, :6]))
    assert torch.isfinite(critic(offered, torch.zeros(2, 10, dtype=torch.bool))).all()


@pytest.mark.parametrize("network", [AcquisitionFunction, Critic])
def test_networks__generator__decides_the_weights_alone(network: type[AcquisitionFunction | Critic]) -> None:
    before = torch.get_rng_state()
    first, same, other = (network(4, generator=generator(seed)).state_dict() for seed in (0, 0, 1))

    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_networks__no_generator__follow_the_global_one() -> None:
    weights = []
    with torch.random.fork_rng():
        for _ in range(2):
            torch.manual_seed(3)
            weights.append(AcquisitionFunction(4).layers[0].weight)

    assert torch.equal(*weights)


def test_mlp__weights__are_orthogonal_with_zero_bias() -> None:
    layers = mlp((8, 8, 8), output_gain=0.5, generator=generator())
    weight = layers[-1].weight

    torch.testing.assert_close(weight @ weight.T, 0.25 * torch.eye(8), rtol=0, atol=1e-5)
    assert layers[-1].bias.eq(0).all()
    assert [type(layer) for layer in layers] == [nn.Linear, nn.Tanh, nn.Linear]


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("network", [AcquisitionFunction, Critic])
def test_networks__more_rows_than_go_through_at_once__give_the_same_in_parts(monkeypatch, network, with_mask):
    made = network(4, (8, 8), generator=generator())
    arguments = (torch.arange(10) < 7,) if with_mask and network is Critic else ()
    offered = rows(2, 10, 4)
    results, most_rows = [], []
    for layer in made.modules():
        if isinstance(layer, nn.Linear) and layer.in_features == 4:
            layer.register_forward_hook(lambda _, inputs, __: most_rows.append(inputs[0].shape[-2]))
    for limit in (10, 3):
        monkeypatch.setattr(networks, "ROWS_AT_ONCE", limit)
        found = made(offered, *arguments)
        gradients = torch.autograd.grad(found.square().sum(), list(made.parameters()))
        results.append((found, *gradients))
        assert max(most_rows) == limit
        most_rows.clear()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
