# SPDX-License-Identifier: Apache-2.0
"""From a folder that somebody else laid out to a datalist: which cases, modalities and labels it holds."""

from __future__ import annotations

from monai_cggm.discovery.convert import write_datalist
from monai_cggm.discovery.found import Found, FoundCase, Source
from monai_cggm.discovery.layouts import discover
from monai_cggm.discovery.survey import CaseSurvey, Intensities, Survey, survey_cases

__all__ = [
    "CaseSurvey",
    "Found",
    "FoundCase",
    "Intensities",
    "Source",
    "Survey",
    "discover",
    "survey_cases",
    "write_datalist",
]
