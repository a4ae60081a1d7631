"""The page of a benchmark: what it says, that it is one safe file, and that its data are the figures'."""

from __future__ import annotations

import csv
import json
import re

import pytest

from raise_env.agents.bench_report import headline, write_bench_report
from raise_env.agents.benchmark import BenchPlan, bench
from raise_env.agents.job import Entry
from raise_env.agents.summary import summarise


def line(task, agent, seed, loss, **values):
    parts = {"features": 0.1, "preparation": 0.0, "learning": 0.2, "final": 0.3}
    fields = {"dev_loss": loss, "test_loss": loss, "test_accuracy": 0.5, "test_choice_probability": None}
    costs = {"phi": 0.6, "phi_parts": parts, "tokens": dict.fromkeys(parts, 10), "seconds": dict.fromkeys(parts, 1.0)}
    rest = {"diverged": False, "episode_returns": None, "rows": 4, "updates": 2, "error": None}
    return {"task": task, "agent": agent, "seed": seed, **fields, **costs, **rest, **values}


LOSSES = {"random": (1.0, 1.2), "oracle": (0.1, 0.2), "ours": (0.3, 0.5), "full": (0.0, 0.1)}


def lines():
    return [
        line(task, agent, seed, losses[seed] + 0.01 * place)
        for place, task in enumerate(("noise-0", "target"))
        for agent, losses in LOSSES.items()
        for seed in (0, 1)
    ]


def summary_of(results, agents=tuple(LOSSES)):
    return summarise(results, ("noise-0", "target"), list(agents), (0, 1), "random")


STATE = {"start": "2026-11-21T10:00:00", "plan": {"settings": {"horizon": 3}}, "versions": {"torch": "2.13.0"}}


@pytest.fixture
def page(tmp_path):
    write_bench_report(tmp_path, summary_of(lines()), lines(), [], STATE)
    return (tmp_path / "report.html").read_text()


def test_headline__best_agent__is_no_mark_of_the_scale():
    text = headline(summary_of(lines()))
    # random's mean is 1.1, the oracle's 0.15, ours 0.4: 0.7 / 0.95; the same offset in both tasks changes nothing.
    assert text.startswith("Over 2 tasks and 2 seeds, ours came 74% of the way from random rows to the oracle")
    assert "1 of 1 agents" in text


def test_headline__no_oracle_and_one_task__names_the_lowest_loss():
    losses = {"random": 1.0, "ours": 0.3, "theirs": 0.4, "full": 0.1}
    results = [line("noise-0", agent, 0, loss) for agent, loss in losses.items()]
    summary = summarise(results, ("noise-0",), list(losses), (0,), "random")
    assert headline(summary) == "Over 1 task and 1 seed, ours had the lowest test loss."


def test_headline__no_oracle_and_several_tasks__goes_by_ranks_over_all_of_them():
    first = {"random": 1.0, "ours": 0.3, "theirs": 0.4, "other": 0.5}
    second = {"random": 9.0, "ours": 8.0, "theirs": 7.0, "other": 7.5}
    third = {"random": 1.0, "ours": 0.9, "theirs": 0.1, "other": 0.2}
    tasks = {"noise-0": first, "target": second, "shift": third}
    results = [line(task, agent, 0, loss) for task, own in tasks.items() for agent, loss in own.items()]
    summary = summarise(results, tuple(tasks), list(first), (0,), "random")
    # Places by task: ours 0, 2, 2; theirs 1, 0, 0; other 2, 1, 1.
    assert headline(summary) == "Over 3 tasks and 1 seed, theirs had the best mean rank by test loss."


def test_headline__no_oracle_and_a_task_that_is_missing__counts_it_as_the_last_place():
    losses = {"noise-0": {"ours": 0.5, "theirs": 0.4}, "target": {"ours": 0.5}}
    results = [line(task, agent, 0, loss) for task, own in losses.items() for agent, loss in own.items()]
    summary = summarise(results, tuple(losses), ["theirs", "ours", "absent"], (0,), "ours")
    assert "theirs had" in headline(summary), "level, and named first"
    results.append(line("shift", "ours", 0, 0.5))
    assert "ours had" in headline(summarise(results, (*losses, "shift"), ["theirs", "ours", "absent"], (0,), "ours"))


def test_headline__marks_alone__says_that_there_is_nothing_to_compare():
    results = [own for own in lines() if own["agent"] in ("random", "oracle")]
    assert "nothing to compare" in headline(summary_of(results, ("random", "oracle")))


