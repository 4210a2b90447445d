# SPDX-License-Identifier: Apache-2.0
"""Balanced multimodal MRI segmentation on MONAI.

`monai_cggm` adds classifier-guided gradient modulation (CGGM; Guo et al., NeurIPS 2024) to a stock MONAI trainer: a
small classifier for each sequence watches how well that sequence is being learnt, and the size and the direction of
the encoders' gradients are changed so that every sequence gets trained.

For research use only. It is not a medical device, and nothing that it computes may guide the care of a patient.

Example:
    >>> import monai_cggm
    >>> monai_cggm.__version__
    '0.1.0'
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
