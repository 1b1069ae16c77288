"""Broken ways to begin an estimator, which the checks must notice."""


def pure_noise(self, p, rng):
    """Noise alone."""
    return lambda t, W, G: 0.05 * rng.standard_normal(p.oracle.shape)


def anchor(self, p, rng):
    """The first gradient, at every step."""
    kept = []

    def estimate(t, W, G):
        kept.append(G)
        return kept[0]

    return estimate
