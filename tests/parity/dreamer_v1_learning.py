"""Optimiser and returns of Dreamer V1, against recorded tables."""

from tests.parity.common import Check
from tests.parity.learning import lambda_returns, optimizers

CHECKS = [
    # The original computes a weight decay and does not use it.
    Check("optimizer", r"opt/\w+/lr", optimizers(eps=1e-7, decays=False)),
    Check("lambda_return", r"lambda/reward", lambda_returns),
]
