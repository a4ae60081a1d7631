import json

import pytest

from raise_env.agents.split import split_rows, write_split
from raise_env.errors import OutputError, SettingError
from raise_env.pool import Instruction, Pool
from raise_env.reading import read_pool


def rows(*texts):
    return Pool([Instruction(text, "a", fields={"q": text, "a": "a"}) for text in texts], "rows.jsonl")


def test_split_rows__every_row__is_in_one_part():
    parts = split_rows(rows(*map(str, range(100))), {"dev": 10, "test": 20}, seed=0)
    assert {name: len(part) for name, part in parts.items()} == {"pool": 70, "dev": 10, "test": 20}
    assert sorted(place for part in parts.values() for place in part) == list(range(100))
    assert all(part == sorted(part) for part in parts.values())


def test_split_rows__copies__stay_together():
    pool = rows(*(str(number % 30) for number in range(90)))
    for seed in range(5):
        parts = split_rows(pool, {"dev": 7, "test": 10}, seed)
        texts = [{pool[place].prompt for place in part} for part in parts.values()]
        assert not texts[0] & texts[1]
        assert not texts[1] & texts[2]
        assert not texts[0] & texts[2]
        assert len(parts["dev"]) == 9  # three texts of three copies: seven rows and what belongs to them


def test_split_rows__seed__decides():
    pool = rows(*map(str, range(50)))
    assert split_rows(pool, {"dev": 5}, 1) == split_rows(pool, {"dev": 5}, 1)
    assert split_rows(pool, {"dev": 5}, 1) != split_rows(pool, {"dev": 5}, 2)


def test_split_rows__nothing_left__says_how_many_there_are():
    with pytest.raises(SettingError, match=r"rows\.jsonl has 10 rows, and 10 were asked for"):
        split_rows(rows(*map(str, range(10))), {"dev": 5, "test": 5}, seed=0)


def test_write_split__files__hold_the_rows_as_they_were(tmp_path):
    source = tmp_path / "rows.jsonl"
    lines = [{"instruction": f"q{n}", "output": "ä", "more": [n]} for n in range(20)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = write_split(read_pool(source), {"dev": 4, "test": 5}, 0, tmp_path / "out")
    assert {name: count for name, (_, count) in written.items()} == {"pool": 11, "dev": 4, "test": 5}
    again = [json.loads(line) for path, _ in written.values() for line in path.read_text().splitlines()]
    assert sorted(again, key=str) == sorted(lines, key=str)


def test_write_split__file_that_is_there__is_not_written_over(tmp_path):
    (tmp_path / "dev.jsonl").write_text("mine")
    with pytest.raises(OutputError, match="is there already"):
        write_split(rows("a", "b", "c"), {"dev": 1}, 0, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["dev.jsonl"]
