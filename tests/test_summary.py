"""Results of made-up runs, so that every number can be worked out by hand."""

from __future__ import annotations

import json

import pytest

from raise_env.agents.significance import detectable_effect
from raise_env.agents.summary import markdown_tables, summarise, text_tables

T3 = 4.302653  # Student's t for three runs


def line(agent, seed, loss, *, task="a", accuracy=None, phi=1.0, error=None, diverged=False):
    parts = {"features": 0.25, "preparation": 0.0, "learning": phi - 0.5, "final": 0.25}
    seconds = {"preparation": 0.0, "learning": 2.0, "final": 1.0}
    done = {"phi": phi, "phi_parts": parts, "seconds": seconds} if error is None else {}
    scores = {"dev_loss": loss, "test_loss": loss, "test_accuracy": accuracy, "diverged": diverged, "error": error}
    empty = {"phi": None, "phi_parts": None, "seconds": None}
    return {"task": task, "agent": agent, "seed": seed, **scores, **empty, **done}


LOSSES = {"random": [0.9, 1.0, 1.1], "oracle": [0.2, 0.2, 0.2], "mine": [0.5, 0.6, 0.4]}
RESULTS = [line(agent, seed, loss) for agent, losses in LOSSES.items() for seed, loss in enumerate(losses)]


def summary_of(results=RESULTS, tasks=("a",), agents=("random", "mine", "oracle"), seeds=range(3), reference="random"):
    summary = summarise(results, tasks, agents, seeds, reference)
    json.dumps(summary, allow_nan=False)
    return summary


def test_summarise__three_runs__mean_spread_and_intervals_by_hand():
    spread = summary_of()["per_task"]["a"]["mine"]
    assert spread["mean"] == pytest.approx(0.5)
    assert spread["std"] == pytest.approx(0.1)
    assert spread["half_width"] == pytest.approx(T3 * 0.1 / 3**0.5, rel=1e-6)
    # So far out lie the percentiles of three runs that they are the resamples' ends.
    assert (spread["low"], spread["high"]) == pytest.approx((0.4, 0.6))
    assert spread["num_runs"] == 3


def test_summarise__normalised__between_random_and_oracle():
    normalised = summary_of()["normalised"]
    # The middle half of 0.4, 0.5, 0.6 is 0.5: (1.0 - 0.5) / (1.0 - 0.2).
    assert normalised["mine"]["iqm"] == pytest.approx(0.625)
    assert normalised["oracle"] == pytest.approx({"iqm": 1.0, "low": 1.0, "high": 1.0, "num_missing": 0})
    assert normalised["random"]["iqm"] == pytest.approx(0.0)


@pytest.mark.parametrize("agents", [("random", "mine"), ("oracle", "mine")])
def test_summarise__without_one_of_the_marks__has_no_scale(agents):
    assert summary_of(agents=agents)["normalised"] == {}


@pytest.mark.parametrize(
    ("oracle", "has_scale"),
    [
        ([0.8, 0.9, 1.0], True),  # 0.1 ahead in each pair
        ([0.8, 0.9, 0.95], True),  # 0.1, 0.1, 0.15: 0.117 is 7 standard errors of 0.017; 4.3 are asked for
        ([0.8, 0.9, 0.85], False),  # 0.1, 0.1, 0.25: 0.15 is 3 of 0.05
        ([1.0, 1.1, 1.2], False),  # behind
        ([0.9, 1.0, 1.1], False),  # the same
    ],
)
def test_summarise__oracle_not_clearly_ahead__task_has_no_scale(oracle, has_scale):
    close = [line("oracle", seed, loss, task="b") for seed, loss in enumerate(oracle)]
    close += [
        line(agent, seed, loss, task="b") for agent in ("random", "mine") for seed, loss in enumerate((0.9, 1.0, 1.1))
    ]
    summary = summary_of([*RESULTS, *close], tasks=("a", "b"))
    assert summary["normalised_tasks"] == (["a", "b"] if has_scale else ["a"])
    told = "Left out: b, where the oracle is not clearly ahead of random rows."
    assert (told in text_tables(summary)) != has_scale
    if not has_scale:
        assert summary["normalised"] == summary_of()["normalised"]
        assert summary["profiles"] == summary_of()["profiles"]


