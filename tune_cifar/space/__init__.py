"""Search spaces: a YAML file in, a baseline, Optuna distributions and a budget out.

Every refusal happens here, before anything is trained, and names file, line and rule. `document` reads YAML strictly,
`layout` says what a file holds, `rules` asks the schema, `reader` checks a file, `select` takes one tier of it with a
command line's pins; `edit` writes a range into a file, `knobs` tells what there is to set. Only `select` needs Optuna,
and only while it builds distributions: listing spaces stays quick.
"""

from tune_cifar.space.layout import TIERS, Budget, Choices, Published, Range, SamplerBudget, SpaceFile, SpaceHeader
from tune_cifar.space.reader import parse_space
from tune_cifar.space.rules import STRUCTURAL, find_rungs_problem, parse_duration
from tune_cifar.space.select import (
    SearchSpace,
    describe_distribution,
    find_space,
    list_spaces,
    load_header,
    load_space,
    parse_setting,
    read_space,
    select_tier,
)

__all__ = [
    "STRUCTURAL",
    "TIERS",
    "Budget",
    "Choices",
    "Published",
    "Range",
    "SamplerBudget",
    "SearchSpace",
    "SpaceFile",
    "SpaceHeader",
    "describe_distribution",
    "find_rungs_problem",
    "find_space",
    "list_spaces",
    "load_header",
    "load_space",
    "parse_duration",
    "parse_setting",
    "parse_space",
    "read_space",
    "select_tier",
]
