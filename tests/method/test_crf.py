"""The fully connected CRF: lattice and spatial filters against brute-force Gaussian sums, mean-field against naive loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goca_guidance import CRF
from goca_guidance.method import crf


def brute(features):
    """exp(-|f_i - f_j|^2 / 2) for all pairs, float64."""
    features = np.asarray(features, np.float64)
    return np.exp(-0.5 * ((features[:, None] - features) ** 2).sum(-1))


def normalised(kernel):
    degree = kernel.sum(1)
    return kernel / np.sqrt(np.outer(degree, degree))


def positions(height, width, theta):
    rows, columns = np.indices((height, width)) / theta
    return np.stack([columns, rows], -1).reshape(-1, 2)


def picture(height, width, seed=0):
    """Two smooth colours that meet at a vertical edge, with a little noise."""
    left = np.arange(width) < width // 2
    image = np.where(left[None, :, None], (200.0, 60.0, 60.0), (60.0, 60.0, 200.0)) * np.ones((height, 1, 1))
    return np.clip(image + np.random.default_rng(seed).normal(0, 2, image.shape), 0, 255).astype(np.uint8)


def refine(scores, image, parameters=None):
    """In arrays."""
    return crf.marginals(*map(torch.from_numpy, (scores, image)), parameters or CRF()).numpy()


def filtered(kernel, values):
    """Arrays N k through a filter of k N."""
    return kernel(torch.from_numpy(values).T.float()).T.numpy()


def lattice(features):
    return crf.permutohedral(torch.from_numpy(features))


def pixels(theta, side):
    """The constant that means so many pixels of a picture of this longer side."""
    return theta * 500 / side


# ---- the lattice -----------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=40)
@given(dimensions=st.integers(1, 6), seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.1, 3.0, 50.0]))
def test_a_point_is_the_weighted_mean_of_its_corners(dimensions, seed, scale):
    features = torch.from_numpy(scale * np.random.default_rng(seed).normal(size=(50, dimensions)))
    corners, weights = (x.numpy() for x in crf.enclosing_simplex(features))
    assert np.allclose(np.einsum("nk,nkd->nd", weights, corners), crf.elevate(features), atol=1e-9 * scale)
    assert weights.min() > -1e-9
    assert np.allclose(weights.sum(1), 1)
    assert (corners.sum(-1) == 0).all()  # on the plane
    assert (corners % (dimensions + 1) == np.arange(dimensions + 1)[:, None]).all()  # corner k is k modulo d + 1
    spread = corners[:, :, None] - corners[:, None]
    assert (np.abs(spread).max(-1) <= dimensions + 1).all()  # the corners are neighbours of each other


def test_elevation_keeps_distances_up_to_a_factor():
    features = np.random.default_rng(0).normal(size=(20, 5))
    elevated = crf.elevate(torch.from_numpy(features)).numpy()
    apart = [np.linalg.norm(x[:, None] - x, axis=-1) for x in (features, elevated)]
    assert np.allclose(apart[1], apart[0] * np.sqrt(2 / 3) * 6)


def test_codes_tell_corners_apart_and_steps_lead_to_neighbours():
    features = torch.from_numpy(4 * np.random.default_rng(0).normal(size=(300, 5)))
    corners, _ = crf.enclosing_simplex(features)
    codes, shifts = crf.encode(corners)
    codes, keys = codes.numpy(), corners.reshape(-1, 6).numpy()
    assert len(np.unique(codes)) == len(np.unique(keys, axis=0))
    by_key = {tuple(key): code for key, code in zip(keys.tolist(), codes.ravel(), strict=True)}
    found = 0
    for key, code in by_key.items():
        for axis in range(6):
            neighbour = tuple(k - 1 + 6 * (i == axis) for i, k in enumerate(key))
            if neighbour in by_key:
                found += 1
                assert by_key[neighbour] == code + shifts[axis]
    assert found > 100


def test_too_narrow_a_kernel_is_refused():
    with pytest.raises(ValueError, match="too narrow"):
        refine(np.ones((1, 4, 4)), picture(4, 4), CRF(theta_beta=1e-3))


def test_lattice_has_the_gaussians_variance():
    """Mean squared distance to which one of many dense points is spread: 1 in each direction."""
    features = np.stack(np.meshgrid(*[np.linspace(-4.5, 4.5, 61)] * 2), -1).reshape(-1, 2)
    centres = np.flatnonzero(np.abs(features).max(1) < 0.7)
    values = np.zeros((len(features), len(centres)), np.float32)
    values[centres, np.arange(len(centres))] = 1
    spread = filtered(lattice(features), values)
    distances = ((features[:, None] - features[centres]) ** 2).sum(-1)
    assert (spread * distances).sum() / spread.sum() == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_lattice_is_near_the_gaussian_sums(dimensions):
    """Dense points in a few dimensions, normalised as the CRF uses it.

    The lattice's kernel is piecewise linear, and its shape depends on where in a simplex a point lies.
    """
    rng = np.random.default_rng(0)
    features, values = rng.uniform(0, 4, (1500, dimensions)), rng.random((1500, 3)).astype(np.float32)
    values[:750] *= features[:750, :1] > 2  # some structure
    ours = filtered(crf.symmetric(lattice(features), 1500), values)
    exact = normalised(brute(features)) @ values
    assert np.abs(ours - exact).max() / exact.max() < 0.06


def test_bilateral_lattice_is_near_the_gaussian_sums():
    """Points are sparse in five dimensions, and corners between them are missing: 10 % off at the worst, 2.4 % on average."""
    image, default = picture(24, 24), CRF(theta_alpha=pixels(8, 24))
    features = crf.bilateral_features(torch.from_numpy(image), default).numpy()
    rows, columns = np.indices((24, 24))
    expected = np.concatenate([columns[..., None] / 8, rows[..., None] / 8, image / 3], -1)
    assert np.allclose(features.reshape(24, 24, 5), expected, atol=1e-5)
    values = np.random.default_rng(1).random((576, 2)).astype(np.float32) + positions(24, 24, 12)
    ours = filtered(crf.symmetric(lattice(features), 576), values)
    exact = normalised(brute(features)) @ values
    assert np.abs(ours - exact).max() / exact.max() < 0.12
    assert np.abs(ours - exact).mean() / exact.mean() < 0.03


def test_spatial_filter_equals_the_gaussian_sums():
    values = np.random.default_rng(0).random((9 * 13, 4)).astype(np.float32)
    ours = filtered(crf.symmetric(crf.spatial((9, 13), 1.0), 9 * 13), values)
    assert np.allclose(ours, normalised(brute(positions(9, 13, 1.0))) @ values, atol=1e-5)


# ---- mean-field ------------------------------------------------------------------------------------------------------
def naive_mean_field(unary, kernels, iterations):
    """Algorithm 1 of the paper, pixel by pixel and label by label: Potts, every pixel's message to itself included."""
    pixels, labels = unary.shape
    q = np.exp(-unary) / np.exp(-unary).sum(1, keepdims=True)
    for _ in range(iterations):
        new = np.empty_like(q)
        for i in range(pixels):
            energy = np.empty(labels)
            for label in range(labels):
                others = [other for other in range(labels) if other != label]
                energy[label] = unary[i, label] + sum(
                    weight * (kernel[i] @ q[:, other]) for weight, kernel in kernels for other in others
                )
            new[i] = np.exp(-energy) / np.exp(-energy).sum()
        q = new
    return q


