"""What can go wrong: a launch that cannot be run, and a kernel that ran and did something wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emulator.stats import Stats

SOFT = ("uninit-shared", "global-conflict")  # kinds of issues that are reported in Stats.issues, not raised


class PtxError(RuntimeError):
    """The PTX or the launch is invalid, or uses something that the emulator does not cover."""


class PtxIssues(RuntimeError):
    """The kernel ran, but did something wrong; `stats` holds everything that was seen."""

    def __init__(self, issues: list[dict], stats: Stats):
        shown = [f"[x{issue['count']}] {issue['msg']}" for issue in issues[:20]]
        if len(issues) > len(shown):
            shown.append(f"... {len(issues) - len(shown)} more")
        super().__init__("\n".join(shown))
        self.stats = stats
