# SPDX-License-Identifier: Apache-2.0
"""What finished runs say: figures, tables, comparisons. Nothing here imports PyTorch, so that reading is fast."""

from __future__ import annotations

from monai_cggm.analysis.cells import CellKey, Cells, read_cells
from monai_cggm.analysis.comparison import Comparison, compare, subsets_of, verdicts
from monai_cggm.analysis.statistics import Interval, SeedMean, paired_bootstrap, paired_p, seed_mean, seed_means

__all__ = [
    "CellKey",
    "Cells",
    "Comparison",
    "Interval",
    "SeedMean",
    "compare",
    "paired_bootstrap",
    "paired_p",
    "read_cells",
    "seed_mean",
    "seed_means",
    "subsets_of",
    "verdicts",
]
