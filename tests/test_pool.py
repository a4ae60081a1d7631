from __future__ import annotations

import errno
import hashlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import jsonl, write_rows

from raise_env.errors import DataError, OutputError, SettingError
from raise_env.pool import (
    Instruction,
    Pool,
    SpilledRows,
    check_disjoint,
    check_enough,
    draw_candidates,
    kmeans_centres,
    kmeans_classes,
    nearest_centres,
    sample_rows,
)
from raise_env.reading import read_pool

ROWS = [
    {"question": "2 + 2?", "answer": "4", "rating": "5"},
    {"question": "Größe, auf\nzwei Zeilen?", "answer": 'ein "Meter"', "rating": "3"},
]

Write = Callable[[str, "str | bytes"], Path]


def pool_of(*prompts: str, source: str = "pool.jsonl", **kwargs: Any) -> Pool:
    return Pool([Instruction(prompt, "an answer") for prompt in prompts], source, **kwargs)


def fault(path: Path, **kwargs: Any) -> str:
    """Return what the reader says about a bad file; every message begins with the file's own name."""
    with pytest.raises(DataError) as caught:
        read_pool(path, **kwargs)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


# Instruction and Pool


def test_content_hash__of_an_instruction__prompt_nul_response() -> None:
    row = Instruction("größer", "ja")
    assert row.content_hash == hashlib.sha256("größer\x00ja".encode()).hexdigest()
    assert row.content_hash == Instruction("größer", "ja", ("ja", "nein"), {"x": 1}).content_hash
    assert row.content_hash != Instruction("größerj", "a").content_hash


def test_content_hash__of_a_conversation__depends_on_all_that_is_said() -> None:
    rows = [
        Instruction("c", "d"),
        Instruction("c", "d", system="s"),
        Instruction("c", "d", earlier=(("a", "b"),)),
        Instruction("c", "d", earlier=(("a", "b"), ("a", "b"))),
        Instruction("c", "d", earlier=(("a", "b"),), system="s"),
        Instruction("a", "b", earlier=(("c", "d"),)),
    ]
    assert len({row.content_hash for row in rows}) == len({row.short_hash for row in rows}) == len(rows)
    assert len({Pool([row], "here").content_hash for row in rows}) == len(rows)


def test_content_hash__of_a_pool__depends_on_texts_choices_and_order_only() -> None:
    first, second = Instruction("a", "b"), Instruction("c", "d")
    same = Pool([Instruction("a", "b", fields={"rating": 5}), second], "elsewhere", num_skipped=3)
    assert Pool([first, second], "here").content_hash == same.content_hash
    others = [[second, first], [first], [first, Instruction("cd", "")], [first, Instruction("c", "d", ("d", "e"))], []]
    hashes = {Pool(rows, "here").content_hash for rows in [[first, second], *others]}
    assert len(hashes) == 1 + len(others)


def test_content_hash__of_a_pool__knows_which_of_two_choices_that_read_alike_is_right() -> None:
    first = Instruction("a", "b", ("b", "c", "b"))
    third = Instruction("a", "b", ("b", "c", "b"), right=2)
    assert (first.right_choice, third.right_choice, Instruction("a", "b").right_choice) == (0, 2, -1)
    assert Pool([first], "here").content_hash != Pool([third], "here").content_hash
    assert first.content_hash == third.content_hash, "the same is said"
    # As it always was where nothing but texts has to be told: caches and records know pools by it.
    known = hashlib.sha256(b'["a", "b", ["b", "c", "b"]]["a", "b", [], "s", [["c", "d"]]]').hexdigest()
    conversation = Instruction("a", "b", (), {}, "s", (("c", "d"),))
    assert Pool([first, conversation], "here").content_hash == known


def test_spilled_rows__any_rows__come_back_as_they_were() -> None:
    choices = ("b", "c", "b")
    rows = [
        Instruction("a", "b"),
        Instruction("a", "b", choices, {"x": 1}),
        Instruction("a", "b", choices, right=2),
        Instruction("a", "b", choices, {}, "s", (("c", "d"),)),
        Instruction("a", "b", choices, {}, "s", (("c", "d"),), 2),
    ]
    spilled = SpilledRows(rows)
    assert list(spilled) == rows
    assert [row.right for row in spilled] == [None, None, 2, None, 2]
    assert spilled.content_hash == Pool(rows, "here").content_hash


def test_instruction__with_fields__is_hashable_and_immutable() -> None:
    row = Instruction("a", "b", fields={"rating": [5]})
    assert {row: 1}[Instruction("a", "b", fields={"rating": [5]})] == 1
    with pytest.raises(AttributeError):
        row.prompt = "c"  # type: ignore[misc]


