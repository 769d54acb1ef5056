"""The formulas against hand-computed cases, and against values computed outside this project where they are at hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamer.distributions import OneHot, TwoHot, symexp, symlog
from dreamer.returns import ReturnNormalizer, discount_weights, lambda_return
from dreamer.rssm import kl_loss

GOLDEN = Path(__file__).parents[2] / "shared/golden/formulas.json"


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_equal(actual: torch.Tensor, expected) -> None:
    expected = double(expected) if not isinstance(expected, torch.Tensor) else expected
    assert actual.dtype == torch.float64 and actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def golden() -> dict:
    if not GOLDEN.exists():
        pytest.skip(f"{GOLDEN} is not here; the hand-computed cases stand alone")
    return json.loads(GOLDEN.read_text())


class TestGolden:
    def test_symlog(self, golden):
        case = golden["symlog"]
        assert_equal(symlog(double(case["x"])), case["symlog"])
        assert_equal(symexp(symlog(double(case["x"]))), case["symexp_of_symlog"])

    def test_two_hot(self, golden):
        case = golden["twohot"]
        distribution = TwoHot(double(case["logits"]))
        assert_equal(distribution.mean(), double(case["mean"]).squeeze(-1))
        assert_equal(distribution.log_prob(double(case["target"]).squeeze(-1)), case["log_prob"])

    def test_one_hot(self, golden):
        case = golden["onehot"]
        distribution = OneHot(double(case["logits"]), case["unimix"])
        assert_equal(distribution.probs, case["probs"])
        assert_equal(distribution.entropy(), case["entropy"])
        assert_equal(distribution.log_prob(double(case["action"])), case["log_prob"])

    @pytest.mark.parametrize("suffix", ["", "_close"])
    def test_kl(self, golden, suffix):
        case = golden["kl"]
        post, prior = double(case["posterior_logits"]), double(case[f"prior_logits{suffix}"])
        settings = (case[key] for key in ("free_nats", "dyn_scale", "rep_scale", "unimix"))
        loss, kl = kl_loss(post, prior, *settings)
        assert_equal(loss, case[f"loss{suffix}"])
        assert_equal(kl, case[f"kl{suffix}"])

    @pytest.mark.parametrize(
        ("lambda_", "name"), [(0.95, "returns"), (0.0, "returns_lambda0"), (1.0, "returns_lambda1")]
    )
    def test_lambda_return(self, golden, lambda_, name):
        case = golden["lambda_return"]
        inputs = [double(case[key]) for key in ("reward", "value", "discount", "bootstrap")]
        assert_equal(lambda_return(*inputs, lambda_), case[name])

    def test_discount_weights(self, golden):
        assert_equal(discount_weights(double(golden["weights"]["discount"])), golden["weights"]["weights"])

    def test_return_normalizer(self, golden):
        case = golden["return_normalizer"]
        normalizer = ReturnNormalizer(case["decay"])
        for returns, (low, high, scale) in zip(case["returns"], case["low_high_scale_after_each"], strict=True):
            offset, actual = normalizer(double(returns))
            assert_equal(torch.stack([offset, actual]), [low, scale])
            assert normalizer.average[1].item() == pytest.approx(high, abs=1e-6)


def test_symlog_of_e_minus_one_is_one():
    assert_equal(symlog(double([0.0, math.e - 1, 1 - math.e, 1000.0])), [0.0, 1.0, -1.0, math.log(1001)])
    assert_equal(symexp(double([1.0, -1.0])), [math.e - 1, 1 - math.e])


class TestTwoHot:
    step = 40 / 254

    def one_bucket(self, index: int) -> torch.Tensor:
        return torch.full((255,), -1e9, dtype=torch.float64).index_fill(0, torch.tensor(index), 0.0)

    def test_mean_of_one_bucket(self):
        assert_equal(TwoHot(self.one_bucket(127)).mean(), 0.0)
        assert_equal(TwoHot(self.one_bucket(128)).mean(), math.exp(self.step) - 1)

    def test_mean_is_taken_in_symlog_space(self):
        logits = torch.logaddexp(self.one_bucket(127), self.one_bucket(129))
        assert_equal(TwoHot(logits).mean(), math.exp(self.step) - 1)

    def test_target_between_two_buckets(self):
        logits = torch.linspace(-1, 1, 255, dtype=torch.float64)
        log_probs = logits.log_softmax(-1)
        target = double(math.exp(1.25 * self.step) - 1)
        assert_equal(TwoHot(logits).log_prob(target), 0.75 * log_probs[128] + 0.25 * log_probs[129])

    def test_targets_beyond_the_ends_count_as_the_ends(self):
        logits = torch.randn(255, dtype=torch.float64)
        for target, index in ((1e12, 254), (-1e12, 0)):
            assert_equal(TwoHot(logits).log_prob(double(target)), logits.log_softmax(-1)[index])

    def test_nan_goes_through(self):
        assert TwoHot(torch.zeros(2, 255)).log_prob(torch.tensor([float("nan"), 1.0])).isnan().tolist() == [True, False]

    def test_zero_logits_mean_zero_in_float32(self):
        assert abs(TwoHot(torch.zeros(3, 255)).mean()).max() < 1e-5

    def test_log_prob_is_largest_at_the_mean(self):
        logits = self.one_bucket(140).clamp(min=-5)
        targets = symexp(torch.linspace(-19.9, 19.9, 101, dtype=torch.float64))
        log_probs = TwoHot(logits.expand(101, 255)).log_prob(targets)
        nearest = (symlog(targets) - (-20 + 140 * self.step)).abs().argmin()
        assert log_probs.argmax() == nearest


class TestTwoHotOfSymexpBuckets:
    places = np.sign(np.arange(-127, 128)) * np.expm1(np.abs(np.linspace(-10, 10, 255)))

    def test_a_risky_value_is_worth_its_mean(self):
        """Half 400, half -15, encoded as training does: the maximum of log_prob's mean over both has that mean."""
        outcomes = double([400.0, -15.0])
        logits = torch.zeros(255, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=500, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            value = -TwoHot(logits.expand(2, 255), "symexp").log_prob(outcomes).mean()
            value.backward()
            return value

        optimizer.step(loss)
        assert TwoHot(logits, "symexp").mean().item() == pytest.approx(192.5, abs=0.5)

    def test_a_target_s_two_buckets_average_to_it(self):
        for target in (-15.0, 0.0, 0.5, 3.7, 4100.0, 22025.0):
            # A sure bucket's log-probability of the target is -700 (1 - weight), its weight in the target's encoding.
            sure = 700 * torch.eye(255, dtype=torch.float64)
            weights = 1 + TwoHot(sure, "symexp").log_prob(double(target).expand(255)).numpy() / 700
            assert weights.sum() == pytest.approx(1, abs=1e-6) and (weights > 1e-6).sum() <= 2
            assert weights @ self.places == pytest.approx(target, abs=0.02)

    def test_mean_is_that_of_the_scalars(self):
        logits = 3 * torch.randn(7, 255, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        probs = torch.softmax(logits, -1).numpy()
        np.testing.assert_allclose(TwoHot(logits, "symexp").mean(), probs @ self.places, rtol=1e-9)

    def test_even_logits_mean_exactly_zero_in_float32(self):
        logits = torch.randn(3, 127)
        even = torch.cat([logits, torch.randn(3, 1), logits.flip(-1)], -1)
        assert (TwoHot(even, "symexp").mean() == 0).all() and (TwoHot(torch.zeros(255), "symexp").mean() == 0).all()

    def test_targets_beyond_the_ends_and_nan(self):
        logits = torch.randn(255, dtype=torch.float64)
        for target, index in ((1e12, 254), (-1e12, 0)):
            assert_equal(TwoHot(logits, "symexp").log_prob(double(target)), logits.log_softmax(-1)[index])
        assert TwoHot(torch.zeros(255), "symexp").log_prob(torch.tensor(float("nan"))).isnan()


class TestOneHot:
    def test_unimix_gives_every_class_its_share(self):
        assert_equal(OneHot(double([1e9, 0.0, 0.0, 0.0]), 0.01).probs, [0.9925, 0.0025, 0.0025, 0.0025])

    def test_entropy_of_uniform(self):
        assert_equal(OneHot(torch.zeros(7, dtype=torch.float64), 0.5).entropy(), math.log(7))

    def test_entropy_of_certainty_is_zero(self):
        assert_equal(OneHot(double([2000.0, 0.0])).entropy(), 0.0)

    def test_samples_follow_the_probabilities(self):
        torch.manual_seed(0)
        distribution = OneHot(torch.log(double([0.1, 0.2, 0.7])).expand(200_000, 3), 0.1)
        share = distribution.sample().mean(0)
        expected = 0.9 * double([0.1, 0.2, 0.7]) + 0.1 / 3
        # five standard deviations of a proportion
        assert ((share - expected).abs() < 5 * (expected * (1 - expected) / 200_000).sqrt()).all()

    def test_straight_through(self):
        logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        distribution = OneHot(logits, 0.01)
        weight = torch.randn(4, 5, dtype=torch.float64)
        sample = distribution.sample()
        assert_equal(sample.detach().round().sum(-1), [1.0] * 4)
        (through_sample,) = torch.autograd.grad((sample * weight).sum(), logits, retain_graph=True)
        (through_probs,) = torch.autograd.grad((distribution.probs * weight).sum(), logits)
        assert_equal(through_sample, through_probs)

    def test_mode(self):
        assert_equal(OneHot(double([0.0, 3.0, 1.0]), 0.01).mode(), [0.0, 1.0, 0.0])


class TestKL:
    def test_two_coins(self):
        # One categorical of two classes, q = (3/4, 1/4), p = (1/2, 1/2): KL = 3/4 ln 3/2 + 1/4 ln 1/2
        q, p = torch.log(double([[[[0.75, 0.25]]]])), torch.zeros(1, 1, 1, 2, dtype=torch.float64)
        expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
        loss, kl = kl_loss(q, p, 0.0, 0.5, 0.1, 0.0)
        assert_equal(kl, [[expected]])
        assert_equal(loss, [[0.6 * expected]])
        loss, _ = kl_loss(q, p, 1.0, 0.5, 0.1, 0.0)
        assert_equal(loss, [[0.6]])

    def test_each_part_trains_its_own_side(self):
        post = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
        prior = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
        kl_loss(post, prior, 0.0, 1.0, 0.0, 0.01)[0].sum().backward()
        assert not post.grad.any() and prior.grad.any()
        post.grad = prior.grad = None
        kl_loss(post, prior, 0.0, 0.0, 1.0, 0.01)[0].sum().backward()
        assert post.grad.any() and not prior.grad.any()

    def test_no_gradient_below_the_free_nats(self):
        post = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
        prior = (post + 1e-3).detach().requires_grad_()
        kl_loss(post, prior, 0.6, 0.5, 0.1, 0.01)[0].sum().backward()
        assert not post.grad.any() and not prior.grad.any()


class TestReturns:
    reward, value, discount = double([1.0, 1.0, 1000.0]), double([50.0, 100.0, 200.0]), double([0.9, 0.9, 0.5])
    bootstrap = double(10.0)

    def test_by_hand(self):
        last = 1000 + 0.5 * 10
        middle = 1 + 0.9 * (0.2 * 200 + 0.8 * last)
        first = 1 + 0.9 * (0.2 * 100 + 0.8 * middle)
        assert_equal(lambda_return(self.reward, self.value, self.discount, self.bootstrap, 0.8), [first, middle, last])

    def test_lambda_one_ignores_the_values(self):
        returns = lambda_return(self.reward, self.value * 7, self.discount, self.bootstrap, 1.0)
        assert_equal(returns[0], 1 + 0.9 * (1 + 0.9 * 1005.0))

    def test_lambda_zero_is_one_step(self):
        returns = lambda_return(self.reward, self.value, self.discount, self.bootstrap, 0.0)
        assert_equal(returns, [1 + 0.9 * 100, 1 + 0.9 * 200, 1005.0])

    def test_weights(self):
        assert_equal(discount_weights(self.discount), [1.0, 0.9, 0.81])

    def test_normalizer(self):
        normalizer = ReturnNormalizer(0.9, low=0.25, high=0.75)
        offset, scale = normalizer(double([0.0, 100.0, 200.0, 300.0, 400.0]))
        assert_equal(torch.stack([offset, scale]), [10.0, 20.0])
        offset, scale = normalizer(double([0.0]).expand(5))
        assert_equal(torch.stack([offset, scale]), [9.0, 18.0])

    def test_scale_is_at_least_one(self):
        assert ReturnNormalizer(0.99)(double([0.0, 0.1]))[1] == 1.0
