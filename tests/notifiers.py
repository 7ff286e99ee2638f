"""A notifier for tests: it writes what it is to tell into a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from airflow.sdk.bases.notifier import BaseNotifier


class FileNotifier(BaseNotifier):
    """Adds a line to a file.

    Args:
        path: the file.
        text: the line; a template.
    """

    template_fields = ("text",)

    def __init__(self, path: str, text: str, context: Any = None) -> None:
        super().__init__(context)
        self.path = Path(path)
        self.text = text

    def notify(self, context: Any) -> None:
        with self.path.open("a") as file:
            file.write(f"{self.text}\n")

    async def async_notify(self, context: Any) -> None:
        self.notify(context)
