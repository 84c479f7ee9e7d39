"""The fields of a model's configuration file, checked as they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.checkpoint_error import CheckpointError


class ConfigFields:
    """Named values of one file. Every error names the file and the field."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self.path = path
        self.fields = fields

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive whole number; null means the default."""
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{self.path}: {name} = {value!r} is not a positive whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; null means the default."""
        return self.positive(name, self._value(name, default))

    def positive(self, name: str, value: Any) -> float:
        """``value``, which stands under ``name``, as a number above zero."""
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise CheckpointError(f"{self.path}: {name} = {value!r} is not a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; null means the default."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {name} = {value!r} is neither true nor false")
        return value

    def refuse(self, name: str, value: Any, supported: str = "") -> CheckpointError:
        """The error for a field whose effect is not implemented."""
        hint = f"; supported: {supported}" if supported else "; if it does not, take it out of the file"
        return CheckpointError(f"{self.path}: {name} = {value!r} may change the result and is not implemented{hint}")

    def _value(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        if value is None and default is None:
            raise CheckpointError(f"{self.path}: lacks {name}")
        return default if value is None else value
