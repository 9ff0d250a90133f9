"""``python -m autoquant`` is the ``autoquant`` command."""

from __future__ import annotations

from autoquant.cli import main

if __name__ == "__main__":
    main()
