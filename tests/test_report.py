from __future__ import annotations

import base64
import hashlib
import html
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from raise_env.agents import report
from raise_env.agents.contrast import Trait, Word
from raise_env.agents.plots import dev_curves_plot
from raise_env.agents.report import Selection, format_table, results_table, write_report
from raise_env.errors import OutputError

# Mean 2, standard deviation 1, Student's t with two degrees of freedom 4.3027: half width 4.3027 / sqrt(3).
ONE_TWO_THREE = [1.0, 2.0, 3.0]
HALF_WIDTH = 2.48414


def make_report(**changes):
    report = {
        "schema_version": 1,
        "base": {"dev_loss": 4.0, "test_loss": 4.5, "test_accuracy": 0.01},
        "agents": {
            "oracle": {"dev_loss": [0.5], "test_loss": [0.25], "test_accuracy": [0.9]},
            "random": {"dev_loss": ONE_TWO_THREE, "test_loss": ONE_TWO_THREE, "test_accuracy": [0.1, 0.2, 0.3]},
            "raise_fork": {"dev_loss": [0.9, 1.1], "test_loss": [0.8, 1.0], "test_accuracy": [0.5, 0.7]},
        },
        "cost": {
            "phi": {"features": 0.33333, "learning": 1.5, "final": 0.02, "total": 1.85333},
            "tokens": {"features": 1234567, "total": 2345678},
            "seconds": {"features": 12.34, "learning": 3723.0},
        },
        "settings": {"agent": "raise_fork", "horizon": 2, "reward": "loss", "lora": {"r": 8, "lora_alpha": 16}},
        "headline": "The selector was better.",
        "learning": {"episode_returns": [1.0, 2.0, 3.0], "greedy_dev_scores": [-2.0, -1.5, -1.0]},
        "curves": {"random": [[-4.0, -3.0, -2.0]], "raise_fork": [[-4.0, -2.0, -1.0]]},
        "machine": {"python": "3.11"},
        "date": "1 May 2026",
    }
    return {**report, **changes}


def make_selection(texts=(), **changes):
    values = {
        "steps": np.array([1, 1, 2, 2]),
        "classes": np.array([0, 1, 1, 1]),
        "pool_ids": np.array([5, 7, 7, 9]),
        "num_classes": 2,
        "pool_class_counts": np.array([20, 20]),
        "texts": texts,
        "labels": {"corruption": ["clean", "clean", "clean", "wrong"]},
        "pool_label_counts": {"corruption": {"clean": 16, "wrong": 24}},
    }
    return Selection(**{**values, **changes})


EPISODE = {
    "agent": "random",
    "seed": 3,
    "actions": [[1, 2], [3]],
    "rewards": [0.5, 0.25],
    "dev_scores": [-4.0, -3.5, -3.25],
    "test_score": None,
}


def page_of(folder, report=None, episodes=(EPISODE,), selection=None):
    write_report(folder, report or make_report(), episodes, selection or make_selection())
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished report, for the tests that only read it."""
    folder = tmp_path_factory.mktemp("report")
    page_of(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def row_of(page, name):
    """The text of each cell of a table row, in order, by the row's first cell."""
    for row in re.findall(r"<tr.*?</tr>", page, flags=re.DOTALL):
        cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.DOTALL)
        texts = [" ".join(html.unescape(re.sub(r"<[^>]*>", " ", cell)).split()) for cell in cells]
        if texts and texts[0] == name:
            return texts
    raise AssertionError(f"no row {name}")


# --- Text -----------------------------------------------------------------------------------------------------


def test_format_table__words_and_numbers__are_aligned():
    assert format_table([["random", 12, 0.5], ["a", 3, 1.23456]], ["agent", "rows", "loss"]).split("\n") == [
        "agent   rows   loss",
        "------  ----  -----",
        "random    12    0.5",
        "a          3  1.235",
    ]


def test_format_table__no_rows__shows_the_header():
    assert format_table([], ["agent", "loss"]) == "agent  loss\n-----  ----"


def test_format_table__row_of_another_length__is_refused():
    with pytest.raises(ValueError, match="zip"):
        format_table([["a"]], ["agent", "loss"])


def test_results_table__report__lists_base_random_learned_then_others():
    rows, header = results_table(make_report())
    assert header == ["agent", "seeds", "dev loss", "test loss", "test accuracy"]
    assert [row[0] for row in rows] == ["base model", "random", "raise_fork", "oracle"]
    assert rows[0] == ["base model", "", "4.000", "4.500", "1.0%"]
    assert rows[1] == ["random", "3", "2.000 ± 2.484", "2.000 ± 2.484", "20.0% ± 24.8"]
    assert rows[3] == ["oracle", "1", "0.500", "0.250", "90.0%"]


