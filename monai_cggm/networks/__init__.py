# SPDX-License-Identifier: Apache-2.0
"""Networks with one encoder a modality, and the classifiers that watch them."""

from monai_cggm.networks.deeplab import DeepLabV3PlusEncoder, norm_spec
from monai_cggm.networks.early import EarlyFusion
from monai_cggm.networks.fusion import FusionDecoder
from monai_cggm.networks.segmenter import MultimodalSegmenter, Present
from monai_cggm.networks.subsets import Subsets, UnimodalEnsemble, modality_subsets, subset_masks, subset_predictor
from monai_cggm.networks.unimodal import FusionAndUnimodal, UnimodalClassifiers

__all__ = [
    "DeepLabV3PlusEncoder",
    "EarlyFusion",
    "FusionAndUnimodal",
    "FusionDecoder",
    "MultimodalSegmenter",
    "Present",
    "Subsets",
    "UnimodalClassifiers",
    "UnimodalEnsemble",
    "modality_subsets",
    "norm_spec",
    "subset_masks",
    "subset_predictor",
]
