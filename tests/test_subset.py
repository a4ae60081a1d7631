"""The law of k of n rows against the sum over all sets, which is its definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from raise_env.agents.subset import SubsetLaw


def random_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_sets(n: int, k: int) -> Tensor:
    """Every set of k of n rows as a 0/1 vector, shape (sets, n)."""
    sets = [[float(i in chosen) for i in range(n)] for chosen in itertools.combinations(range(n), k)]
    return torch.tensor(sets, dtype=torch.float64)


def by_definition(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All sets, shape (sets, n), and their log-probabilities, shape (sets,)."""
    sets = all_sets(len(logits), k)
    return sets, (sets @ logits).log_softmax(0)


@pytest.mark.parametrize(("n", "k"), [(1, 0), (1, 1), (2, 1), (3, 2), (5, 3), (6, 1), (7, 4), (8, 8), (9, 0), (9, 7)])
def test_subset_law__small_n__agrees_with_enumeration(n: int, k: int) -> None:
    logits = random_logits(n)
    sets, log_probs = by_definition(logits, k)
    law = SubsetLaw(logits, k)

    torch.testing.assert_close(law.log_prob(sets), log_probs)
    torch.testing.assert_close(law.entropy(), -(log_probs.exp() * log_probs).sum())
    torch.testing.assert_close(law.marginals(), log_probs.exp() @ sets)
    torch.testing.assert_close(law.mode(), sets[log_probs.argmax()])


def test_subset_law__batch_dimensions__treats_each_alone() -> None:
    logits = random_logits(3, 2, 6)
    law = SubsetLaw(logits, 3)
    action = law.sample(torch.Generator().manual_seed(0))

    assert action.shape == (3, 2, 6)
    for index in itertools.product(range(3), range(2)):
        alone = SubsetLaw(logits[index], 3)
        torch.testing.assert_close(law.log_prob(action)[index], alone.log_prob(action[index]))
        torch.testing.assert_close(law.entropy()[index], alone.entropy())
        torch.testing.assert_close(law.marginals()[index], alone.marginals())
        torch.testing.assert_close(law.mode()[index], alone.mode())


def test_subset_law__mask__is_the_law_of_the_allowed_rows_alone() -> None:
    logits = random_logits(7)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    law, alone = SubsetLaw(logits, 2, mask), SubsetLaw(logits[mask], 2)
    sets = torch.zeros(10, 7, dtype=torch.float64)
    sets[:, mask] = all_sets(5, 2)

    torch.testing.assert_close(law.log_prob(sets), alone.log_prob(all_sets(5, 2)))
    torch.testing.assert_close(law.entropy(), alone.entropy())
    torch.testing.assert_close(law.marginals()[mask], alone.marginals())
    assert law.marginals()[~mask].eq(0).all()
    assert law.log_prob(torch.tensor([1.0, 1, 0, 0, 0, 0, 0])) == -math.inf


