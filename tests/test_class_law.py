from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from raise_env.agents.class_law import BatchLaw
from raise_env.wrappers import top_of_each_class

#: Ten rows of three classes in no order, the last two of them padding.
CLASSES = np.array([0, 1, 0, 2, 1, 0, 2, 1, 0, 2])
MASK = np.arange(10) < 8


def law_of(scores, batch_size=6, num_classes=3, classes=CLASSES, mask=MASK):
    return BatchLaw(torch.as_tensor(scores), classes, mask, batch_size, num_classes)


def random_scores(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def every_draw(classes, mask, batch_size, num_classes):
    """Return all draws, shape (draws, rows): of every class b rows, then what is missing from the rest."""
    rows = np.flatnonzero(mask)
    by_class = [[row for row in rows if classes[row] == label] for label in range(num_classes)]
    share = batch_size // num_classes
    draws = []
    for parts in itertools.product(*(itertools.combinations(m, min(share, len(m))) for m in by_class)):
        taken = [row for part in parts for row in part]
        rest = [row for row in rows if row not in taken]
        for filling in itertools.combinations(rest, min(batch_size - len(taken), len(rest))):
            kinds = np.zeros(len(classes), dtype=np.int8)
            kinds[taken], kinds[list(filling)] = 1, 2
            draws.append(kinds)
    return torch.from_numpy(np.stack(draws))


# Batches of 3 and 6 divide by the classes; 6 and 7 fill up as classes are short; 2 has a share of none; 20 takes all.
BATCH_SIZES = [2, 3, 4, 5, 6, 7, 20]


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_log_prob__of_all_draws__adds_up_to_one(batch_size):
    draws = every_draw(CLASSES, MASK, batch_size, 3)
    scores = random_scores(10).expand(len(draws), -1)
    assert law_of(scores, batch_size).log_prob(draws).exp().sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("batch_size", [3, 4, 7])
def test_log_prob__of_a_draw__is_the_product_over_its_parts(batch_size):
    """Each part: the product of the weights of the drawn rows over the sum of such products."""
    scores = random_scores(10)
    weights = np.exp(scores.numpy())
    draws = every_draw(CLASSES, MASK, batch_size, 3)
    found = law_of(scores.expand(len(draws), -1), batch_size).log_prob(draws)

    def chance(chosen, among):
        total = sum(np.prod(weights[list(other)]) for other in itertools.combinations(among, len(chosen)))
        return np.prod(weights[chosen]) / total

    for kinds, log_prob in zip(draws.numpy()[::7], found[::7], strict=True):
        expected = 1.0
        for label in range(3):
            among = np.flatnonzero(MASK & (label == CLASSES))
            expected *= chance(np.flatnonzero((kinds == 1) & (label == CLASSES)), among)
        expected *= chance(np.flatnonzero(kinds == 2), np.flatnonzero(MASK & (kinds != 1)))
        assert log_prob.item() == pytest.approx(math.log(expected))


@pytest.mark.parametrize("batch_size", [3, 4])
def test_sample__many_draws__come_as_often_as_they_should(batch_size):
    draws = every_draw(CLASSES, MASK, batch_size, 3)
    scores = random_scores(10)
    expected = law_of(scores.expand(len(draws), -1), batch_size).log_prob(draws).exp().numpy()
    count = 20_000
    drawn = law_of(scores.expand(count, -1), batch_size).sample(torch.Generator().manual_seed(0))
    frequency = (drawn.unsqueeze(1) == draws).all(-1).double().mean(0).numpy()
    assert frequency.sum() == pytest.approx(1.0)
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(frequency - expected) < 4.5 * deviation).all()


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_sample__clear_scores__are_the_best_of_each_class(batch_size):
    scores = 1e4 * random_scores(10)
    drawn = law_of(scores, batch_size).sample(torch.Generator().manual_seed(0))
    best = top_of_each_class(scores.numpy(), CLASSES, MASK, batch_size, 3)
    np.testing.assert_array_equal(drawn.numpy() > 0, best == 1)


def test_sample__padding__is_never_drawn():
    scores = torch.zeros(500, 10)
    scores[:, ~MASK] = 50.0
    drawn = law_of(scores, batch_size=7).sample(torch.Generator().manual_seed(0))
    assert not drawn[:, ~MASK].any()
    assert (drawn > 0).sum(-1).eq(7).all()


def test_sample__a_class_without_rows__is_made_up_for():
    drawn = law_of(torch.zeros(100, 10), batch_size=6, mask=MASK & (CLASSES != 1)).sample(torch.Generator())
    assert (drawn > 0).sum(-1).eq(5).all()
    assert torch.isfinite(law_of(torch.zeros(100, 10), 6, mask=MASK & (CLASSES != 1)).log_prob(drawn)).all()


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_log_softmax_product__by_a_loop__is_equation_11(batch_size):
    scores = random_scores(5, 10)
    draws = law_of(scores, batch_size).sample(torch.Generator().manual_seed(0))
    found = law_of(scores, batch_size).log_softmax_product(draws)
    for step in range(5):
        weights, kinds = np.exp(scores[step].numpy()), draws[step].numpy()
        product = 1.0
        for row in np.flatnonzero(kinds):
            among = (CLASSES[row] == CLASSES) if kinds[row] == 1 else (kinds != 1)
            product *= weights[row] / weights[MASK & among].sum()
        assert found[step].item() == pytest.approx(math.log(product))


@pytest.mark.parametrize("quantity", ["log_prob", "log_softmax_product"])
def test_gradient__of_each_quantity__is_finite_and_none_at_padding(quantity):
    scores = random_scores(4, 10).requires_grad_()
    mask = MASK & (CLASSES != 1)
    draws = law_of(scores, 4, mask=mask).sample(torch.Generator().manual_seed(0))
    getattr(law_of(scores, 4, mask=mask), quantity)(draws).sum().backward()
    assert torch.isfinite(scores.grad).all()
    assert not scores.grad[:, ~mask].any()
    assert scores.grad[:, mask].any()


def test_sample__same_generator__same_draws():
    draws = [law_of(random_scores(3, 10), 5).sample(torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*draws)
