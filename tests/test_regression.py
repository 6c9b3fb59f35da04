import torch
from sklearn.linear_model import Ridge

from kdx.explain.regression import Regression


def test_regression_is_ridge_with_an_intercept_and_the_strength_that_predicts_best():
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(40, 5, 3, 3, generator=generator) + 2
    of = torch.einsum("nkhw,kj->njhw", given, torch.randn(5, 4, generator=generator)) - 1
    of += 0.1 * torch.randn(of.shape, generator=generator)
    found = Regression.fit(of, given)
    x, y = (t.permute(0, 2, 3, 1).flatten(0, 2).double().numpy() for t in (given, of))
    oracle = Ridge(alpha=1e-5 * len(x)).fit(x, y)
    torch.testing.assert_close(found.weights.double(), torch.from_numpy(oracle.coef_.T), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found.intercept.double(), torch.from_numpy(oracle.intercept_), rtol=1e-2, atol=1e-2)
    noise = [torch.randn(40, k, generator=generator) for k in (2, 60)]
    found = Regression.fit(*noise)  # more features than images: the strongest ridge
    weakest = Ridge(alpha=1e-6, solver="svd").fit(noise[1].numpy(), noise[0].numpy())
    assert found.weights.norm() < 0.9 * float(torch.from_numpy(weakest.coef_).norm())


def test_features_that_do_not_vary_explain_nothing():
    of = torch.randn(10, 2, 2, 2)
    found = Regression.fit(of, torch.ones(10, 3, 2, 2))
    torch.testing.assert_close(found.left_over(of, torch.ones(10, 3, 2, 2)), of - of.mean((0, 2, 3), keepdim=True))