def test_page__runs_made_on_two_machines__names_both_with_their_runs(tmp_path):
    early, *others = ({**own, "hardware": "Xeon"} for own in lines())
    of_old = {name: value for name, value in early.items() if name != "hardware"}
    results = [of_old, *others[:-1], {**others[-1], "hardware": "H100"}]
    write_bench_report(tmp_path, summary_of(lines()), results, [], {**STATE, "machine": {"processor": "EPYC"}})
    assert "EPYC (1 run), Xeon (14 runs), H100 (1 run)" in (tmp_path / "report.html").read_text()
    with open(tmp_path / "results.csv", newline="") as file:
        assert [row["hardware"] for row in csv.DictReader(file)] == ["", *["Xeon"] * 14, "H100"]


def test_page__runs_made_on_one_machine__names_it_once(tmp_path):
    results = [{**own, "hardware": "Xeon"} for own in lines()]
    write_bench_report(tmp_path, summary_of(lines()), results, [], STATE)
    assert re.search(r"<dt>hardware</dt><dd>Xeon</dd>", (tmp_path / "report.html").read_text())


def test_page__tables__hold_every_agent_and_task(page):
    assert page.count("<h3>noise-0</h3>") == page.count("<h3>target</h3>") == 1
    assert len(re.findall(r"</span>ours", page)) == 3
    assert "none missing" in page


def test_page__one_file__refers_to_nothing_outside(page):
    assert "script-src 'none'" in page
    assert not re.search(r"(src|href)=\"(?!#)", page)
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    assert "<script" not in page


def test_page__names_of_strangers__stay_text(tmp_path):
    evil = "<script>alert(1)</script>"
    results = [{**own, "agent": evil} if own["agent"] == "ours" else own for own in lines()]
    results[0] = line("noise-0", "random", 0, None, error=evil, phi=None, test_accuracy=None)
    write_bench_report(tmp_path, summary_of(results, ("random", "oracle", evil, "full")), results, [], STATE)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_page__missing_runs__are_named(tmp_path):
    results = [*lines()[:-1], line("target", "full", 1, None, error="it failed", phi=None, test_accuracy=None)]
    write_bench_report(tmp_path, summary_of(results), results, [], STATE)
    page = (tmp_path / "report.html").read_text()
    assert "1 missing" in page
    assert re.search(r"<td>full</td><td class=\"number\">1</td><td>it failed</td>", page)


def test_files__data__are_those_of_the_figures(tmp_path):
    summary = summary_of(lines())
    write_bench_report(tmp_path, summary, lines(), [], STATE)
    with (tmp_path / "plots" / "scores.csv").open(newline="") as file:
        scores = {row["agent"]: float(row["iqm"]) for row in csv.DictReader(file)}
    assert scores == {agent: pytest.approx(own["iqm"]) for agent, own in summary["normalised"].items()}
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(lines())
    assert float(rows[0]["phi_learning"]) == 0.2
    for name in ("scores", "profiles", "cost"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "plots" / f"{name}.csv").exists()


def test_bench__a_learner__has_its_curves_on_the_page(tmp_path, small_settings):
    entries = {name: Entry(name, episodes=2 * (name == "raise_fork")) for name in ("random", "oracle", "raise_fork")}
    bench(tmp_path, BenchPlan(small_settings, entries, num_seeds=2))
    results = [json.loads(text) for text in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {own["agent"]: own["episode_returns"] is not None for own in results} == {
        "random": False,
        "oracle": False,
        "raise_fork": True,
    }
    with (tmp_path / "plots" / "returns_default.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == sum(len(own["episode_returns"] or ()) for own in results)
    with (tmp_path / "plots" / "curves_default.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3 * 2 * (small_settings["horizon"] + 1)
    assert "Dev score after each step" in (tmp_path / "report.html").read_text()


def test_page__ends_of_intervals__stay_where_a_phone_has_no_room_for_units(page):
    assert re.search(r'<td class="number">[\d.]+<span class="ends">[\d.]+ to [\d.]+</span></td>', page)
    phone = page.partition("@media (max-width: 640px)")[2].partition("@media print")[0]
    hidden = re.findall(r"([^{}]+)\{ display: none; \}", phone)
    assert any(".unit" in names for names in hidden)
    assert not any(".ends" in names for names in hidden)
