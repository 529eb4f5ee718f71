"""The solver "column_scaled": column scales first (``transforms.column_scale``), then ``hqq_joint`` for the groups.

``transforms.prepare`` divides the weight by its column scales before any solver sees it, so the groups of the scaled
weight are hqq_joint's.
"""

from hqqtensor.solvers.base import register_solver
from hqqtensor.solvers.hqq_joint import solve

NAME = "column_scaled"

register_solver(NAME, solve)
