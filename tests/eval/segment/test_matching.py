"""The matching of nameless segments to classes."""

from itertools import permutations

import numpy as np
import pytest

from eval.segment.matching import match


def test_matching_equals_the_best_of_all_permutations():
    rng = np.random.default_rng(0)
    for _ in range(10):
        segments, truth = rng.integers(0, 4, (6, 6)), rng.integers(0, 4, (6, 6))
        truth[0] = 255
        best = max((np.array(p)[segments] == truth).sum() for p in permutations(range(4)))
        matched = match(segments * 7 + 3, truth, 4, 255)
        assert (matched == truth).sum() == best
        assert len({(s, m) for s, m in zip(segments.flat, matched.flat, strict=True)}) == 4  # a function, one-to-one


def test_segments_too_many_take_a_class_that_they_do_not_overlap():
    segments, truth = np.array([[0, 0, 0, 1, 2]]), np.array([[1, 1, 1, 1, 1]])
    assert match(segments, truth, 5, 255)[0, :3].tolist() == [1, 1, 1]
    assert not set(match(segments, truth, 5, 255)[0, 3:].tolist()) & {1}
    assert match(segments, truth, 2, 255).tolist() == [[1, 1, 1, 0, 0]]


def test_background_takes_many_segments():
    """By hand: 5 is the dog's, 7 the cat's; 2, 3 and 4 are merged, and 4 lies in void but for a pixel of the dog."""
    truth = np.array([[0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 1, 255, 255, 2, 0]])
    segments = np.array([[2, 2, 3, 5, 5, 5, 7, 7], [2, 2, 3, 4, 4, 4, 7, 7]])
    assert match(segments, truth, 21, 255, background=0).tolist() == [
        [0, 0, 0, 1, 1, 1, 2, 2],
        [0, 0, 0, 0, 0, 0, 2, 2],
    ]


def test_background_may_win_a_segment_back():
    """Segment 1 alone touches the dog, with one pixel, and is background for the rest: nothing else is larger there."""
    truth, segments = np.array([[0, 0, 0, 1, 0]]), np.array([[1, 1, 1, 1, 2]])
    assert match(segments, truth, 3, 255, background=0).tolist() == [[0, 0, 0, 0, 0]]


def test_an_image_of_void_is_all_background():
    assert match(np.array([[1, 2]]), np.array([[255, 255]]), 3, 255, background=0).tolist() == [[0, 0]]


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="resize them"):
        match(np.zeros((2, 2), int), np.zeros((2, 3), int), 3, 255)
    with pytest.raises(ValueError, match="below 3 or 255"):
        match(np.zeros((1, 2), int), np.array([[0, 7]]), 3, 255)