def test_pool__as_a_sequence__length_index_slice_iteration() -> None:
    pool = pool_of("a", "b", "c")
    assert len(pool) == 3
    assert pool[-1].prompt == "c"
    assert [row.prompt for row in pool] == ["a", "b", "c"]
    assert pool[1:] == pool.instructions[1:]
    assert pool.place(0) == "row 1"
    assert pool[1] in pool
    with pytest.raises(IndexError):
        pool[3]


def test_pool__pickled__is_the_same() -> None:
    # Environments in other processes get their pool so.
    pool = pool_of("a", "b", numbers=[3, 9], unit="line")
    copy = pickle.loads(pickle.dumps(pool))
    assert copy.instructions == pool.instructions
    assert (copy.content_hash, copy.place(1)) == (pool.content_hash, "line 9")


def test_pool__imported__loads_nothing_heavy() -> None:
    code = "import sys, raise_env.pool; print({'torch', 'sklearn', 'pyarrow', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Large pools


@pytest.fixture
def few_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pools of more than three rows be large."""
    monkeypatch.setattr("raise_env.pool.MAX_ROWS_IN_MEMORY", 3)


MANY = [
    {"question": f"Größe {i}?\n\u2028", "answer": f'"{i}"\x00', "choices": [f'"{i}"\x00', "b"], "more": [i, None]}
    for i in range(2500)
]


def both_forms(path: Path, monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> tuple[Pool, Pool]:
    """Read a file as a small pool and as a large one."""
    small = read_pool(path, **kwargs)
    monkeypatch.setattr("raise_env.pool.MAX_ROWS_IN_MEMORY", 3)
    large = read_pool(path, **kwargs)
    assert (small.is_large, large.is_large) == (False, True)
    return small, large


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_read_pool__large__is_equal_to_one_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    small, large = both_forms(write_rows(tmp_path / f"a{ending}", MANY), monkeypatch)
    assert tuple(large) == tuple(small)
    assert [row.fields for row in large] == [row.fields for row in small]
    assert (len(large), large.content_hash, large.unit) == (2500, small.content_hash, small.unit)
    for index in (0, 1, 1023, 1024, 2499, -1, -2500):
        assert large[index] == small[index]
        assert large.place(index) == small.place(index)
    for part in (slice(None), slice(1000, 2100), slice(-3, None), slice(9, 3), slice(20, 3, -5), slice(0, 2500, 700)):
        assert large[part] == small[part]
    for index in (2500, -2501):
        with pytest.raises(IndexError):
            large[index]
    assert repr(large) == repr(small)


def test_read_pool__large_with_blank_rows__counts_and_places_are_the_same(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "question,answer\n" + "".join(f"q{i},{'' if i % 3 == 0 else i}\n" for i in range(12))
    small, large = both_forms(write("a.csv", text), monkeypatch, skip_empty=True)
    assert tuple(large) == tuple(small)
    assert large.num_skipped == small.num_skipped == 4
    assert [large.place(i) for i in range(8)] == [small.place(i) for i in range(8)]
    assert "4 rows have an empty 'answer'" in fault(write("a.csv", text))


@pytest.mark.usefixtures("few_fit")
def test_read_pool__fault_beyond_what_fits__named_as_ever(write: Write) -> None:
    rows = [{"question": f"q{i}", "answer": "a"} for i in range(8)]
    assert ", line 9, field 'answer': found 3;" in fault(write("a.jsonl", jsonl(*rows, {"question": "q", "answer": 3})))


def test_pool__from_a_generator__either_side_of_the_limit(few_fit: None) -> None:
    for count in (0, 3, 4):
        pool = Pool((Instruction(str(i), "a") for i in range(count)), "made")
        assert [row.prompt for row in pool] == [str(i) for i in range(count)]
        assert pool.is_large == (count > 3)
        assert pool.content_hash == Pool(tuple(pool), "again").content_hash


def test_splits__of_a_large_pool__are_those_of_one_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = both_forms(write_rows(tmp_path / "a.jsonl", MANY), monkeypatch)
    parts = [sample_rows(pool, 20, seed=1) for pool in (small, large)]
    assert tuple(parts[0]) == tuple(parts[1])
    assert [parts[0].place(i) for i in range(20)] == [parts[1].place(i) for i in range(20)]
    messages = []
    for pool in (small, large):
        with pytest.raises(DataError) as caught:
            check_disjoint(pool, parts[0], parts[1])
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].count("20 rows of the") == 3


@pytest.mark.usefixtures("few_fit")
def test_spilled_rows__pickled_and_read_by_threads_and_a_fork__are_the_same() -> None:
    pool = Pool((Instruction(f"q{i}", "a" * (i % 7), fields={"i": i}) for i in range(3000)), "made")
    copy = pickle.loads(pickle.dumps(pool))
    assert tuple(copy) == tuple(pool)
    assert (copy.content_hash, copy.place(1)) == (pool.content_hash, "row 2")
    indices = np.random.default_rng(0).integers(0, 3000, 2000).tolist()
    with ThreadPoolExecutor(4) as threads:
        assert [row.prompt for row in threads.map(pool.__getitem__, indices)] == [f"q{i}" for i in indices]
    iterator = iter(pool)
    next(iterator)
    code = os.fork()
    if code == 0:  # the child reads while the parent is in the middle of it
        os._exit(0 if [row.fields["i"] for row in pool] == list(range(3000)) else 1)
    assert [row.prompt for row in iterator] == [f"q{i}" for i in range(1, 3000)]
    assert os.waitpid(code, 0)[1] == 0


def test_spilled_rows__folder__holds_nothing_that_has_a_name(tmp_path: Path) -> None:
    rows = SpilledRows((Instruction(str(i), "a") for i in range(9)), tmp_path / "new")
    assert rows[8].prompt == "8"
    assert list((tmp_path / "new").iterdir()) == []
    assert os.fstat(rows._file.fileno()).st_dev == tmp_path.stat().st_dev


def test_spilled_rows__folder_that_cannot_be_written__goes_where_temporary_files_go(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert len(SpilledRows([Instruction("q", "a")], tmp_path / "file")) == 1


@pytest.mark.usefixtures("few_fit")
def test_spilled_rows__disk_full__says_what_to_do(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tempfile.TemporaryFile

    class Full:
        def __init__(self, **kwargs: Any) -> None:
            self.file = made(**kwargs)

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            self.file.close()

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    path = write("a.jsonl", jsonl(*MANY[:5]))
    with pytest.raises(
        OutputError, match=r"cannot be written in .*No space left on device.*--cache-dir.*RAISE_ENV_CACHE"
    ):
        read_pool(path, folder=tmp_path / "cache")


# Splits


def test_sample_rows__part_of_a_pool__distinct_rows_in_file_order_with_their_numbers() -> None:
    pool = pool_of(*map(str, range(100)), unit="line", num_skipped=4)
    part = sample_rows(pool, 20, seed=1)
    prompts = [int(row.prompt) for row in part]
    assert len(set(prompts)) == 20
    assert prompts == sorted(prompts)
    assert [part.place(index) for index in range(20)] == [f"line {prompt + 1}" for prompt in prompts]
    assert (part.source, part.num_skipped) == (pool.source, 4)


def test_sample_rows__seed__decides() -> None:
    pool = pool_of(*map(str, range(100)))
    np.random.seed(0)  # noqa: NPY002  the global generator must have no say
    first = sample_rows(pool, 20, seed=1)
    assert first.content_hash == sample_rows(pool, 20, seed=1).content_hash
    assert first.content_hash != sample_rows(pool, 20, seed=2).content_hash
    assert sample_rows(pool, 100, seed=1).content_hash == pool.content_hash


@pytest.mark.parametrize("count", [0, -1, 3])
def test_sample_rows__count_out_of_range__names_the_range(count: int) -> None:
    with pytest.raises(SettingError, match=rf"{count} rows .* of pool\.jsonl, which has 2; .* from 1 to 2"):
        sample_rows(pool_of("a", "b"), count, seed=0)


def test_check_disjoint__distinct_rows__passes() -> None:
    check_disjoint(pool_of("a", "b"), pool_of("c"), None)
    # The same question with another answer is another instruction.
    check_disjoint(pool_of("a"), Pool([Instruction("a", "other")], "dev"), pool_of("b"))


def test_check_disjoint__shared_rows__five_named_all_counted() -> None:
    pool = pool_of(*(f"question {index}" for index in range(20)))
    shared = [f"question {index}" for index in (7, 3, 9, 11, 2, 5)]
    dev = pool_of("new", *shared, source="dev.csv", unit="line", numbers=range(2, 9))
    with pytest.raises(DataError) as caught:
        check_disjoint(pool, dev, None)
    lines = str(caught.value).splitlines()
    assert lines[0] == "6 rows of the dev set (dev.csv) are also in the pool (pool.jsonl):"
    assert lines[1] == "  line 3, there row 8: question 7"
    assert [line.split(": ")[1] for line in lines[1:6]] == shared[:5]
    assert lines[6] == "  and 1 more"
    assert lines[7] == "Remove them from one of the two, or pass allow_overlap=True (--allow-overlap)."
    assert len(lines) == 8


@pytest.mark.parametrize(
    ("pool", "dev", "test", "pairs"),
    [
        ("a", "a", "b", ["dev set (dev) is also in the pool"]),
        ("a", "b", "a", ["test set (test) is also in the pool"]),
        ("a", "b", "b", ["test set (test) is also in the dev set"]),
        ("a", "a", "a", ["dev set (dev) is also in the pool", "test set (test) is also in the pool", "in the dev set"]),
    ],
)
def test_check_disjoint__each_two_splits__are_compared(pool: str, dev: str, test: str, pairs: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        check_disjoint(pool_of(pool), pool_of(dev, source="dev"), pool_of(test, source="test"))
    paragraphs = [line for line in str(caught.value).splitlines() if line.startswith("1 row")]
    assert len(paragraphs) == len(pairs)
    assert all(expected in found for expected, found in zip(pairs, paragraphs, strict=True))


def test_check_disjoint__row_that_the_pool_has_twice__first_is_named() -> None:
    with pytest.raises(DataError, match=r"^1 row of .*\n  row 1, there row 2: b\n"):
        check_disjoint(pool_of("a", "b", "b"), pool_of("b"), None)


def test_check_disjoint__long_prompt__shown_on_one_line_and_cut_at_60() -> None:
    pool = pool_of("first line\n" + "x" * 100, "one\n two")
    with pytest.raises(DataError, match=rf"there row 1: first line {'x' * 49}\.\.\.\n.* there row 2: one two\n"):
        check_disjoint(pool, pool, None)


# Classes


def blobs(num_rows: int = 200, num_blobs: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Return points around far-apart centres, in mixed order, and the centre of each."""
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.arange(num_rows) % num_blobs)
    return rng.normal(size=(num_rows, 8)) + 100.0 * np.eye(num_blobs, 8)[truth], truth


