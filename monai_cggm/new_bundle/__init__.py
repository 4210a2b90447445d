# SPDX-License-Identifier: Apache-2.0
"""From a folder of paired-modality cases to a MONAI bundle that trains on them."""

from __future__ import annotations

from monai_cggm.new_bundle.plan import BundlePlan, Wishes, plan_bundle
from monai_cggm.new_bundle.write import NewBundle, new_bundle

__all__ = ["BundlePlan", "NewBundle", "Wishes", "new_bundle", "plan_bundle"]