def test_summarise__marks_that_share_two_seeds__are_those_of_these_seeds():
    losses = {"random": (2.0, None, 0.1, 2.1), "oracle": (1.0, 5.0, None, 1.1), "mine": (1.55, 1.55, 1.55, 1.55)}
    results = [
        line(agent, seed, loss, error=None if loss is not None else "it failed")
        for agent, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    # Between 2.05 and 1.05; the means of all runs would be 1.4 and 2.4, the wrong way round.
    assert summary_of(results, seeds=range(4))["normalised"]["mine"]["iqm"] == pytest.approx(0.5)


def test_summarise__oracle_nowhere_ahead__has_no_scale_and_tables_all_the_same():
    worse = [{**own, "test_loss": 2.0} if own["agent"] == "oracle" else own for own in RESULTS]
    summary = summary_of(worse)
    assert (summary["normalised"], summary["profiles"], summary["normalised_tasks"]) == ({}, {}, [])
    assert "Normalised" not in text_tables(summary)


def test_summarise__against_random__lower_loss_is_better():
    against = summary_of()["against_random"]
    assert set(against) == {"mine", "oracle"}
    # All runs apart, and yet three of them show no more than a chance of one half (Newcombe's rule, see below).
    ends = {"low": pytest.approx(0.501, abs=1e-3), "high": 1.0}
    assert against["mine"] == {"probability_of_improvement": 1.0, **ends, "num_missing": 0}
    assert summary_of(agents=("mine", "oracle"))["against_random"] == {}


def test_summarise__differences__are_paired():
    differences = summary_of()["differences"]["a"]
    assert set(differences) == {"mine", "oracle"}
    # -0.4, -0.4, -0.7: mean -0.5, standard deviation sqrt(0.03).
    assert differences["mine"]["mean"] == pytest.approx(-0.5)
    assert differences["mine"]["high"] == pytest.approx(-0.5 + T3 * (0.03 / 3) ** 0.5, rel=1e-6)
    assert set(summary_of(reference="mine")["differences"]["a"]) == {"random", "oracle"}


def test_summarise__differences__have_tests_by_hand():
    tests = summary_of()["differences"]["a"]
    # -0.4, -0.4, -0.7: t = -0.5 / 0.1 = -5 with 2 degrees of freedom: p = 1 - 5 / sqrt(25 + 2).
    assert tests["mine"]["p"] == pytest.approx(1 - 5 / 27**0.5)
    assert tests["mine"]["effect_size"] == pytest.approx(-0.5 / 0.03**0.5)
    # -0.7, -0.8, -0.9: t = -0.8 / (0.1 / sqrt(3)) = -13.86; the smaller of two p is doubled, the larger is not.
    assert tests["oracle"]["p"] == pytest.approx(1 - 192**0.5 / 194**0.5)
    assert tests["oracle"]["p_adjusted"] == pytest.approx(2 * tests["oracle"]["p"])
    assert tests["mine"]["p_adjusted"] == pytest.approx(tests["mine"]["p"])
    assert tests["mine"]["seeds_needed"] == 4
    assert {test["num_pairs"] for test in tests.values()} == {3}
    # 3.264 standard deviations would do for a single test; for two, at 2.5%, 4.625. The median of two is their mean.
    assert tests["oracle"]["detectable"] == pytest.approx(0.1 * detectable_effect(3, 0.025))
    middle = 4.625 * (0.1 + 0.03**0.5) / 2
    assert summary_of()["detectable"]["a"] == {"difference": pytest.approx(middle, abs=1e-3), "num_seeds": 3}


def test_summarise__pairs__are_all_and_mirror_each_other():
    pairs = summary_of()["pairs"]
    assert {agent: set(others) for agent, others in pairs.items()} == {
        "random": {"mine", "oracle"},
        "mine": {"random", "oracle"},
        "oracle": {"random", "mine"},
    }
    assert pairs["mine"]["random"] == summary_of()["against_random"]["mine"]
    there, back = pairs["oracle"]["mine"], pairs["mine"]["oracle"]
    assert there["probability_of_improvement"] == 1 - back["probability_of_improvement"] == 1.0
    assert (there["low"], there["high"]) == (1 - back["high"], 1 - back["low"])


def test_summarise__profiles__are_shares_above_thresholds():
    profiles = summary_of()["profiles"]
    assert set(profiles) == {"random", "mine", "oracle"}
    mine = profiles["mine"]
    assert mine["thresholds"] == profiles["oracle"]["thresholds"]
    assert mine["thresholds"][0] <= 0 < 1 <= mine["thresholds"][-1]
    for tau, share in zip(mine["thresholds"], mine["share"], strict=True):
        assert share == pytest.approx(sum(score > tau for score in (0.5, 0.625, 0.75)) / 3)  # normalised by hand
    assert all(low <= share <= high for low, share, high in zip(mine["low"], mine["share"], mine["high"], strict=True))
    assert summary_of(agents=("random", "mine"))["profiles"] == {}


def test_summarise__order_of_the_lines__does_not_matter():
    assert summary_of(RESULTS[::-1]) == summary_of()


def test_summarise__one_run__has_no_intervals():
    summary = summary_of(seeds=range(1), results=[entry for entry in RESULTS if entry["seed"] == 0])
    spread = summary["per_task"]["a"]["mine"]
    ends = {"low": None, "high": None, "num_missing": 0}
    assert spread == {"mean": 0.5, "std": None, "half_width": None, "num_runs": 1, **ends}
    assert summary["normalised"] == {}  # one run of the oracle is not clearly ahead
    test = summary["differences"]["a"]["mine"]
    assert test["mean"] == pytest.approx(-0.4)
    assert [test[name] for name in ("p", "p_adjusted", "effect_size", "seeds_needed", "detectable")] == [None] * 5
    assert summary["detectable"]["a"] == {"difference": None, "num_seeds": 1}


def test_summarise__missing_runs__are_named_and_left_out():
    results = [*RESULTS[:-1], line("mine", 2, None, diverged=True)]
    results[4] = line("oracle", 1, None, error="it broke")
    results += [line(agent, 3, loss) for agent, loss in {"random": 1.0, "oracle": 0.2, "mine": 0.5}.items()]
    there = [entry for entry in results if (entry["agent"], entry["seed"]) != ("random", 2)]
    summary = summary_of(there, seeds=range(4))
    assert summary["missing"] == [
        {"task": "a", "agent": "random", "seed": 2, "reason": "not run"},
        {"task": "a", "agent": "mine", "seed": 2, "reason": "diverged"},
        {"task": "a", "agent": "oracle", "seed": 1, "reason": "it broke"},
    ]
    assert summary["per_task"]["a"]["mine"]["mean"] == pytest.approx(1.6 / 3)
    assert summary["per_task"]["a"]["random"]["num_runs"] == 3
    # Pairs of what both have: seeds 0, 1 and 3.
    assert summary["differences"]["a"]["mine"]["mean"] == pytest.approx(-1.3 / 3)
    flags = {
        "per_task": summary["per_task"]["a"]["mine"],
        "normalised": summary["normalised"]["mine"],
        "differences": summary["differences"]["a"]["mine"],
        "profiles": summary["profiles"]["mine"],
    }
    assert {name: entry["num_missing"] for name, entry in flags.items()} == dict.fromkeys(flags, 1)
    assert summary["against_random"]["mine"]["num_missing"] == 2  # one of either


def test_summarise__a_run_without_a_finite_test_loss__is_named_and_marked():
    results = [*RESULTS[:-1], {**line("mine", 2, 0.4), "test_loss": None}]
    summary = summary_of(results)
    assert summary["missing"] == [{"task": "a", "agent": "mine", "seed": 2, "reason": "no finite test loss"}]
    assert "mine *" in text_tables(summary)
    # Without a test set that is how it should be.
    assert summary_of([{**entry, "test_loss": None} for entry in RESULTS])["missing"] == []


def test_summarise__nothing_but_failures__is_all_empty():
    summary = summary_of([line("mine", 0, None, error="no")], agents=("mine",), seeds=range(1))
    assert summary["per_task"]["a"]["mine"]["mean"] is None
    assert summary["cost"]["mine"]["phi"]["total"] is None
    assert summary["normalised"] == summary["against_random"] == summary["differences"] == {}
    assert "mine" in text_tables(summary)


def test_summarise__several_tasks__a_seed_counts_where_it_has_all():
    results = [*RESULTS, *(line(e["agent"], e["seed"], 10 * e["test_loss"], task="b") for e in RESULTS)]
    summary = summary_of(results, tasks=("a", "b"))
    assert summary["normalised"]["mine"]["iqm"] == pytest.approx(0.625)
    results = [entry for entry in results if (entry["agent"], entry["seed"], entry["task"]) != ("mine", 2, "b")]
    summary = summary_of(results, tasks=("a", "b"))
    # Without seed 2: 0.5 and 0.6 in both tasks, 0.625 and 0.5.
    assert summary["normalised"]["mine"]["iqm"] == pytest.approx(0.5625)
    assert summary["per_task"]["a"]["mine"]["num_runs"] == 3
    assert summary["per_task"]["a"]["mine"]["num_missing"] == 0
    # The seed's other run does not count either.
    assert summary["normalised"]["mine"]["num_missing"] == summary["profiles"]["mine"]["num_missing"] == 2


def test_summarise__no_test_set__takes_the_dev_loss():
    results = [{**entry, "test_loss": None} for entry in RESULTS]
    summary = summary_of(results)
    assert summary["metric"] == "dev_loss"
    assert summary["per_task"]["a"]["mine"]["mean"] == pytest.approx(0.5)
    assert "dev loss" in text_tables(summary)


def test_summarise__cost__means_over_runs():
    results = [line("mine", 0, 0.5, phi=1.0), line("mine", 1, 0.5, phi=2.0)]
    cost = summary_of(results, agents=("mine",), seeds=range(2))["cost"]["mine"]
    assert cost["phi"] == {"features": 0.25, "preparation": 0.0, "learning": 1.0, "final": 0.25, "total": 1.5}
    # An early line, without the seconds of features and without tokens.
    assert cost["seconds"] == {"features": None, "preparation": 0.0, "learning": 2.0, "final": 1.0, "total": 3.0}
    assert set(cost["tokens"].values()) == {None}


def test_summarise__cost_in_tokens_and_of_features__means_over_runs():
    parts = {"features": 4, "preparation": 0, "learning": 2, "final": 1}
    results = [{**line("mine", seed, 0.5), "tokens": {**parts, "final": seed}, "seconds": parts} for seed in (0, 1)]
    cost = summary_of(results, agents=("mine",), seeds=range(2))["cost"]["mine"]
    assert cost["tokens"] == {**parts, "final": 0.5, "total": 6.5}
    assert cost["seconds"] == {**parts, "total": 7.0}


# Tables


def cells(text):
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("|")]