def test_kmeans_classes__separate_blobs__one_class_each() -> None:
    features, truth = blobs()
    classes = kmeans_classes(features, 4, seed=0)
    assert classes.dtype == np.int64
    assert classes.shape == (200,)
    assert len(set(zip(truth.tolist(), classes.tolist(), strict=True))) == 4
    assert set(classes.tolist()) == {0, 1, 2, 3}


def test_kmeans_classes__same_seed__same_classes_and_global_generator_untouched() -> None:
    features = np.random.default_rng(1).normal(size=(500, 8))
    state = np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    first = kmeans_classes(features, 4, seed=0)
    assert np.array_equal(first, kmeans_classes(features, 4, seed=0))
    assert np.array_equal(first, kmeans_classes(features.astype(np.float32), 4, seed=0))
    assert not np.array_equal(first, kmeans_classes(features, 4, seed=5))
    assert np.array_equal(state, np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002


def test_kmeans_classes__float64_and_two_threads__runs_in_float32_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.cluster
    from threadpoolctl import threadpool_info, threadpool_limits  # type: ignore[import-untyped]

    def num_threads() -> int:
        return max(int(library["num_threads"]) for library in threadpool_info() if library["user_api"] == "openmp")

    seen: list[tuple[int, np.dtype[Any]]] = []

    class Watched(sklearn.cluster.KMeans):  # type: ignore[misc]
        def fit(self, rows: np.ndarray) -> Any:
            seen.append((num_threads(), rows.dtype))
            return super().fit(rows)

    monkeypatch.setattr(sklearn.cluster, "KMeans", Watched)
    with threadpool_limits(limits=2):
        kmeans_classes(blobs()[0], 4, seed=0)
        assert num_threads() == 2
    assert seen == [(1, np.dtype(np.float32))]


def test_kmeans_classes__fewer_distinct_rows_than_classes__valid_without_warning() -> None:
    classes = kmeans_classes(np.repeat(np.eye(2, 5), 10, axis=0), 4, seed=0)
    assert len(set(classes[:10].tolist())) == len(set(classes[10:].tolist())) == 1
    assert classes[0] != classes[10]
    assert 0 <= classes.min() <= classes.max() < 4


def test_kmeans_classes__one_class__zeros_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    classes = kmeans_classes(np.ones((5, 3)), 1, seed=0)
    assert classes.dtype == np.int64
    assert classes.tolist() == [0] * 5


@pytest.mark.parametrize(("num_rows", "most"), [(3, 3), (0, 1)])
def test_kmeans_classes__fewer_rows_than_classes__setting_error(num_rows: int, most: int) -> None:
    with pytest.raises(SettingError, match=rf"num_classes is 4, .* only {num_rows} rows .*num_classes={most} or less"):
        kmeans_classes(np.ones((num_rows, 3)), 4, seed=0)


def test_nearest_centres__of_kmeans__are_its_classes() -> None:
    features = blobs()[0].astype(np.float32)
    centres = kmeans_centres(features, 4, seed=0)
    assert centres.shape == (4, 8)
    assert centres.dtype == np.float32
    assert np.array_equal(nearest_centres(features, centres), kmeans_classes(features, 4, seed=0))
    assert nearest_centres(features, kmeans_centres(features, 1, seed=0)).tolist() == [0] * 200
    assert nearest_centres(features[:0], centres).shape == (0,)


def test_nearest_centres__row_in_any_company__is_classed_alike() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 36)).astype(np.float32)
    centres = rng.normal(size=(4, 36)).astype(np.float32)
    alone = [int(nearest_centres(features[i : i + 1], centres)[0]) for i in range(300)]
    assert nearest_centres(features, centres).tolist() == alone


