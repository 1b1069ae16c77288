"""Problems whose constants are known: a loss, its gradient, the set ``K``, ``beta`` and ``M``."""

from theory.problems.problem import DenseProblem, FiniteSum, NoisyProblem, Problem, StochasticProblem, quadratic

__all__ = ["DenseProblem", "FiniteSum", "NoisyProblem", "Problem", "StochasticProblem", "quadratic"]