def test_markdown_tables__one_task__one_table_with_the_best_first():
    header, rule, *rows = cells(markdown_tables(summary_of()))
    assert header[:5] == ["agent", "runs", "test loss", "p", "normalised IQM"]
    assert set(rule) == {"---", "---:"}
    assert [row[0] for row in rows] == ["oracle", "mine", "random"]
    assert rows[1][1:5] == ["3", "0.500 ± 0.248", "0.038", "0.62 [0.50, 0.78]"]
    assert rows[1][5:] == ["0.25", "0.00", "0.50", "1.00", "3.0"]
    assert rows[2][3] == ""


@pytest.mark.parametrize("tasks", [("a",), ("a", "b")])
def test_markdown_tables__runs_that_are_missing__mark_their_agent(tasks):
    results = [*RESULTS[:-1], line("mine", 2, None, diverged=True)]
    results += [{**entry, "task": "b"} for entry in RESULTS] if "b" in tasks else []
    text = markdown_tables(summary_of(results, tasks=tasks))
    assert {row[0] for row in cells(text)} >= {"mine *", "random", "oracle"}
    assert "mine" not in {row[0] for row in cells(text)}
    assert "* runs are missing" in text
    assert "runs are missing" not in markdown_tables(summary_of())


def test_markdown_tables__a_summary_of_an_earlier_version__is_still_shown():
    summary = summary_of()
    earlier = {name: value for name, value in summary.items() if name not in ("pairs", "profiles", "detectable")}
    keep = ("mean", "low", "high")
    tests = {agent: {n: test[n] for n in keep} for agent, test in summary["differences"]["a"].items()}
    header, *_ = cells(markdown_tables({**earlier, "differences": {"a": tests}}))
    assert "p" not in header


