# SPDX-License-Identifier: Apache-2.0
"""Networks with one encoder a modality, and the classifiers that watch them."""

from monai_cggm.networks.deeplab import DeepLabV3PlusEncoder, norm_spec
from monai_cggm.networks.early import EarlyFusion
from monai_cggm.networks.fusion import FusionDecoder
from monai_cggm.networks.late import LateFusion, energy_weight
from monai_cggm.networks.segmenter import MultimodalSegmenter, Present
from monai_cggm.networks.sequence import AttentionStack, MultimodalTransformer, SequenceClassifiers, SequenceEncoder
from monai_cggm.networks.subsets import Subsets, modality_subsets, subset_masks, subset_predictor
from monai_cggm.networks.unimodal import FusionAndUnimodal, UnimodalClassifiers

__all__ = [
    "AttentionStack",
    "DeepLabV3PlusEncoder",
    "EarlyFusion",
    "FusionAndUnimodal",
    "FusionDecoder",
    "LateFusion",
    "MultimodalSegmenter",
    "MultimodalTransformer",
    "Present",
    "SequenceClassifiers",
    "SequenceEncoder",
    "Subsets",
    "UnimodalClassifiers",
    "energy_weight",
    "modality_subsets",
    "norm_spec",
    "subset_masks",
    "subset_predictor",
]
