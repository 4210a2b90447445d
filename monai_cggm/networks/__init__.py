# SPDX-License-Identifier: Apache-2.0
"""Networks with one encoder a modality, and the classifiers that watch them."""

from monai_cggm.networks.deeplab import DeepLabV3PlusEncoder, norm_spec
from monai_cggm.networks.fusion import FusionDecoder
from monai_cggm.networks.segmenter import MultimodalSegmenter, Present
from monai_cggm.networks.unimodal import FusionAndUnimodal, UnimodalClassifiers

__all__ = [
    "DeepLabV3PlusEncoder",
    "FusionAndUnimodal",
    "FusionDecoder",
    "MultimodalSegmenter",
    "Present",
    "UnimodalClassifiers",
    "norm_spec",
]
