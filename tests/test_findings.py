"""Made-up runs, so that every number can be worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from raise_env.agents.findings import ADAPTER, audit_tables, findings_of
from raise_env.record import EpisodeRecord

LOSSES = {  # (dev, test) by seed
    "random": [(1.0, 1.1), (1.2, 1.3), (1.1, 1.2)],
    "mine": [(0.5, 0.8), (0.7, 0.9), (0.6, 0.8)],
    "placebo:mine": [(1.0, 1.2), (1.1, 1.2), (1.2, 1.2)],
}


def run(agent, seed, dev, test, *, error=None):
    line = {"task": "a", "agent": agent, "seed": seed, "dev_loss": dev, "test_loss": test}
    line |= {"diverged": False, "error": error}
    if error is not None:
        return line, None
    env, versions, content = {"id": "RaiseSelect-v0", "kwargs": {}}, {}, {}
    score = None if test is None else -test
    record = EpisodeRecord(env, agent, 1000 + seed, [[1]], [2.0 - dev], [-2.0, -dev], score, versions, content)
    return line, record


RUNS = [run(agent, seed, *losses) for agent, rows in LOSSES.items() for seed, losses in enumerate(rows)]
NOISE = [run(ADAPTER, seed, 1.0, 1.0 + 0.1 * seed) for seed in range(3)]
HALVES = {"random": 0.5, "mine": None, "all": 0.8}
PROBES = [
    {
        "task": "a",
        "seed": seed,
        "base": {"dev_loss": 2.0, "test_loss": 2.05},
        "states": [
            {"step": 0, "rewards": {"random": [1.0, 2.0, 3.0, 4.0], "mine": [9.0 + seed]}, "halves": HALVES},
            {"step": 5, "rewards": {"random": ranks, "mine": [9.0 - seed]}, "halves": HALVES},
        ],
    }
    for seed, ranks in enumerate([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
]


def found(runs=RUNS, noise=NOISE, probes=PROBES):
    learners = {"mine": {"mine": 3}}
    findings = findings_of(runs, noise, probes, ["a"], ["random", "mine"], learners, 3)
    assert json.loads(json.dumps(findings, allow_nan=False)) == findings
    return findings


def test_noise__three_runs__spread_and_floor_by_hand():
    spread = found()["noise"]["a"][ADAPTER]
    assert spread["std"] == pytest.approx(0.1)
    # Chi-squared for 2 degrees of freedom is 7.377759 and 0.050636 at the ends.
    assert (spread["low"], spread["high"]) == pytest.approx(
        (0.1 * (2 / 7.377759) ** 0.5, 0.1 * (2 / 0.050636) ** 0.5), rel=1e-4
    )
    assert spread["single"] == pytest.approx(0.1 * 2**0.5 * 4.302653, rel=1e-6)
    assert spread["means"] == pytest.approx(spread["single"] / 3**0.5)
    assert (spread["num_runs"], spread["num_missing"]) == (3, 0)


def test_gap__three_runs__by_hand():
    gaps = found()["gap"]["a"]
    assert gaps["random"]["gap"]["mean"] == pytest.approx(0.1)
    assert gaps["random"]["against_random"] is None
    assert gaps["mine"]["episodes"] == 3
    # 0.3, 0.2, 0.2, against 0.05 before any step and 0.1 of random.
    assert gaps["mine"]["gap"]["mean"] == pytest.approx(0.7 / 3)
    assert gaps["mine"]["gain_gap"]["mean"] == pytest.approx(0.7 / 3 - 0.05)
    assert gaps["mine"]["against_random"]["mean"] == pytest.approx(0.7 / 3 - 0.1)


def test_rewards__replayed__rank_correlations_by_hand():
    replayed = found()["rewards"]["a"]["replayed"]
    assert replayed["random"]["by_step"] == {"0": pytest.approx(1.0), "5": pytest.approx(-1.0)}
    assert replayed["random"]["correlation"] == pytest.approx(0.0)
    assert replayed["mine"]["correlation"] is None  # one batch has no ranks
    # Of five batches the last is the best in both runs: ranks 1 2 3 4 5 and 4 3 2 1 5.
    assert replayed["all"]["by_step"]["5"] == pytest.approx(1 - 6 * (9 + 1 + 1 + 9) / (5 * 24))


def test_rewards__replayed__a_run_that_ended_early_counts_where_it_has_steps_in_common():
    first, second = PROBES
    early = {**second, "states": [second["states"][0], {**second["states"][1], "step": 3}]}
    replayed = found(probes=[first, early])["rewards"]["a"]["replayed"]
    assert replayed["random"]["by_step"] == {"0": pytest.approx(1.0)}
    early = {**second, "states": second["states"][:1]}
    assert found(probes=[first, early])["rewards"]["a"]["replayed"] == replayed


def probe_of(seed, *by_step):
    states = [{"step": step, "rewards": {"random": own, "mine": []}, "halves": {}} for step, own in enumerate(by_step)]
    halves = {"random": None, "mine": None, "all": None}
    return {**PROBES[0], "seed": seed, "states": [{**state, "halves": halves} for state in states]}


def test_rewards__replayed__interval_is_over_runs_and_of_correlations():
    up, down, mixed = [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 4.0, 3.0]
    # Two runs at each of many steps: however many, they are one pair.
    two = found(probes=[probe_of(0, *[up] * 6), probe_of(1, *[up, mixed] * 3)])["rewards"]["a"]["replayed"]["random"]
    assert (two["correlation"], two["low"], two["high"]) == (pytest.approx(0.9), None, None)
    four = found(probes=[probe_of(0, up), probe_of(1, up), probe_of(2, mixed), probe_of(3, down)])
    replayed = four["rewards"]["a"]["replayed"]["random"]
    # Pairs: 1, 0.8, -1, 0.8, -1, -0.8; of each run 0.8 / 3, 0.8 / 3, 0.8 / 3, -2.8 / 3.
    mean = -0.2 / 6
    assert replayed["correlation"] == pytest.approx(mean)
    # Leaving one out leaves three pairs: 2.6 / 3 without the last, -1 / 3 without any other.
    left_out = np.array([-1.0, -1.0, -1.0, 2.6]) / 3
    half = stats.sem(4 * mean - 3 * left_out) * stats.t.ppf(0.975, 3)
    reach = half / (1 - mean**2)
    ends = np.tanh(np.arctanh(mean) + np.array([-reach, reach]))
    assert (replayed["low"], replayed["high"]) == pytest.approx(tuple(ends))
    assert -1 < replayed["low"] < replayed["high"] < 1


def test_rewards__halves__ends_are_correlations():
    probes = [{**PROBES[0], "seed": seed} for seed in range(3)]
    for probe, value in zip(probes, (0.99, 0.9, 0.6), strict=True):
        probe["states"] = [{**state, "halves": {**HALVES, "random": value}} for state in PROBES[0]["states"]]
    halves = found(probes=probes)["rewards"]["a"]["halves"]["random"]
    assert halves["correlation"] == pytest.approx(0.83)
    assert -1 < halves["low"] < 0.83 < halves["high"] < 1


def test_rewards__halves__share_of_the_dev_sample_by_hand():
    halves = found()["rewards"]["a"]["halves"]
    # Spearman and Brown: halves at 0.5 make a whole at 2/3.
    assert (halves["random"]["correlation"], halves["random"]["dev_share"]) == pytest.approx((0.5, 1 / 3))
    assert (halves["mine"]["correlation"], halves["mine"]["dev_share"]) == (None, None)
    assert halves["all"]["dev_share"] == pytest.approx(1 / 9)


def test_rewards__sum_and_test__over_runs_of_agents_and_of_all():
    sums = found()["rewards"]["a"]["sum_and_test"]
    assert {name: value["num_runs"] for name, value in sums.items()} == {"random": 3, "mine": 3, "all": 6}
    assert sums["random"]["correlation"] == pytest.approx(1.0)
    assert 0.9 < sums["all"]["correlation"] < 1


def test_placebo__three_comparisons__adjusted_together():
    tests = found()["placebo"]["a"]["mine"]
    assert tests["placebo_against_random"]["mean"] == pytest.approx(0.0)
    assert tests["agent_against_random"]["mean"] == pytest.approx(-1.1 / 3)
    smallest = min(tests.values(), key=lambda test: test["p"])
    assert smallest["p_adjusted"] == pytest.approx(min(1, 3 * smallest["p"]))


def test_findings__missing_runs__are_named_and_flagged():
    runs = [*RUNS[:-1], run("placebo:mine", 2, None, None, error="it broke")]
    findings = found(runs)
    assert findings["missing"] == [{"task": "a", "agent": "placebo:mine", "seed": 2, "reason": "it broke"}]
    assert findings["placebo"]["a"]["mine"]["placebo_against_random"]["num_missing"] == 1
    tables = audit_tables(findings)
    assert " * |" in tables
    assert "Missing: a, placebo:mine, seed 2: it broke" in tables


def test_findings__a_run_without_a_finite_test_loss__is_named():
    findings = found(noise=[*NOISE[:-1], run(ADAPTER, 2, 1.0, None)])
    assert findings["missing"] == [{"task": "a", "agent": ADAPTER, "seed": 2, "reason": "no finite test loss"}]
    assert f"Missing: a, {ADAPTER}, seed 2: no finite test loss" in audit_tables(findings)


def test_findings__nothing_done__is_all_empty():
    findings = found([], [], [])
    assert findings["noise"]["a"][ADAPTER]["std"] is None
    assert findings["rewards"]["a"]["halves"]["all"] == {
        **dict.fromkeys(("correlation", "low", "high", "dev_share")),
        "num_missing": 0,
    }
    assert "Noise floor" in audit_tables(findings)
