"""Records replayed and held against results: what was tampered with is found and named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from raise_env.agents.benchmark import BenchPlan, bench
from raise_env.agents.job import Entry, Job, run_job
from raise_env.agents.leaderboard import leaderboard, markdown_board
from raise_env.agents.validation import (
    Recorded,
    by_record,
    check_cost,
    check_results,
    is_of_audit,
    read_bench,
    replay_all,
)
from raise_env.errors import RecordError, SettingError

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_settings):
    """Two agents and the two marks of the scale, two seeds."""
    folder = tmp_path_factory.mktemp("benched") / "ours"
    names = ("random", "oracle", "loss_low", "quality:rating")
    bench(folder, BenchPlan(small_settings, {name: Entry(name) for name in names}, num_seeds=2))
    return folder


@pytest.fixture
def standard(monkeypatch, small_settings):
    """The small settings count as those of the task: none of its agents has settings of its own."""
    from raise_env.agents import leaderboard as module

    own = module._own_settings
    monkeypatch.setattr(module, "_own_settings", lambda recorded: own(recorded) - set(small_settings))
    monkeypatch.setattr("raise_env.agents.summary.CLEAR_WAY", 0.5)  # two seeds are few to be ahead by


@pytest.fixture
def theirs(finished, tmp_path):
    """A copy of the folder, to change."""
    return shutil.copytree(finished, tmp_path / "theirs")


def change(path, place, **values):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[place].update(values)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines[place]


def test_check_results__as_written__nothing(finished):
    assert check_results(*read_bench(finished)) == {}


@pytest.mark.parametrize(
    ("name", "value"), [("test_loss", 0.0), ("dev_loss", 0.0), ("test_accuracy", 1.0), ("rows", 1), ("updates", 99)]
)
def test_check_results__a_line_that_its_record_does_not_bear__is_named(theirs, name, value):
    line = change(theirs / "results.jsonl", 3, **{name: value})
    faults = check_results(*read_bench(theirs))
    assert list(faults) == [(line["task"], line["agent"], line["seed"])]
    assert f"{name} is {value!r}; its record says" in next(iter(faults.values()))


def test_check_results__a_record_without_final_scores__bears_no_made_up_ones(theirs):
    change(theirs / "episodes.jsonl", 3, final={})
    change(theirs / "results.jsonl", 3, test_loss=0.001, test_accuracy=None)
    assert "test_loss is 0.001; its record says None" in next(iter(check_results(*read_bench(theirs)).values()))


def test_check_results__a_run_that_did_not_diverge__cannot_be_said_to(theirs):
    change(theirs / "results.jsonl", 3, diverged=True)
    assert "diverged is True; its record says False" in next(iter(check_results(*read_bench(theirs)).values()))


def test_check_results__a_run_that_diverged__has_no_dev_loss(theirs):
    record = json.loads((theirs / "episodes.jsonl").read_text().splitlines()[3])
    rewards, scores = [*record["rewards"][:-1], -10.0], [*record["dev_scores"][:-1], record["dev_scores"][-2]]
    change(theirs / "episodes.jsonl", 3, rewards=rewards, dev_scores=scores, test_score=None, final={})
    change(theirs / "results.jsonl", 3, diverged=True, dev_loss=0.5, test_loss=None, test_accuracy=None)
    assert "dev_loss is 0.5; its record says None" in next(iter(check_results(*read_bench(theirs)).values()))
    change(theirs / "results.jsonl", 3, dev_loss=None)
    assert check_results(*read_bench(theirs)) == {}


@pytest.fixture(scope="module")
def of_answers(small_settings):
    """A run whose reward is not the loss: its line, and its record."""
    settings = {**small_settings, "reward": "exact_match", "seed_model": 0}
    outcome = run_job(Job("default", "random", 0, Entry("random"), settings))
    return outcome.line, Recorded("the record", outcome.record)


def test_check_results__another_reward_than_the_loss__has_a_dev_loss_all_the_same(of_answers):
    line, recorded = of_answers
    assert check_results([line], [recorded]) == {}
    (fault,) = check_results([{**line, "dev_loss": None}], [recorded]).values()
    assert fault.startswith("dev_loss is None; expected a number, as the run did not diverge")


@pytest.mark.parametrize(("factor", "what"), [(1.0, None), (1.001, None), (0.99, "dev loss"), (0.0, "dev loss")])
def test_replay_all__a_dev_loss_that_no_record_tells__is_compared(of_answers, factor, what):
    line, recorded = of_answers
    claimed = {**line, "dev_loss": factor * line["dev_loss"]}
    (replayed,) = replay_all([recorded], {recorded.where: claimed}, in_one_thread=True)
    assert (replayed.difference and replayed.difference.what) == what
    assert (replayed.distance == 0) == (factor == 1)
    assert check_cost(line, replayed) is None, "nothing is booked for it"


def test_check_results__a_record_of_another_first_adapter__is_named(theirs):
    record = json.loads((theirs / "episodes.jsonl").read_text().splitlines()[0])
    record["env"]["kwargs"]["seed_model"] = 7
    change(theirs / "episodes.jsonl", 0, env=record["env"])
    assert "seed is 0; its record says 7" in next(iter(check_results(*read_bench(theirs)).values()))


@pytest.mark.parametrize(("name", "is_noise"), [("order of the steps", True), ("my agent", False)])
def test_check_results__one_adapter_for_all_seeds__stands_in_an_audits_noise_alone(theirs, name, is_noise):
    place = agent_places(theirs, "loss_low")[1]  # of seed 1
    record = json.loads((theirs / "episodes.jsonl").read_text().splitlines()[place])
    change(theirs / "episodes.jsonl", place, agent=name, env={**record["env"], "kwargs": {"seed_model": 0}})
    change(theirs / "results.jsonl", place, agent=name)
    faults = check_results(*read_bench(theirs))
    assert "seed is 1; its record says 0" in next(iter(faults.values()))
    assert check_results(*read_bench(theirs), of_audit=True) == ({} if is_noise else faults)


def test_is_of_audit__a_folder_of_bench__is_none(theirs):
    assert not is_of_audit(theirs)
    (theirs / "run.json").unlink()
    assert not is_of_audit(theirs)


def test_check_results__no_record_and_a_record_twice__are_named(theirs):
    lines = (theirs / "episodes.jsonl").read_text().splitlines(keepends=True)
    (theirs / "episodes.jsonl").write_text("".join([*lines[1:], lines[1]]))
    assert sorted(fault[:9] for fault in check_results(*read_bench(theirs)).values()) == ["0 records", "2 records"]


def twice(folder, place, **values):
    """Let a line of results stand a second time, before the first, with some values changed."""
    path = folder / "results.jsonl"
    line = json.loads(path.read_text().splitlines()[place])
    path.write_text(json.dumps({**line, **values}) + "\n" + path.read_text())
    return line


@pytest.mark.parametrize("values", [{"tokens": None}, {"error": "it failed"}])
def test_check_results__a_line_that_stands_twice__is_named(theirs, values):
    line = twice(theirs, 3, **values)
    key = line["task"], line["agent"], line["seed"]
    assert check_results(*read_bench(theirs)) == {key: "2 lines; expected one"}


def test_check_results__a_failed_run__needs_no_record(theirs):
    lines = (theirs / "episodes.jsonl").read_text().splitlines(keepends=True)
    (theirs / "episodes.jsonl").write_text("".join(lines[1:]))
    change(theirs / "results.jsonl", 0, error="it failed")
    assert check_results(*read_bench(theirs)) == {}


@pytest.mark.parametrize("is_failed", [False, True])
def test_check_results__a_run_whose_line_is_gone_or_says_that_it_failed__is_named(theirs, is_failed):
    lines = (theirs / "results.jsonl").read_text().splitlines(keepends=True)
    gone = json.loads(lines[3])
    if is_failed:
        change(theirs / "results.jsonl", 3, error="it failed")
    else:
        (theirs / "results.jsonl").write_text("".join([*lines[:3], *lines[4:]]))
    (fault,) = (faults := check_results(*read_bench(theirs))).values()
    assert list(faults) == [(gone["task"], gone["agent"], gone["seed"])]
    assert fault.startswith("no line without an error; expected one, as there is a record (")
    assert "episodes.jsonl, record 4)" in fault
    assert "--resume" in fault


def test_replay_all__final_scores_taken_out_of_line_and_record__are_found(theirs):
    change(theirs / "episodes.jsonl", 3, final={})
    change(theirs / "results.jsonl", 3, test_loss=None, test_accuracy=None)
    lines, recorded = read_bench(theirs)
    assert check_results(lines, recorded) == {}, "line and record agree"
    differences = [replayed.difference for replayed in replay_all(recorded, in_one_thread=True)]
    (found,) = filter(None, differences)
    assert (found.what, found.recorded) == ("test_loss", None)


def test_read_bench__the_projects_own_results__are_read_and_agree():
    folders = sorted(path.parent for path in RESULTS.rglob("episodes.jsonl"))
    assert len(folders) >= 2
    for folder in folders:
        assert check_results(*read_bench(folder)) == {}, folder


@pytest.mark.parametrize("text", ["", "{", "[]", '{"task": "default"}\n'])
def test_read_bench__no_results__are_named(theirs, text):
    (theirs / "results.jsonl").write_text(text or "\x00")
    with pytest.raises(RecordError, match=r"results\.jsonl, line 1"):
        read_bench(theirs)


def test_read_bench__another_folder__is_refused(tmp_path):
    with pytest.raises(RecordError, match=r"results\.jsonl is not there; expected the folder of a benchmark\.$"):
        read_bench(tmp_path)


@pytest.mark.parametrize("names", [["episodes.jsonl"], ["runs", "noise"]], ids=["of train", "of audit"])
def test_read_bench__folder_of_another_command__says_what_can_be_validated_there(names, tmp_path):
    for name in names:
        (tmp_path / name).mkdir()
    listed = " and ".join(str(tmp_path / name) for name in names)
    with pytest.raises(RecordError, match=f"There is {re.escape(listed)}, which `validate` takes by name"):
        read_bench(tmp_path)


@pytest.mark.parametrize("workers", [None, 2])
def test_replay_all__a_benchmarks_records__are_equal_to_the_bit(finished, workers):
    _, recorded = read_bench(finished)
    replayed = list(replay_all(recorded, workers=workers, in_one_thread=True))
    assert {own.recorded.where for own in replayed} == {own.where for own in recorded}
    assert all(own.difference is None and own.distance == 0 for own in replayed)


# The leaderboard


def test_leaderboard__valid_runs__are_ranked_by_their_scores(finished, standard):
    board = leaderboard([finished], ["default"], 2)
    scores = board.summary["normalised"]
    labels = [entrant.label for entrant in board.ranked]
    assert labels == sorted(labels, key=lambda label: -scores[label]["iqm"])
    assert set(labels) == {"random", "oracle", "loss_low", "quality:rating"}
    assert [entrant.num_replayed for entrant in board.ranked] == [2] * 4
    assert board.unranked == []
    assert "| 2 of 2 |" in markdown_board(board)


def test_leaderboard__two_folders__keep_their_runs_apart(finished, theirs, standard):
    board = leaderboard([finished, theirs], ["default"], 2, replays=0)
    assert {"loss_low", "loss_low (theirs)"} <= {entrant.label for entrant in board.ranked}
    assert [entrant.num_replayed for entrant in board.ranked] == [0] * 8


def test_leaderboard__a_tampered_reward__is_found_by_replaying_and_not_ranked(finished, theirs, standard):
    lines = [json.loads(line) for line in (theirs / "episodes.jsonl").read_text().splitlines()]
    place = next(number for number, line in enumerate(lines) if line["agent"] == "loss_low")
    rewards = [lines[place]["rewards"][0] + 0.01, *lines[place]["rewards"][1:]]
    change(theirs / "episodes.jsonl", place, rewards=rewards)
    board = leaderboard([finished, theirs], ["default"], 2)
    assert [entrant.label for entrant in board.unranked] == ["loss_low (theirs)"]
    assert "reward of step 1" in markdown_board(board)


def test_leaderboard__settings_of_its_own__are_not_ranked(finished):
    with pytest.raises(SettingError, match=r"random and|oracle.*settings of its own: .*horizon"):
        leaderboard([finished], ["default"], 2)


def test_leaderboard__settings_of_its_own__make_a_reference(finished, theirs, standard):
    for place, line in enumerate((theirs / "episodes.jsonl").read_text().splitlines()):
        record = json.loads(line)
        if record["agent"] == "loss_low":
            record["env"]["kwargs"]["learning_rate"] = 1e-3
            change(theirs / "episodes.jsonl", place, env=record["env"])
    board = leaderboard([finished, theirs], ["default"], 2, replays=0)
    assert [(own.label, own.settings) for own in board.references] == [("loss_low (theirs)", ["learning_rate"])]
    assert board.unranked == []
    assert "loss_low (theirs)" not in {own.label for own in board.ranked}
    assert "References, not ranked:" in markdown_board(board)
    assert "| loss_low (theirs) | theirs | learning_rate |" in markdown_board(board)


def test_leaderboard__unknown_tasks__all_are_named(finished):
    with pytest.raises(SettingError) as caught:
        leaderboard([finished], ["defualt", "nosuch"], 2)
    assert "unknown task 'defualt': did you mean 'default'" in str(caught.value)
    assert "unknown task 'nosuch'" in str(caught.value)


def costs_of(line, **final):
    """Return the costs of a line, but for those of its final run."""
    return {name: {**line[name], "final": value} for name, value in final.items()}


def without_cost(line):
    return {
        "phi": 0.0,
        **{name: dict.fromkeys(line[name], 0) for name in ("phi_parts", "tokens", "seconds")},
    }


CLAIMS = {
    "nothing at all": (without_cost, "tokens of the final run are 0; making its steps again took"),
    "nothing at all, without tokens": (
        lambda line: {**without_cost(line), "tokens": None},
        "tokens of the final run are 0; making its steps again took",
    ),
    "another Phi": (lambda line: {"phi": 0.0, **costs_of(line, phi_parts=0.0)}, "phi of final is 0.0; its tokens make"),
    "another part": (
        lambda line: {"tokens": {**line["tokens"], "luck": 0}},
        "tokens has the part 'luck'; expected features, preparation, learning, final",
    ),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_leaderboard__cost_that_the_record_disproves__is_named_and_not_ranked(finished, theirs, standard, claim):
    cost_of, words = CLAIMS[claim]
    place = agent_places(theirs, "quality:rating")[0]
    line = json.loads((theirs / "results.jsonl").read_text().splitlines()[place])
    change(theirs / "results.jsonl", place, **cost_of(line))
    board = leaderboard([finished, theirs], ["default"], 2)
    (entrant,) = board.unranked
    assert entrant.label == "quality:rating (theirs)"
    assert words in entrant.faults[0]


def test_check_cost__agents_that_take_more_than_their_steps__stand(finished):
    lines, recorded = read_bench(finished)
    lines_of, taken = by_record(lines, recorded), {}
    for replayed in replay_all(recorded, in_one_thread=True):
        line = lines_of[replayed.recorded.where]
        assert check_cost(line, replayed) is None
        taken.setdefault(line["agent"], set()).add(line["tokens"]["final"] - replayed.tokens)
    assert taken.pop("loss_low") != {0}, "it looks at all that is offered"
    assert set(map(frozenset, taken.values())) == {frozenset({0})}


def test_leaderboard__an_agent_under_another_name__is_named(finished, theirs, standard):
    for name in ("results.jsonl", "episodes.jsonl"):
        path = theirs / name
        path.write_text(path.read_text().replace('"agent": "oracle"', '"agent": "genius"'))
    board = leaderboard([finished, theirs], ["default"], 2, replays=0)
    assert "genius" in {entrant.label for entrant in board.ranked}
    assert board.notes == ["oracle and genius took the same rows at each step in 2 of 2 runs."]
    assert board.notes[0] in markdown_board(board)


def test_leaderboard__the_same_agents_in_two_folders__are_no_copies(finished, theirs, standard):
    assert leaderboard([finished, theirs], ["default"], 2, replays=0).notes == []


def test_leaderboard__runs_missing_or_failed__are_not_ranked(finished, theirs, standard):
    lines = (theirs / "results.jsonl").read_text().splitlines(keepends=True)
    places = [number for number, line in enumerate(lines) if json.loads(line)["agent"] == "loss_low"]
    (theirs / "results.jsonl").write_text("".join(line for n, line in enumerate(lines) if n != places[0]))
    change(theirs / "results.jsonl", 0, error="it failed")
    board = leaderboard([finished, theirs], ["default"], 2, replays=0)
    reasons = {entrant.label: entrant.faults for entrant in board.unranked}
    assert reasons["loss_low (theirs)"] == ["1 of 2 runs are missing"]
    assert any("failed" in faults[0] for faults in reasons.values())


def agent_places(folder, agent):
    lines = (folder / "results.jsonl").read_text().splitlines()
    return [number for number, line in enumerate(lines) if json.loads(line)["agent"] == agent]


@pytest.mark.parametrize("count", [1, 2])
def test_leaderboard__runs_that_diverged__are_missing_runs(finished, theirs, standard, monkeypatch, count):
    monkeypatch.setattr("raise_env.agents.leaderboard.check_results", lambda *_: {})  # let record and line agree
    for place in agent_places(theirs, "loss_low")[:count]:
        change(theirs / "results.jsonl", place, diverged=True, test_loss=None, dev_loss=None)
    board = leaderboard([finished, theirs], ["default"], 2, replays=0)
    (entrant,) = board.unranked
    assert entrant.label == "loss_low (theirs)"
    told = "runs that failed or diverged, or without a finite test loss"
    assert entrant.faults == [told, f"{count} of 2 runs are missing"]


def test_leaderboard__a_run_that_stands_twice__is_named_once(finished, theirs, standard):
    twice(theirs, agent_places(theirs, "loss_low")[0])
    (entrant,) = leaderboard([finished, theirs], ["default"], 2, replays=0).unranked
    assert (entrant.label, entrant.faults) == ("loss_low (theirs)", ["default, seed 0: 2 lines; expected one"])


def test_leaderboard__folders_of_one_name__have_labels_of_their_own(finished, tmp_path, standard):
    others = [shutil.copytree(finished, tmp_path / name / "ours") for name in ("a", "b")]
    labels = [entrant.label for entrant in leaderboard([finished, *others], ["default"], 2, replays=0).ranked]
    assert {"loss_low", "loss_low (ours)", "loss_low (ours 2)"} < set(labels)
    assert len(set(labels)) == 12


def test_leaderboard__a_folder_twice__is_refused(finished, standard):
    with pytest.raises(SettingError, match="named twice"):
        leaderboard([finished, finished / "."], ["default"], 2, replays=0)


def test_leaderboard__marks__are_of_the_first_folder_that_has_them_whole(finished, theirs, standard):
    change(theirs / "results.jsonl", agent_places(theirs, "random")[0], error="it failed")
    board = leaderboard([theirs, finished], ["default"], 2, replays=0)
    (mark,) = [entrant for entrant in board.ranked if entrant.label == "random"]
    assert mark.folder == finished
    assert [(entrant.label, entrant.folder) for entrant in board.unranked] == [("random (ours)", theirs)]


def test_leaderboard__no_oracle__is_an_error(theirs, standard):
    lines = (theirs / "results.jsonl").read_text().splitlines(keepends=True)
    (theirs / "results.jsonl").write_text("".join(line for line in lines if '"oracle"' not in line))
    with pytest.raises(SettingError, match="oracle"):
        leaderboard([theirs], ["default"], 2, replays=0)


def test_leaderboard__oracle_not_clearly_ahead__is_an_error(finished, standard, monkeypatch):
    monkeypatch.setattr("raise_env.agents.summary.CLEAR_WAY", 0.0)
    with pytest.raises(SettingError, match="no scale to rank by"):
        leaderboard([finished], ["default"], 2, replays=0)