def test_markdown_tables__right_answers__in_per_cent_where_there_are_any():
    results = [line("mine", seed, 0.5, accuracy=0.5 + 0.1 * seed) for seed in range(3)]
    header, _, row = cells(markdown_tables(summary_of(results, agents=("mine",))))
    assert row[header.index("right answers")] == "60.0% ± 24.8"


def test_markdown_tables__another_reference__shows_the_differences():
    header, _, *rows = cells(markdown_tables(summary_of(reference="mine")))
    column = header.index("difference to mine")
    assert [row[column] for row in rows] == ["-0.300 [-0.548, -0.052]", "", "+0.500 [+0.070, +0.930]"]


def test_markdown_tables__several_tasks__one_each_and_one_over_all():
    results = [*RESULTS, *(line(e["agent"], e["seed"], 1.3 - e["test_loss"], task="b") for e in RESULTS)]
    text = markdown_tables(summary_of(results, tasks=("a", "b")))
    assert text.index("### a") < text.index("### b") < text.index("### all tasks")
    first, second, overall = (cells(part) for part in text.split("###")[1:])
    assert [row[0] for row in first[2:]] == ["oracle", "mine", "random"]
    assert [row[0] for row in second[2:]] == ["random", "mine", "oracle"]
    assert overall[0][:2] == ["agent", "normalised IQM"]


