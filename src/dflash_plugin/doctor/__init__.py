"""Finds out why a drafter's acceptance is low."""

from dflash_plugin.doctor.diagnose import DoctorOptions, TargetTexts, diagnose
from dflash_plugin.doctor.report import Check, Diagnosis

__all__ = ["Check", "Diagnosis", "DoctorOptions", "TargetTexts", "diagnose"]
