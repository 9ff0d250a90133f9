"""Everything that autoquant raises on purpose.

::

    AutoquantError              exit status 1
    ├── UserError               exit status 2: one line, names what is wrong and where
    │   ├── TaskError           the task, its file or its data
    │   ├── ModelError          the network: not float, NaN weights, an operator we cannot lower
    │   ├── SpaceError          a search space
    │   ├── HardwareError       a hardware profile
    │   ├── CandidateError      a candidate: unknown layer, bits that do not exist
    │   ├── RunError            a run folder: name in use, unreadable, incomplete
    │   └── PackageError        an exported package that does not match its manifest
    └── NoFeasibleMember        a search or a choice that nothing satisfies
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AutoquantError(Exception):
    """Base of every error raised on purpose; the message is one line."""

    exit_status = 1


class UserError(AutoquantError):
    """Something that the user can put right."""

    exit_status = 2


class TaskError(UserError):
    """The task cannot be loaded or its data cannot be used."""


class ModelError(UserError):
    """The network cannot be lowered, read or quantized."""


class SpaceError(UserError):
    """The search space does not exist or does not parse."""


class HardwareError(UserError):
    """The hardware profile does not exist, does not parse or lacks what is asked."""


class CandidateError(UserError):
    """The candidate names an unknown layer or impossible bits."""


class RunError(UserError):
    """The run folder cannot be used."""


class PackageError(UserError):
    """An exported package does not match its manifest."""


class NoFeasibleMember(AutoquantError):
    """No candidate satisfies the limits."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint for an unknown ``name``: what it begins, else the closest, else all (short)."""
    names = [str(v) for v in valid]
    begun = [n for n in names if name and n.startswith(name)][:3]
    close = begun or difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f"there is: {shown or 'none'}"