# Candidates


def members_of(*sizes: int) -> list[np.ndarray]:
    """Return classes of such sizes whose ids are mixed and tell their class: 1000 to 1999 are class 1."""
    rng = np.random.default_rng(0)
    return [1000 * index + rng.permutation(size).astype(np.int64) for index, size in enumerate(sizes)]


def test_draw_candidates__large_classes__same_number_of_each_and_none_twice() -> None:
    candidates, classes = draw_candidates(members_of(50, 500, 20), 12, np.random.default_rng(0))
    assert candidates.dtype == classes.dtype == np.int64
    assert classes.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert np.array_equal(candidates // 1000, classes)
    assert len(set(candidates.tolist())) == 12


def test_draw_candidates__small_and_empty_classes__padded_at_their_end() -> None:
    candidates, classes = draw_candidates(members_of(2, 0, 9), 12, np.random.default_rng(0))
    assert sorted(candidates[:2].tolist()) == [0, 1]
    assert candidates[2:8].tolist() == [-1] * 6
    assert (candidates[8:] >= 2000).all()
    assert classes.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_draw_candidates__class_of_just_the_share__all_of_it_in_random_order() -> None:
    rng = np.random.default_rng(0)
    draws = {tuple(draw_candidates([np.array([4, 5, 6])], 3, rng)[0].tolist()) for _ in range(100)}
    assert len(draws) == 6
    assert {tuple(sorted(draw)) for draw in draws} == {(4, 5, 6)}


def test_draw_candidates__same_generator_state__same_draw() -> None:
    members = members_of(50, 60)
    first, second = np.random.default_rng(3), np.random.default_rng(3)
    once = draw_candidates(members, 8, first)[0]
    assert np.array_equal(once, draw_candidates(members, 8, second)[0])
    assert not np.array_equal(once, draw_candidates(members, 8, first)[0])


def test_draw_candidates__many_draws__every_member_as_often() -> None:
    rng = np.random.default_rng(0)
    counts: Counter[int] = Counter()
    for _ in range(4000):
        counts.update(draw_candidates([np.arange(10), np.arange(10, 15)], 4, rng)[0].tolist())
    # 2 of 10 and 2 of 5, 4,000 times: binomial, four standard deviations are 101 and 124.
    assert all(abs(counts[index] - 800) < 101 for index in range(10))
    assert all(abs(counts[index] - 1600) < 124 for index in range(10, 15))


def test_draw_candidates__members__stand_untouched() -> None:
    members = members_of(5, 5)
    before = [ids.copy() for ids in members]
    candidates, _ = draw_candidates(members, 10, np.random.default_rng(0))
    candidates[:] = 99
    assert all(np.array_equal(ids, old) for ids, old in zip(members, before, strict=True))


def test_check_enough__pool_smaller_than_a_step__says_what_to_set() -> None:
    check_enough(64, 64)
    with pytest.raises(SettingError, match=r"num_candidates is 64, but the pool has 63 rows; .*num_candidates=63 or"):
        check_enough(63, 64)


# Real data


@pytest.mark.real
def test_check_disjoint__gsm8k__its_splits_share_nothing(shared: Path) -> None:
    train, test = (read_pool(shared / "data" / "gsm8k" / name) for name in ("train.jsonl", "test.jsonl"))
    check_disjoint(train, test, None)
