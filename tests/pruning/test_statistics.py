"""Running statistics against the same quantities of all the data at once."""

import math

import pytest
import torch
from torch import Tensor

from plprune.pruning.statistics import BlockInfluence, Gram, HoldoutGram, Moments, Norms, in_tf32, tf32

SPLITS = [(6,), (1,) * 6, (4, 2), (1, 5), (3, 3)]


def data(samples: int = 6, tokens: int = 9, features: int = 5, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, tokens, features, generator=generator) * torch.arange(1, features + 1)
    return x + offset


def fed(statistic, *batches: Tensor):
    for batch in batches:
        statistic.update(batch)
    return statistic


def flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1).double()


def close(a: Tensor, b: Tensor, rtol: float = 1e-6, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("split", SPLITS)
def test_moments_are_those_of_all_tokens_at_once(split: tuple[int, ...]) -> None:
    x = data(offset=3.0)
    moments = fed(Moments(), *x.split(split))
    assert moments.count == 54
    close(moments.mean, flat(x).mean(0))
    close(moments.variance, flat(x).var(0))
    close(moments.norm, flat(x).norm(dim=0))


@pytest.mark.parametrize("split", SPLITS)
def test_norms_are_those_of_each_sample_and_of_all(split: tuple[int, ...]) -> None:
    x = data()
    norms = fed(Norms(), *x.split(split))
    close(norms.mean, torch.stack([sample.double().norm(dim=0) for sample in x]).mean(0))
    close(norms.pooled, flat(x).norm(dim=0))


@pytest.mark.parametrize("split", SPLITS)
def test_gram_is_that_of_all_tokens_at_once(split: tuple[int, ...]) -> None:
    x = data(offset=2.0)
    gram = fed(Gram(), *x.split(split))
    close(gram.second_moment() * gram.count, flat(x).T @ flat(x))
    close(gram.covariance(), torch.cov(flat(x).T, correction=0), atol=1e-6)
    close(gram.mean, flat(x).mean(0))
    close(gram.norm, flat(x).norm(dim=0))


def test_gram_has_no_seams_between_its_tiles() -> None:
    x = torch.randn(2, 20, 2 * Gram.tile + 70, generator=torch.Generator().manual_seed(0))
    gram = fed(Gram(), *x)
    close(gram.second_moment() * gram.count, flat(x).T @ flat(x), atol=1e-4)


def test_gram_can_be_read_between_updates() -> None:
    first, second = data(2, 7, Gram.tile + 3).split(1)
    gram = fed(Gram(), first)
    gram.covariance()
    close(fed(gram, second).covariance(), fed(Gram(), first, second).covariance())


def test_running_variance_is_the_sum_in_its_docstring() -> None:
    samples = [data(1, s, 3, offset=2.0) for s in (9, 4, 7, 5)]
    total = torch.zeros(3, dtype=torch.float64)
    for c in range(2, 5):
        mean = torch.cat([flat(x) for x in samples[:c]]).mean(0)
        for token in flat(samples[c - 1]):
            total += (c - 1) / c * (token - mean).square() / samples[c - 1].shape[1]
    close(fed(Moments(), *samples).running_variance, total / 3)


@pytest.mark.parametrize("split", SPLITS)
def test_running_variance_is_the_authors_recursion(split: tuple[int, ...]) -> None:
    x = data(offset=2.0)
    mean = f = torch.zeros(5, dtype=torch.float64)
    for k, sample in enumerate(x.double()):
        mean = mean * k / (k + 1) + sample.mean(0) / (k + 1)
        if k:
            f = f * (k - 1) / k + (sample - mean).square().sum(0) / (k + 1)
    close(fed(Moments(), *x.split(split)).running_variance, f / x.shape[1])


def test_running_variance_of_one_sample_is_its_variance() -> None:
    x = data(1)
    close(fed(Moments(), x).running_variance, flat(x).var(0))


def test_samples_may_differ_in_length() -> None:
    samples = [data(2, 5), data(1, 11), data(3, 2)]
    together = torch.cat([flat(x) for x in samples])
    close(fed(Moments(), *samples).variance, together.var(0))
    close(fed(Norms(), *samples).pooled, together.norm(dim=0))
    close(fed(Gram(), *samples).second_moment(), together.T @ together / len(together), atol=1e-6)


def test_an_offset_far_above_the_spread_costs_no_accuracy() -> None:
    spread = torch.tensor([1.0, 1.0, 0.3, 0.1, 0.03, 0.03])
    x = torch.randn(8, 400, 6, generator=torch.Generator().manual_seed(0)) * spread + 1e4
    moments, gram = fed(Moments(), *x.split(3)), fed(Gram(), *x.split(3))
    close(moments.mean, flat(x).mean(0), rtol=1e-10)
    close(moments.variance, flat(x).var(0))
    close(gram.covariance(), torch.cov(flat(x).T, correction=0), rtol=1e-6, atol=1e-6)
    close(gram.second_moment(), flat(x).T @ flat(x) / gram.count, rtol=1e-10)


def test_features_that_are_always_zero_stay_exactly_zero() -> None:
    x = data()
    x[..., 2] = 0
    gram, moments = fed(Gram(), *x.split(2)), fed(Moments(), *x.split(2))
    assert not gram.second_moment()[2].any()
    assert not gram.covariance()[:, 2].any()
    assert gram.norm[2] == moments.norm[2] == moments.variance[2] == moments.running_variance[2] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_full_precision(dtype: torch.dtype) -> None:
    x = data(offset=1.0).to(dtype)
    close(fed(Moments(), x).variance, flat(x).var(0))
    close(fed(Norms(), x).pooled, flat(x).norm(dim=0))
    close(fed(Gram(), x).norm, flat(x).norm(dim=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_in_tf32_on_a_gpu_where_values_were_in_half_only(dtype: torch.dtype) -> None:
    assert in_tf32(dtype, "cuda") == (dtype != torch.float32)
    assert not in_tf32(dtype, "cpu")
    before, matmul = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul
    with tf32():
        assert getattr(matmul, "fp32_precision", "tf32") == "tf32"
    assert torch.get_float32_matmul_precision() == before
    assert getattr(matmul, "fp32_precision", "none") != "tf32"


@pytest.mark.parametrize("split", SPLITS)
def test_block_influence_is_the_mean_distance_of_tokens(split: tuple[int, ...]) -> None:
    x, y = data(), data(offset=2.0).flip(0)
    influence = BlockInfluence()
    for before, after in zip(x.split(split), y.split(split), strict=True):
        influence.update(before, after)
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in zip(flat(x), flat(y), strict=True)]
    angles = [math.acos(c) / math.pi for c in cosines]
    assert influence.distance("angular") == pytest.approx(sum(angles) / len(angles), rel=1e-6)
    assert influence.distance("cosine") == pytest.approx(1 - sum(cosines) / len(cosines), rel=1e-6)
    assert influence.distance("mse") == pytest.approx(float((flat(x) - flat(y)).square().mean()), rel=1e-6)
    assert influence.distance("mae") == pytest.approx(float((flat(x) - flat(y)).abs().mean()), rel=1e-6)
    assert influence.distance("uniform") == 1


def test_a_block_that_changes_nothing_has_no_influence_and_no_nan() -> None:
    x = data(8, 100, 64) * 1e3
    influence = BlockInfluence()
    influence.update(x, x)
    assert 0 <= influence.distance("angular") < 2e-4  # the arc cosine of 1 - 6e-8
    assert influence.distance("mse") == influence.distance("mae") == 0
    influence.update(x, -x)
    assert influence.distance("angular") == pytest.approx(0.5, abs=2e-4)


def test_vectors_of_zeros_have_finite_distances() -> None:
    influence = BlockInfluence()
    influence.update(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))
    influence.update(torch.zeros(1, 2, 3), torch.ones(1, 2, 3))
    assert all(math.isfinite(influence.distance(name)) for name in ("angular", "cosine", "mse", "mae"))


def test_a_gram_that_was_released_still_has_its_mean() -> None:
    gram = Gram()
    gram.update(torch.arange(12.0).view(1, 4, 3))
    mean, covariance = gram.mean, gram.covariance()
    gram.release()
    assert torch.equal(gram.mean, mean)
    assert covariance.shape == (3, 3)


@pytest.mark.parametrize("split", SPLITS)
def test_every_fourth_sample_is_kept_apart_whatever_the_batches(split: tuple[int, ...]) -> None:
    x = data(offset=2.0)
    parted = fed(HoldoutGram(), *x.split(split))
    others, apart = flat(x[[0, 2, 3, 4]]), flat(x[[1, 5]])
    close(parted.fitting.mean, others.mean(0))
    close(parted.held_out.covariance(), torch.cov(apart.T, correction=0), atol=1e-5)
    about = apart - others.mean(0)
    close(parted.held_out.about(parted.fitting.mean), about.T @ about / len(apart), atol=1e-5)
    close(parted.norm, flat(x).norm(dim=0))
    later = fed(HoldoutGram(first=2), *x[2:].split(1))
    close(later.held_out.mean, flat(x[[5]]).mean(0))


def test_both_parts_together_are_one_gram() -> None:
    x = data(offset=2.0)
    pool, gram = fed(HoldoutGram(), *x.split(4)).pooled(), fed(Gram(), *x.split(4))
    assert pool.count == gram.count
    close(pool.mean, gram.mean)
    close(pool.covariance(), gram.covariance(), atol=1e-5)
