"""Mixed precision: how much each layer suffers from each setting, and the best choice within a budget."""

from hqqtensor.search.choose import Choice, check_target, choose_config
from hqqtensor.search.knapsack import best_choice
from hqqtensor.search.layers import CANDIDATES, EMBEDDINGS, LEARNED
from hqqtensor.search.sensitivity import Sensitivity, measure_sensitivity, random_tokens

__all__ = [
    "CANDIDATES",
    "EMBEDDINGS",
    "LEARNED",
    "Choice",
    "Sensitivity",
    "best_choice",
    "check_target",
    "choose_config",
    "measure_sensitivity",
    "random_tokens",
]
