"""Metrics: which way is up, and the objects that a caption names."""

from eval.generation import networks
from eval.generation.metrics import METRICS, objects_named
from eval.scenes.scene import OBJECTS, scene


def test_names_in_captions_are_the_objects_of_scenes():
    for number in range(300):
        found = scene("test", number)
        assert {o for o, named in zip(OBJECTS, objects_named(found.caption), strict=True) if named} == set(
            found.objects
        )


def test_every_metric_says_which_way_is_up():
    """A new metric is one more line here, and a test of its numbers."""
    lower = {"fid", "kid", "frechet_efficientnet_lite0", "mmd_efficientnet_lite0"}
    higher = {"precision", "recall", "clip_score", "caption_accuracy", "objects_shown"}
    numbers = [(name, metric.higher_is_better) for metric in METRICS.values() for name in metric.numbers]
    assert sorted(numbers) == sorted([*((name, False) for name in lower), *((name, True) for name in higher)])
    assert {metric.network for metric in METRICS.values()} == set(networks.NETWORKS)
