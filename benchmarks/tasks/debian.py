"""Four more tasks from Debian packages, downloaded and unpacked without installing anything."""

from __future__ import annotations

TASKS: tuple[str, ...] = ()