def test_markdown_tables__a_bar_in_a_name__stays_in_its_cell():
    results = [{**entry, "agent": "x|y"} for entry in RESULTS[:3]]
    assert "| x\\|y |" in markdown_tables(summary_of(results, agents=("x|y",)))


def test_text_tables__terminal__says_what_its_signs_mean():
    text = text_tables(summary_of())
    assert text.splitlines()[0].split()[:4] == ["agent", "runs", "test", "loss"]
    assert "±" in text.splitlines()[-3]
    assert text.splitlines()[-2].startswith("p: that the loss differs from that of random")
    assert "Normalised: 0 is random, 1 the oracle." in text.splitlines()[-1]
    assert "Normalised" not in text_tables(summary_of(agents=("mine",)))


def test_markdown_tables__multiple_choice__has_the_probability_of_the_right_choice():
    results = [
        {**line(agent, seed, loss), "test_accuracy": 0.25, "test_choice_probability": 0.3 + 0.01 * seed}
        for agent, losses in LOSSES.items()
        for seed, loss in enumerate(losses)
    ]
    summary = summary_of(results)
    assert summary["test_choice_probability"]["a"]["mine"]["mean"] == pytest.approx(0.31)
    table = markdown_tables(summary)
    assert "P of the right choice" in table
    assert "31.0% ± 2.5" in table
    assert "P of the right choice" not in markdown_tables(summary_of())
