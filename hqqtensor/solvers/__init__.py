"""Solvers find a scale and a zero point for each group of weights. One registry entry adds one."""

from hqqtensor.solvers import column_scaled, hqq, hqq_joint, rtn
from hqqtensor.solvers.base import Solution, Solver, get_solver, register_solver, solver_names
from hqqtensor.solvers.codebook import Passes

__all__ = [
    "Passes",
    "Solution",
    "Solver",
    "column_scaled",
    "get_solver",
    "hqq",
    "hqq_joint",
    "register_solver",
    "rtn",
    "solver_names",
]
