"""What the solving and packing kernels can do; nothing here needs triton."""

LONGEST_GROUP = 4096
"""Members of a group that the solvers still hold in registers."""


def members(out_features: int, in_features: int, group_size: int, axis: int) -> int:
    """Weights in the longest group of a matrix ``[N, K]``."""
    return group_size if axis == 1 else -(-out_features // -(-out_features // group_size))


def why_not_solved(solver: str, lp_norm: float, format: str, members: int) -> str | None:
    """None, or why the kernels cannot find scales for groups of so many members."""
    if format != "int":
        return f"format {format!r}: the Triton solvers have integers only"
    if solver not in ("rtn", "hqq_joint"):
        return f"solver {solver!r}: the Triton kernels have 'rtn' and 'hqq_joint'"
    if solver == "hqq_joint" and lp_norm != 2.0:
        return f"lp_norm {lp_norm}: the Triton solver has 2.0 only"
    if members > LONGEST_GROUP:
        return f"groups of {members}: the Triton solvers hold up to {LONGEST_GROUP} in registers"
    return None