# --- Page -----------------------------------------------------------------------------------------------------


def test_write_report__three_seeds__page_shows_the_hand_worked_interval(page):
    assert row_of(page, "random")[:5] == ["random", "2.000 ± 2.484", "2.000 ± 2.484", "20.0% ± 24.8", "3"]
    assert row_of(page, "base model")[:4] == ["base model", "4.000", "4.500", "1.0%"]


@pytest.mark.parametrize("settings", [{"agent": "selector:run/selector"}, {}], ids=["named", "not named"])
def test_write_report__selector_learned_before__is_known_in_tiles_table_and_curves(tmp_path, monkeypatch, settings):
    drawn = []

    def noted(curves, learned, *arguments):
        drawn.append(learned)
        return dev_curves_plot(curves, learned, *arguments)

    monkeypatch.setattr(report, "dev_curves_plot", noted)
    agents = {"oracle": {"test_loss": [0.25]}, "random": {"test_loss": [2.0]}, "selector": {"test_loss": [0.8]}}
    curves = {"random": [[-4.0, -3.0]], "selector": [[-4.0, -2.0]]}
    own = make_report(agents=agents, curves=curves, settings={**settings, "horizon": 1})
    found = page_of(tmp_path, own)
    assert [row[0] for row in results_table(own)[0]] == ["base model", "random", "selector", "oracle"]
    assert drawn == ["selector"]
    assert len(re.findall(r'<tr class="learned".*?</span>selector</th>', found)) == 1
    assert "random 2.000, base model 4.500" in found


def test_write_report__one_seed__stands_alone_and_says_so(page):
    assert row_of(page, "oracle")[:5] == ["oracle", "0.500", "0.250", "90.0%", "one seed"]


def test_write_report__diverged_run__is_said(tmp_path):
    page = page_of(tmp_path, make_report(agents={"random": {"test_loss": [*ONE_TWO_THREE, None]}}))
    assert row_of(page, "random")[2:5] == ["2.000 ± 2.484 1 diverged, left out", "–", "4"]  # noqa: RUF001


def test_write_report__cost__is_written_for_people(page):
    assert row_of(page, "features") == ["features", "0.333", "1,234,567", "12.3 s"]
    assert row_of(page, "learning") == ["learning", "1.5", "", "1 h 2 min"]
    assert row_of(page, "total") == ["total", "1.85", "2,345,678", ""]
    assert "a token forward is 1, forward and backward is 3" in page


def test_write_report__selection__shares_stand_beside_the_pool(page):
    assert row_of(page, "class 0")[2:] == ["25%", "50%"]
    assert row_of(page, "class 1")[2:] == ["75%", "50%"]
    assert row_of(page, "clean")[2:] == ["75%", "40%"]
    assert row_of(page, "wrong")[2:] == ["25%", "60%"]
    assert "trained on 4 rows, 3 of them different" in page


