"""Distances between sets of features: closed forms, scipy, torch-fidelity and torchmetrics; statistics and their files."""

import numpy as np
import pytest
import scipy.linalg
import torch
from accelerate import PartialState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from eval.common.intervals import difference, interval, jackknife, left_out, resamples
from eval.common.processes import slices
from eval.generation.distances import (
    FeatureSpace,
    KernelDistance,
    Statistics,
    draw_scenes,
    frechet,
    frechet_draws,
    precision_recall,
    read_reference,
    statistics,
)
from eval.scenes.scene import scene
from tests.helpers.runs import folder_of, mixing, picture


def drawn(seed, images, size, shift=0.0, scale=1.0):
    """Correlated features [n d], float32."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((images, size)) @ (np.eye(size) + 0.3 * rng.standard_normal((size, size)))
    return (shift + scale * mixed).astype(np.float32)


def of(features):
    return statistics([features])


def gaussian(mean, covariance):
    return Statistics(np.asarray(mean, float), np.asarray(covariance, float))


class Flat(torch.nn.Module):
    """A network in small: pixels of 4 x 4 images, mixed."""

    num_features = 6

    def __init__(self):
        super().__init__()
        self.matrix = torch.randn(48, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def forward(self, images):
        return images.flatten(1).double() / 255 @ self.matrix


def pictures(seed, count, top):
    return torch.randint(0, top, (count, 3, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# ---- Frechet ---------------------------------------------------------------------------------------------------------
def test_diagonal_gaussians():
    """Each axis by itself: (difference of the means)^2 + (difference of the standard deviations)^2."""
    one, other = gaussian([0, 1, 2], np.diag([1, 4, 9])), gaussian([1, 1, 0], np.diag([4, 4, 25]))
    assert frechet(one, other) == pytest.approx(1 + 4 + (1 - 2) ** 2 + (3 - 5) ** 2)


def test_full_gaussians():
    """With S2 = T S1 T, T symmetric and positive, the optimal transport is T, and the trace of the root is tr(T S1)."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5, 5))
    first, transport = a @ a.T + np.eye(5), b @ b.T + 0.5 * np.eye(5)
    second = transport @ first @ transport
    expected = 3**2 + np.trace(first + second - 2 * transport @ first)
    assert frechet(gaussian(np.zeros(5), first), gaussian([3, 0, 0, 0, 0], second)) == pytest.approx(expected)


@pytest.mark.parametrize("images", [300, 12], ids=["full rank", "fewer images than features"])
def test_frechet_of_features(images):
    """Three other computations on the same features."""
    real, fake = drawn(1, images, 20), drawn(2, images, 20, shift=0.2, scale=1.3)
    ours = frechet(of(real), of(fake))
    s, t = (fid_features_to_statistics(torch.from_numpy(x).double()) for x in (real, fake))
    assert ours == pytest.approx(fid_statistics_to_metric(s, t, verbose=False)[KEY_METRIC_FID], rel=1e-6)
    root = scipy.linalg.sqrtm(s["sigma"] @ t["sigma"]).real
    apart = s["mu"] - t["mu"]
    assert ours == pytest.approx(apart @ apart + np.trace(s["sigma"] + t["sigma"] - 2 * root), rel=1e-4)
    assert ours == pytest.approx(frechet_draws(of(real), fake, np.ones((1, images)))[0], rel=1e-6)


def test_frechet_is_torchmetrics_fid_on_images():
    network, metric = Flat(), FrechetInceptionDistance(Flat())
    sets = pictures(1, 90, 200), pictures(2, 70, 256)
    for images, real in zip(sets, (True, False), strict=True):
        metric.update(images, real=real)
    ours = frechet(*(of(network(images).numpy()) for images in sets))
    assert ours == pytest.approx(float(metric.compute()), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 6), st.floats(0.1, 10))
def test_frechet_is_a_distance(seed, size, scale):
    one, other = of(drawn(seed, 40, size)), of(drawn(seed + 1, 50, size, 1, scale))
    assert frechet(one, one) == pytest.approx(0, abs=1e-6)
    assert frechet(one, other) == pytest.approx(frechet(other, one))
    assert frechet(one, other) > 0


