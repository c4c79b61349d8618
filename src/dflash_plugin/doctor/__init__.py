"""Finds out why a drafter's acceptance is low."""

from dflash_plugin.doctor.diagnose import Asked, TargetTexts, diagnose
from dflash_plugin.doctor.report import Check, Diagnosis

__all__ = ["Asked", "Check", "Diagnosis", "TargetTexts", "diagnose"]
