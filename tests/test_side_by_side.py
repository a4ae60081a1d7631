from __future__ import annotations

import threading

import pytest
import torch

from raise_env.side_by_side import one_thread, one_thread_each, side_by_side


@pytest.fixture
def torch_threads():
    """Set torch's threads, and put them back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_side_by_side__results__come_in_the_order_of_the_tasks(torch_threads, num_threads):
    torch_threads(num_threads)
    gates = [threading.Event() for _ in range(3)]

    def task(place):
        if num_threads > 1 and place < 2:
            assert gates[place + 1].wait(10), "a later task runs while this one waits"
        gates[place].set()
        return place

    assert side_by_side([lambda place=place: task(place) for place in range(3)]) == [0, 1, 2]
    assert torch.get_num_threads() == num_threads


def test_side_by_side__several_threads__each_keeps_to_one_core(torch_threads):
    torch_threads(2)
    assert side_by_side([torch.get_num_threads] * 3) == [1, 1, 1]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_side_by_side__a_task_fails__its_error_is_raised_after_all_ended(torch_threads, num_threads):
    torch_threads(num_threads)
    done = []

    def fail():
        raise KeyError("seen")

    with pytest.raises(KeyError, match="seen"):
        side_by_side([fail, lambda: done.append(1)])
    assert len(done) == num_threads - 1
    assert torch.get_num_threads() == num_threads


@pytest.mark.parametrize("num_tasks", [0, 1, 3])
def test_one_thread_each__any_number_of_tasks__each_has_one_thread(torch_threads, num_tasks):
    torch_threads(3)
    assert list(one_thread_each([torch.get_num_threads] * num_tasks)) == [1] * num_tasks
    assert torch.get_num_threads() == 3


def test_one_thread__an_error_within__threads_are_as_before(torch_threads):
    torch_threads(3)
    counts = []
    with pytest.raises(KeyError), one_thread():
        raise KeyError(counts.append(torch.get_num_threads()))
    assert counts == [1]
    assert torch.get_num_threads() == 3
