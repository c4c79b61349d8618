"""What a diagnosis says: one entry a check, and a verdict."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Literal

from pydantic import BaseModel

Status = Literal["ok", "note", "fault", "undecided", "unchecked"]


class Certainty(IntEnum):
    """How directly a fault was seen; the verdict names the most certain one.

    Attributes:
        SURE: the files contradict each other, or another setting gives the known answers.
        MEASURED: another setting raises acceptance by far.
        LIKELY: something differs that is known to lower acceptance.
        SYMPTOM: acceptance or drafts are wrong, whatever the cause.
    """

    SURE = 0
    MEASURED = 1
    LIKELY = 2
    SYMPTOM = 3


class Check(BaseModel):
    """One thing that was looked at.

    Attributes:
        name: of the check.
        status: "fault" lowers acceptance or keeps the drafter from running, "note" may, of
            "undecided" the measurement cannot tell, "unchecked" could not be looked at.
        looked_at: what was compared with what.
        finding: what came out.
        evidence: the numbers.
        fix: the command or setting that mends a fault.
        certainty, gain: rank of a fault; ``gain`` is τ with the fix less τ without.
    """

    name: str
    status: Status
    looked_at: str
    finding: str
    evidence: dict[str, Any] = {}
    fix: str | None = None
    certainty: Certainty = Certainty.SYMPTOM
    gain: float = 0.0

    def fault(
        self,
        finding: str,
        fix: str,
        certainty: Certainty = Certainty.SYMPTOM,
        gain: float = 0.0,
        evidence: dict[str, Any] | None = None,
    ) -> Check:
        """This check with a fault.

        Args:
            finding, fix, certainty, gain: of the fault.
            evidence: the check's own when None.
        """
        update: dict[str, Any] = {
            "status": "fault", "finding": finding, "fix": fix, "certainty": certainty, "gain": gain
        }  # fmt: skip
        if evidence is not None:
            update["evidence"] = evidence
        return self.model_copy(update=update)

    def note(
        self, finding: str, fix: str | None = None, evidence: dict[str, Any] | None = None
    ) -> Check:
        """This check with a note, which is no fault; see ``fault`` for the arguments."""
        update: dict[str, Any] = {"status": "note", "finding": finding, "fix": fix}
        if evidence is not None:
            update["evidence"] = evidence
        return self.model_copy(update=update)


class Diagnosis(BaseModel):
    """All checks of a pair of target and drafter.

    Attributes:
        target, drafter: what was looked at.
        checks: in the order in which they ran.
    """

    target: str
    drafter: str
    checks: list[Check]

    @property
    def faults(self) -> list[Check]:
        """The most certain first; of equally certain ones, that whose fix gains most."""
        found = [check for check in self.checks if check.status == "fault"]
        return sorted(found, key=lambda check: (check.certainty, -check.gain))

    @property
    def verdict(self) -> str:
        """One line."""
        if self.faults:
            first = self.faults[0]
            return f"{first.name}: {first.finding}"
        close = [check for check in self.checks if check.status == "undecided"]
        if close:
            return "undecided: " + "; or ".join(f"{check.name}: {check.finding}" for check in close)
        missing = [check.name for check in self.checks if check.status == "unchecked"]
        if missing:
            return f"no fault found, but not everything could be checked: {', '.join(missing)}"
        noted = [check.name for check in self.checks if check.status == "note" and check.fix]
        if noted:
            return f"healthy: no fault found; see the notes on {', '.join(noted)}"
        return "healthy: no fault found"

    @property
    def fix(self) -> str | None:
        """What mends the verdict's fault, or decides what is undecided."""
        close = [check for check in self.checks if check.status == "undecided"]
        return next((check.fix for check in [*self.faults, *close]), None)

    @property
    def exit_code(self) -> int:
        """0 healthy, 1 a fault, 2 something is undecided or could not be checked."""
        if self.faults:
            return 1
        open_ones = ("undecided", "unchecked")
        return 2 if any(check.status in open_ones for check in self.checks) else 0
