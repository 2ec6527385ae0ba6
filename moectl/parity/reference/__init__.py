"""The definition of every family that moectl knows, as plain functions: what a formula says, computed literally.

Read it to learn what a Mixture-of-Experts decoder computes: ``model`` (the residual stream and the losses),
``attention``, ``router``, ``experts``, and the ``numerics`` below them. Nothing here is fast or clever, no
module holds state, and every expert computes on every token.
"""

from moectl.parity.reference.subject import FormulaSubject, run

__all__ = ["FormulaSubject", "run"]