def test_write_report__selected_rows__first_two_hundred_are_shown(tmp_path):
    texts = [(1 + index // 2, 1, f"prompt {index}.", "answer") for index in range(300)]
    page = page_of(tmp_path, selection=make_selection(texts))
    assert "prompt 199." in page
    assert "prompt 200." not in page


def test_write_report__long_row__is_folded_and_cut(tmp_path):
    page = page_of(tmp_path, selection=make_selection([(1, 0, "word " * 2000, "answer")]))
    assert "<details><summary>word word" in page
    assert "6,000 more characters" in page
    assert page.count("word ") < 1000


def test_write_report__episodes__are_listed(page):
    listed = re.search(r"1 episode on record.*?</table>", page, flags=re.DOTALL)
    assert row_of(listed[0], "random") == ["random", "3", "2", "3", "0.750", "-3.250", "–"]  # noqa: RUF001


def test_write_report__no_curves__are_taken_from_the_episodes(tmp_path):
    report = make_report()
    del report["curves"]
    write_report(tmp_path / "with", report, [EPISODE])
    write_report(tmp_path / "without", report)
    assert (tmp_path / "with/plots/dev_curves.png").exists()
    assert not (tmp_path / "without/plots/dev_curves.png").exists()


def test_write_report__results_alone__leaves_other_sections_out(tmp_path):
    write_report(tmp_path, {"base": {"test_loss": 1.0}, "agents": {"random": {"test_loss": [0.5]}}})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Results"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


# --- Safety ---------------------------------------------------------------------------------------------------

EVIL = "<script>alert('x')</script><img src=http://evil.example/x>\" onload=\"'"


def evil_page(folder):
    report = make_report(headline=EVIL, date=EVIL, machine={EVIL: EVIL}, settings={EVIL: EVIL, "horizon": 2})
    report["agents"][EVIL] = report["agents"]["random"]
    report["curves"][EVIL] = report["curves"]["random"]
    report["cost"]["phi"][EVIL] = 1.0
    labels = {"labels": {EVIL: [EVIL] * 4}, "pool_label_counts": {EVIL: {EVIL: 3}}}
    selection = make_selection([(1, 0, EVIL, EVIL), (1, 0, EVIL * 10, EVIL * 10)], **labels)
    return page_of(folder, report, [{**EPISODE, "agent": EVIL}], selection)


class Tags(HTMLParser):
    """What a browser would take for elements, and for their attributes."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.attributes = [], set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes.update(name for name, _ in attrs)


def test_write_report__markup_in_any_text__is_escaped(tmp_path):
    page = evil_page(tmp_path)
    tags = Tags(page)
    assert "img" not in tags.elements
    assert tags.elements.count("script") == 1
    assert "onload" not in tags.attributes
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") > 10


def test_write_report__page__allows_its_own_script_only(tmp_path):
    page = evil_page(tmp_path)
    script = re.search(r"<script>(.*?)</script>", page, flags=re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_write_report__page__refers_to_nothing_outside(page):
    assert "://" not in page
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"(?:src|href)=[\"']?([^\"' >]*)", page))
    assert all(target.startswith("#") for target in re.findall(r"url\([\"']?([^)]*)\)", page))
    anchors = {target[1:] for target in re.findall(r'<a href="([^"]*)"', page)}
    assert len(anchors) == 6
    assert anchors <= set(re.findall(r'id="([^"]*)"', page))


def test_write_report__twice__gives_the_same_bytes(folder, page, tmp_path):
    assert page_of(tmp_path) == page
    for name in ("dev_curves", "learning", "selection"):
        assert (tmp_path / f"plots/{name}.png").read_bytes() == (folder / f"plots/{name}.png").read_bytes()


def test_write_report__finished__leaves_no_temporary_file(folder):
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["plots/dev_curves.png", "plots/learning.png", "plots/selection.png", "report.html"]


def test_write_report__interrupted__leaves_the_old_page_whole(tmp_path, monkeypatch):
    old = page_of(tmp_path)

    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        page_of(tmp_path, make_report(headline="new"))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == old
    assert not list(tmp_path.rglob(".*"))


def test_write_report__file_where_the_folder_should_be__is_said(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="taken"):
        page_of(tmp_path / "taken")


# What the selection is like


def contrasted(**changes):
    attack = "<script>alert(1)</script>"
    return make_selection(
        texts=[(1, 0, "ask", "answer")],
        scores=[1.25],
        traits=[Trait("response length", "tokens", 4.0, 8.0, -0.5)],
        words=([Word(attack, 0.5, 0.1)], [Word("seldom", 0.0, 0.2)]),
        wanted=([(2.0, 0, "best prompt", "best")], [(-3.0, 1, attack, "worst")]),
        **changes,
    )


def test_write_report__what_sets_rows_apart__is_told_and_escaped(tmp_path):
    write_report(tmp_path, make_report(), [], contrasted())
    page = (tmp_path / "report.html").read_text()
    for text in (
        "What sets them apart",
        "-0.50 sd",
        "seldom",
        "What the selector wants",
        "best prompt",
        "-3.0",
        "+1.2",
    ):
        assert text in page
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 2


def test_write_report__agent_without_scores__no_column_and_no_section_for_them(tmp_path):
    write_report(tmp_path, make_report(), [], make_selection(texts=[(1, 0, "ask", "answer")]))
    page = (tmp_path / "report.html").read_text()
    assert "What the selector wants" not in page
    assert ">Score<" not in page


@pytest.mark.parametrize(("hidden", "title"), [(True, "By hidden label: corruption"), (False, "By column: corruption")])
def test_write_report__labels__named_for_what_they_are(tmp_path, hidden, title):
    write_report(tmp_path, make_report(), [], make_selection(are_labels_hidden=hidden))
    page = (tmp_path / "report.html").read_text()
    assert title in page
    assert ("The selector never sees them" in page) == hidden
