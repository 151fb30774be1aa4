# SPDX-License-Identifier: Apache-2.0
"""The attentive probe finds the token that a mean drowns."""

import numpy as np
from sklearn.linear_model import LogisticRegression

from particlejax.config.job_specs import ProbeSpec
from particlejax.jobs import attentive_probe


def test_an_attentive_probe_finds_the_token_that_a_mean_drowns() -> None:
    def made(count: int, seed: int) -> attentive_probe.ClipTokens:
        """Of some 30 tokens one says the class, the first number of the others being 0; the rest
        says nothing.
        """
        rng = np.random.default_rng(seed)
        x, label = rng.normal(size=(count, 32, 8)).astype(np.float16), rng.integers(0, 3, count)
        segment = (np.arange(32)[None] < rng.integers(20, 33, count)[:, None]).astype(np.int32)
        x[..., 0] = 0
        x[np.arange(count), 3] = 4 * np.eye(8)[label + 1] + 6 * np.eye(8)[0]
        x[segment == 0] = 9
        return attentive_probe.ClipTokens(
            np.where(np.arange(count) < count - 3, label, -1), {"all": (x, segment)}
        )

    learnt, asked = made(200, 0), made(100, 1)
    found = attentive_probe.accuracy(learnt, asked, ProbeSpec(attentive_steps=150))["all"]
    means = [
        np.average(x.astype(float), axis=1, weights=np.broadcast_to(segment[..., None], x.shape))
        for x, segment in (learnt.x["all"], asked.x["all"])
    ]
    linear = (
        LogisticRegression()
        .fit(means[0][:-3], learnt.label[:-3])
        .score(means[1][:-3], asked.label[:-3])
    )
    assert found > 0.8 > linear + 0.2, (found, linear)
    assert attentive_probe.accuracy(learnt, asked, ProbeSpec(attentive_steps=150))["all"] == found
