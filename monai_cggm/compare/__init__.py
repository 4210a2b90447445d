# SPDX-License-Identifier: Apache-2.0
"""Comparisons: the same cases, budget and seeds for several ways to train."""

from monai_cggm.compare.cell import facts_of
from monai_cggm.compare.progress import CellProgress
from monai_cggm.compare.runner import run_study
from monai_cggm.compare.study import Arm, Cell, Study, find_study, read_study

__all__ = ["Arm", "Cell", "CellProgress", "Study", "facts_of", "find_study", "read_study", "run_study"]