@pytest.mark.parametrize("size", [4, 40], ids=["full rank", "fewer images than features"])
def test_resampled_frechet_is_that_of_copies(size):
    real, fake = drawn(1, 25, size), drawn(2, 30, size, shift=0.5)
    weights = np.random.default_rng(0).multinomial(30, np.full(30, 1 / 30), 3)
    expected = [frechet(of(real), of(fake.repeat(times, axis=0))) for times in weights]
    assert frechet_draws(of(real), fake, weights) == pytest.approx(expected, rel=1e-6)


def test_features_of_other_networks_have_no_distance():
    with pytest.raises(ValueError, match="5 of the reference and 3 of the run"):
        frechet(of(drawn(0, 9, 5)), of(drawn(0, 9, 3)))
    with pytest.raises(ValueError, match="5 of the reference and 3 of the run"):
        frechet_draws(of(drawn(0, 9, 5)), drawn(0, 9, 3), np.ones((1, 9)))


# ---- statistics ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shift", [0, 1e4], ids=["around zero", "far from zero"])
def test_statistics_do_not_depend_on_batches(shift):
    features = drawn(5, 100, 8, shift=shift)
    whole = of(features)
    exact = features.astype(np.float64)
    np.testing.assert_allclose(whole.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-9)
    for size in (1, 7):
        found = statistics(slices(features, size))
        np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(found.covariance, whole.covariance, rtol=1e-9, atol=1e-9)
        assert found.images == 100


def test_too_few_images():
    assert of(drawn(0, 8, 8)).rank_deficient
    assert not of(drawn(0, 9, 8)).rank_deficient
    assert np.linalg.matrix_rank(of(drawn(0, 8, 8)).covariance) == 7
    assert not gaussian([0], [[1]]).rank_deficient  # nobody knows
    for images in (0, 1):
        with pytest.raises(ValueError, match=f"at least two images.*got {images}"):
            of(drawn(0, images, 3)) if images else statistics([])


def test_statistics_file_round_trip(tmp_path):
    found = statistics([drawn(5, 50, 8)], {"network": "inception"})
    found.write(tmp_path / "own.npz")
    again = Statistics.read(tmp_path / "own.npz")
    assert np.array_equal(again.mean, found.mean)
    assert np.array_equal(again.covariance, found.covariance)
    assert (again.images, again.made_with) == (50, {"network": "inception"})