def problem(parameters, height=12, width=12):
    """Scores of three labels whose edge lies two pixels beside the picture's, some of them wrong."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.05, 0.35, (3, height, width))
    scores[0, :, : width // 2 - 2] += 0.4
    scores[1, :, width // 2 - 2 :] += 0.4
    image = picture(height, width)
    both = np.concatenate(
        [
            positions(height, width, parameters.theta_alpha * max(height, width) / 500),
            image.reshape(-1, 3) / parameters.theta_beta,
        ],
        1,
    )
    near = positions(height, width, parameters.theta_gamma)
    return scores, image, [(parameters.w1, normalised(brute(both))), (parameters.w2, normalised(brute(near)))]


def test_mean_field_equals_the_naive_loops():
    scores, _, kernels = problem(CRF(theta_alpha=pixels(8, 12)))
    unary = -np.log(scores.reshape(3, -1).T)
    filters = [(weight, torch.from_numpy(kernel).__matmul__) for weight, kernel in kernels]
    expected = naive_mean_field(unary, kernels, 5)
    along = [(weight, lambda values, multiply=multiply: multiply(values.T).T) for weight, multiply in filters]
    assert np.allclose(crf.mean_field(torch.from_numpy(unary.T), along, 5).T, expected, atol=1e-10)
    assert not np.allclose(expected, naive_mean_field(unary, kernels[:1], 5), atol=1e-2)  # both kernels speak


@pytest.mark.parametrize(
    "parameters",
    [
        CRF(theta_alpha=pixels(8, 12)),
        CRF(w1=2, theta_alpha=pixels(5, 12), theta_beta=6, w2=0, iterations=3),
    ],
)
def test_refinement_is_near_the_naive_loops(parameters):
    """The lattice is all that lies between."""
    scores, image, kernels = problem(parameters)
    expected = naive_mean_field(-np.log(scores.reshape(3, -1).T), kernels, parameters.iterations).T.reshape(
        scores.shape
    )
    ours = refine(scores, image, parameters)
    assert ours.dtype == np.float32
    assert np.allclose(ours.sum(0), 1, atol=1e-5)
    assert np.abs(ours - expected).mean() < 0.02
    assert (ours.argmax(0) == expected.argmax(0)).mean() > 0.98


def test_refinement_without_colours_equals_the_naive_loops():
    parameters = CRF(w1=0, w2=2, theta_gamma=1.5, iterations=3)
    scores, image, kernels = problem(parameters)
    expected = naive_mean_field(-np.log(scores.reshape(3, -1).T), kernels, 3).T.reshape(scores.shape)
    assert np.allclose(refine(scores, image, parameters), expected, atol=1e-4)


def test_labels_snap_to_the_colours():
    """Five noisy columns are on the wrong side of the edge before, none after."""
    height, width = 40, 60
    image, scores = picture(height, width), np.full((2, height, width), 0.35)
    scores[0, :, :25], scores[1, :, 25:] = 0.65, 0.65
    scores = np.clip(scores + np.random.default_rng(0).normal(0, 0.1, scores.shape), 0, 1)
    truth = np.broadcast_to((np.arange(width) >= width // 2).astype(int), (height, width))
    assert (scores.argmax(0) == truth).mean() < 0.95
    assert (refine(scores, image).argmax(0) == truth).mean() > 0.999


def test_without_kernels_or_rounds_the_scores_are_normalised():
    scores = np.random.default_rng(0).uniform(0.1, 1, (3, 5, 7))
    for parameters in (CRF(iterations=0), CRF(w1=0, w2=0)):
        assert np.allclose(refine(scores, picture(5, 7), parameters), scores / scores.sum(0), atol=1e-6)


def test_certain_scores_stay_finite():
    scores = np.zeros((2, 6, 6))
    scores[0] = 1
    assert np.isfinite(refine(scores, picture(6, 6))).all()


@pytest.mark.parametrize(("height", "width"), [(375, 500), (64, 48), (20, 30)])
def test_the_constant_of_positions_is_relative_to_the_longer_side(height, width):
    """67 pixels of Pascal VOC's pictures, 8.6 of a scene."""
    features = crf.bilateral_features(torch.zeros(height, width, 3, dtype=torch.uint8), CRF()).numpy()
    assert features[:, :2].max(0) == pytest.approx(np.array([width - 1, height - 1]) / max(height, width) * 500 / 67)


def test_wrong_constants_are_named():
    with pytest.raises(ValueError, match="theta_beta"):
        CRF(theta_beta=0)