def test_subset_law__fewer_allowed_than_k__chooses_all_of_them() -> None:
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    law = SubsetLaw(random_logits(3, 5), 3, mask)

    assert law.sizes.tolist() == [2, 3, 0]
    for action in (law.mode(), law.sample(torch.Generator().manual_seed(1))):
        assert action.sum(-1).tolist() == [2, 3, 0]
        assert not action[~mask].any()
    certain = law.log_prob(mask.double())
    torch.testing.assert_close(certain[[0, 2]], torch.zeros(2, dtype=torch.float64))
    assert certain[1] == -math.inf
    torch.testing.assert_close(law.entropy()[[0, 2]], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("size", [0, 1, 3, 6])
def test_log_prob__wrong_size__is_minus_infinity_without_a_gradient(size: int) -> None:
    logits = random_logits(6).requires_grad_()
    action = (torch.arange(6) < size).double()
    log_prob = SubsetLaw(logits, 2).log_prob(action)
    (gradient,) = torch.autograd.grad(log_prob, logits)

    assert log_prob == -math.inf
    assert gradient.eq(0).all()


def test_log_prob__one_of_several_is_impossible__the_others_are_what_they_are() -> None:
    logits, mask = random_logits(4), torch.tensor([True, True, True, False])
    actions = torch.tensor([[1.0, 1, 0, 0], [1.0, 0, 0, 1], [0.0, 1, 1, 0], [1.0, 1, 1, 0]])
    law = SubsetLaw(logits, 2, mask)

    together = SubsetLaw(logits.expand(4, 4), 2, mask).log_prob(actions.double())
    assert together[[1, 3]].eq(-math.inf).all()
    for place in (0, 2):
        torch.testing.assert_close(together[place], law.log_prob(actions[place].double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subset_law__what_it_gives__is_of_the_logits_kind(dtype: torch.dtype) -> None:
    law = SubsetLaw(torch.zeros(5, dtype=dtype), 2)

    assert law.k == 2
    assert [law.sample().dtype, law.mode().dtype, law.entropy().dtype, law.marginals().dtype] == [dtype] * 4


def test_sample__many_draws__has_the_frequencies_of_the_law() -> None:
    num_draws = 20_000
    logits = random_logits(6, scale=1.0)
    sets, log_probs = by_definition(logits, 3)
    drawn = SubsetLaw(logits.expand(num_draws, 6), 3).sample(torch.Generator().manual_seed(0))
    counts = (drawn.unsqueeze(1) == sets).all(-1).sum(0)

    assert counts.sum() == num_draws
    assert stats.chisquare(counts.numpy(), (num_draws * log_probs.exp()).numpy()).pvalue > 0.01


def test_sample__generator__draws_from_it_alone() -> None:
    law = SubsetLaw(random_logits(4, 50), 8)
    before = torch.get_rng_state()
    draws = [law.sample(torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]

    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_sample__no_generator__follows_the_global_one() -> None:
    law = SubsetLaw(random_logits(4, 50), 8)
    draws = []
    with torch.random.fork_rng():
        for _ in range(2):
            torch.manual_seed(3)
            draws.append(law.sample())

    assert torch.equal(draws[0], draws[1])


def test_mode__equal_logits__takes_the_first_rows() -> None:
    assert SubsetLaw(torch.zeros(2, 40), 3).mode().nonzero()[:, 1].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("k", [1, 3, 5, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients__double_precision__agree_with_finite_differences(k: int, masked: bool) -> None:
    logits = random_logits(2, 6).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 0, 0, 1, 1, 0]], dtype=torch.bool) if masked else None
    action = SubsetLaw(logits, k, mask).mode()

    assert torch.autograd.gradcheck(lambda x: SubsetLaw(x, k, mask).log_prob(action), logits)
    assert torch.autograd.gradcheck(lambda x: SubsetLaw(x, k, mask).entropy(), logits)
    assert torch.autograd.gradcheck(lambda x: SubsetLaw(x, k, mask).marginals(), logits)


def test_gradients__extreme_logits_and_mask__are_finite_and_zero_where_forbidden() -> None:
    logits = torch.empty(8, 65).uniform_(-50, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.rand(8, 65, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0, 3:] = False
    law = SubsetLaw(logits, 8, mask)
    action = law.sample(torch.Generator().manual_seed(2))
    loss = law.log_prob(action).sum() + law.entropy().sum() + law.marginals().square().sum()
    loss.backward()

    assert logits.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[~mask].eq(0).all()
    assert logits.grad[mask].ne(0).any()


def test_subset_law__extreme_logits_in_single_precision__stays_exact() -> None:
    logits = random_logits(4, 64).clamp(-2, 2) * 25
    exact, single = SubsetLaw(logits, 8), SubsetLaw(logits.float(), 8)
    action = exact.sample(torch.Generator().manual_seed(0))

    torch.testing.assert_close(single.log_prob(action).double(), exact.log_prob(action), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(single.entropy().double(), exact.entropy(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single.marginals().double(), exact.marginals(), rtol=1e-4, atol=1e-5)


def test_subset_law__common_offset__costs_no_digits() -> None:
    logits = (random_logits(5, 20) * 64).round().float() / 64  # so that adding the offset rounds nothing
    law, moved = SubsetLaw(logits, 4), SubsetLaw(logits + 4096.0, 4)
    action = law.mode()

    torch.testing.assert_close(moved.log_prob(action), law.log_prob(action), rtol=0, atol=1e-4)
    torch.testing.assert_close(moved.entropy(), law.entropy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("n", "k"), [(64, 8), (1000, 8), (1000, 500)])
def test_subset_law__equal_weights__is_uniform(n: int, k: int) -> None:
    law = SubsetLaw(torch.zeros(n), k)
    log_count = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    torch.testing.assert_close(law.entropy().item(), log_count, rtol=1e-5, atol=0)
    torch.testing.assert_close(law.log_prob(law.mode()).item(), -log_count, rtol=1e-5, atol=0)
    torch.testing.assert_close(law.marginals(), torch.full((n,), k / n), rtol=1e-4, atol=0)
    assert law.sample(torch.Generator().manual_seed(0)).sum() == k


def test_marginals__thousand_rows__are_the_gradient_of_the_log_partition() -> None:
    logits = random_logits(1000).requires_grad_()
    law = SubsetLaw(logits, 8)
    action = law.mode()
    (gradient,) = torch.autograd.grad(law.log_prob(action), logits)

    torch.testing.assert_close(law.marginals(), action - gradient)
    torch.testing.assert_close(law.marginals().sum().item(), 8.0)


def test_log_prob__tables_built_without_gradient__has_one_all_the_same() -> None:
    logits = random_logits(6).requires_grad_()
    law = SubsetLaw(logits, 2)
    with torch.no_grad():
        action = law.sample(torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(law.log_prob(action), logits)

    torch.testing.assert_close(gradient, action - SubsetLaw(logits, 2).marginals())


def test_subset_law__half_precision__is_computed_in_single() -> None:
    assert SubsetLaw(torch.zeros(5, dtype=torch.bfloat16), 2).entropy().dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_subset_law__logit_not_finite__is_refused_unless_masked(bad: float) -> None:
    logits = torch.tensor([0.0, bad, 1.0])
    with pytest.raises(ValueError, match=r"^a logit is NaN or infinite: .*use the mask\)\.$"):
        SubsetLaw(logits, 1)

    law = SubsetLaw(logits, 1, torch.tensor([True, False, True]))
    assert torch.isfinite(law.entropy())


@pytest.mark.parametrize(("n", "k"), [(3, -1), (0, 0)])
def test_subset_law__impossible_size__is_refused(n: int, k: int) -> None:
    with pytest.raises(ValueError, match="expected k >= 0"):
        SubsetLaw(torch.zeros(n), k)