@pytest.mark.parametrize(
    ("save", "dtype"),
    [(np.savez_compressed, np.float64), (np.savez, np.float32), (np.savez, np.float64)],
    ids=["pytorch-fid", "clean-fid", "T2IBenchmark"],
)
def test_statistics_of_other_tools(save, dtype, tmp_path):
    mu, sigma = drawn(0, 3, 1)[:, 0].astype(dtype), np.diag([1, 2, 3]).astype(dtype)
    save(tmp_path / "a.npz", mu=mu, sigma=sigma)
    found = Statistics.read(tmp_path / "a.npz")
    assert (found.mean.dtype, found.covariance.dtype) == (np.float64, np.float64)
    assert np.array_equal(found.mean, mu.astype(float))
    assert (found.images, found.made_with) == (None, {})


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"mean": np.zeros(3)}, "`mu` and `sigma`"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"\(3,\) and \(2, 2\)"),
        ({"mu": np.zeros((3, 3)), "sigma": np.eye(3)}, r"mu \[d\]"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "finite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 2], [0, 1]])}, "symmetric"),
        ({"mu": np.array([{}, {}]), "sigma": np.eye(2)}, "`mu` and `sigma`"),
    ],
    ids=["keys", "sizes", "shape", "NaN", "not symmetric", "objects"],
)
def test_files_that_are_no_statistics(arrays, match, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=match):
        Statistics.read(tmp_path / "a.npz")


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\x03\x04 cut"], ids=["absent", "empty", "text", "cut"])
def test_files_that_cannot_be_read(content, tmp_path):
    if content is not None:
        (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.npz file with `mu` and `sigma`"):
        Statistics.read(tmp_path / "a.npz")


def test_a_single_array_is_no_statistics(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, np.eye(2))
    with pytest.raises(ValueError, match=r"\.npz file with `mu` and `sigma`"):
        Statistics.read(tmp_path / "a.npz")


# ---- kernel, neighbours ----------------------------------------------------------------------------------------------
def kid(real, fake):
    return KernelDistance(real)(fake, np.ones((1, len(fake))))[0]


def test_kernel_distance_is_kid_over_all_images():
    """One subset of all the images: torchmetrics' class on pixels, and torch-fidelity's function on features."""
    sets = pictures(1, 60, 200), pictures(2, 60, 256)
    real, fake = (Flat()(images) for images in sets)
    metric = KernelInceptionDistance(Flat(), subsets=1, subset_size=60)
    for images, is_real in zip(sets, (True, False), strict=True):
        metric.update(images, real=is_real)
    ours = kid(real.numpy(), fake.numpy())
    assert ours == pytest.approx(float(metric.compute()[0]), rel=1e-9)
    asked = {"kid_subsets": 1, "kid_subset_size": 60, "rng_seed": 0, "verbose": False}
    assert ours == pytest.approx(kid_features_to_metric(real, fake, **asked)[KEY_METRIC_KID_MEAN], rel=1e-9)


def test_kernel_distance_is_the_mean_over_subsets():
    real, fake = (torch.from_numpy(drawn(seed, n, 6, shift)).double() for seed, n, shift in ((1, 50, 0), (2, 40, 0.3)))
    rng = torch.Generator().manual_seed(0)
    subsets = [(torch.randperm(50, generator=rng)[:20], torch.randperm(40, generator=rng)[:20]) for _ in range(3000)]
    found = torch.stack([poly_mmd(real[i], fake[j]) for i, j in subsets])
    error = float(found.std()) / 3000**0.5
    assert kid(real.numpy(), fake.numpy()) == pytest.approx(float(found.mean()), abs=4 * error)


def test_kernel_distance_of_resamples(monkeypatch):
    """Pair by pair, copies of one image left out; in blocks."""
    monkeypatch.setattr("eval.generation.distances.BLOCK", 4)
    real, fake = drawn(1, 7, 3).astype(float), drawn(2, 9, 3, 1).astype(float)
    weights = np.random.default_rng(0).multinomial(9, np.full(9, 1 / 9), 4)

    def kernel(x, y):
        return (x @ y / 3 + 1) ** 3

    for times, found in zip(weights, KernelDistance(real)(fake, weights), strict=True):
        ids = np.repeat(np.arange(9), times)
        within = np.mean([kernel(real[i], real[j]) for i in range(7) for j in range(7) if i != j])
        own = np.mean([kernel(fake[i], fake[j]) for i in ids for j in ids if i != j])
        across = np.mean([kernel(real[i], fake[j]) for i in range(7) for j in ids])
        assert found == pytest.approx(within + own - 2 * across)


def test_kernel_distance_has_no_bias():
    """Sets of one distribution: zero on average, where the Frechet distance is far above it; resamples keep that."""
    rng, values, frechets, draws = np.random.default_rng(0), [], [], []
    for _ in range(200):
        real, fake = rng.standard_normal((2, 30, 10))
        weights = rng.multinomial(30, np.full(30, 1 / 30), 20)
        values.append(kid(real, fake))
        draws.append(KernelDistance(real)(fake, weights).mean())
        frechets.append(frechet(of(real), of(fake)))
    error = np.std(values) / 200**0.5
    assert abs(np.mean(values)) < 3 * error
    assert abs(np.mean(draws)) < 3 * error
    assert np.mean(frechets) > 1


def test_precision_and_recall():
    """By hand: an image counts where it lies within some other image's distance to its third neighbour."""
    real, fake = drawn(1, 20, 3), drawn(2, 25, 3, 0.8)

    def covered(points, others):
        radii = [sorted(np.linalg.norm(others - o, axis=1))[3] for o in others]
        return np.mean([any(np.linalg.norm(p - o) <= r for o, r in zip(others, radii, strict=True)) for p in points])

    found = precision_recall(real, fake)
    assert found == pytest.approx((covered(fake, real), covered(real, fake)))
    assert 0 < found[0] < 1


@pytest.mark.parametrize("images", [1, 3])
def test_too_few_images_for_pairs(images):
    with pytest.raises(ValueError, match=f"got {images} and 9|more than 3"):
        precision_recall(drawn(0, images, 2), drawn(1, 9, 2))
    if images < 2:
        with pytest.raises(ValueError, match="two real images"):
            KernelDistance(drawn(0, images, 2))
        with pytest.raises(ValueError, match="two images"):
            kid(drawn(0, 5, 2), drawn(0, images, 2))


@pytest.mark.parametrize(("metric", "size"), [("frechet", 5), ("frechet", 75), ("kernel", 5)])
def test_interval_of_a_distance_covers(metric, size):
    """Its expectation at this number of images, which for the Frechet distance is above that of infinitely many."""
    rng, values, intervals = np.random.default_rng(2), [], []
    real, shift = rng.standard_normal((500, size)), 0.3 * (5 / size) ** 0.5
    whole, kernel = statistics([real]), KernelDistance(real[:100])
    for _ in range(100):
        fake = shift + rng.standard_normal((150, size))
        if metric == "frechet":
            values.append(frechet(whole, statistics([fake])))
            intervals.append(jackknife(values[-1], frechet_draws(whole, fake, left_out(150))))
        else:
            value, *draws = kernel(fake, np.vstack([np.ones(150), resamples(150, 100)]))
            values.append(value)
            intervals.append(interval(value, np.array(draws)))
    assert 0.88 < np.mean([low <= np.mean(values) <= high for low, high in intervals]) < 1 - 1e-9
    width = np.mean(np.diff(intervals)) / 3.92
    assert 0.8 < width / np.std(values) < 1.6


def test_a_paired_frechet_difference_is_narrower_and_found():
    """Run features that differ by a small shift of all images."""
    rng = np.random.default_rng(0)
    real, base = rng.standard_normal((2, 300, 6))
    whole, ours = statistics([real]), base + 0.15
    values = [frechet(whole, statistics([fake])) for fake in (ours, base)]
    draws, base_draws = (frechet_draws(whole, fake, left_out(300)) for fake in (ours, base))
    paired = difference(values[0], draws, values[1], base_draws, jackknife)
    alone = difference(values[0], draws, values[1], frechet_draws(whole, base, left_out(300, seed=1)), jackknife)
    assert np.diff(paired["difference_interval"]) < 0.85 * np.diff(alone["difference_interval"])
    assert not paired["within_noise"]


# ---- the reference ---------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("own_folder")
def test_references(tmp_path, monkeypatch):
    state = PartialState()
    folder = folder_of(tmp_path / "real" / "deep", 3).parent
    picture(9, 9).save(folder / "B.JPG", format="JPEG")
    (folder / "notes.txt").write_text("")
    found = read_reference(str(folder), state)
    assert [item.id for item in found.items] == ["B.JPG", "deep/0.png", "deep/1.png", "deep/2.png"]
    assert (found.images, found.other_files) == (4, 1)
    monkeypatch.setattr("eval.generation.distances.SCENES", 3)
    drawn = read_reference("scenes", state)
    assert np.array_equal(np.asarray(drawn.items[2].read()), scene("test", 2).image)
    monkeypatch.setattr("eval.generation.distances.scene", None)
    draw_scenes(drawn.items[0].path.parent)  # they are there
    for path in ("nowhere", str(folder / "notes.txt")):
        with pytest.raises(ValueError, match=r'a folder of images, an \.npz file or "scenes"'):
            read_reference(path, state)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has 0"):
        read_reference(str(tmp_path / "empty"), state)


def test_statistics_of_another_network_are_refused(tmp_path):
    statistics([np.eye(5)], {"network": "another"}).write(tmp_path / "a.npz")
    space = FeatureSpace(mixing(), read_reference(str(tmp_path / "a.npz"), PartialState()), PartialState(), 8)
    with pytest.raises(ValueError, match=r"holds those of .*another"):
        _ = space.statistics
