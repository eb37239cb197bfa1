"""Read a JSON object from a model folder, with errors that name the file, the place and the key."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llama3.errors import UserError


def read_json_object(path: Path, error: type[UserError]) -> dict[str, Any]:
    """The object in `path`. Raises `error` if the file is missing, unreadable, not UTF-8 JSON, or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror})") from None
    except UnicodeDecodeError as reason:
        raise error(f"{path}: not a text file (byte {reason.start} is not UTF-8)") from None
    except json.JSONDecodeError as reason:
        raise error(f"{path}: not valid JSON at line {reason.lineno}, column {reason.colno}: {reason.msg}") from None
    if not isinstance(value, dict):
        raise error(f"{path}: holds a JSON {type(value).__name__}, an object is needed")
    return value


@dataclass(frozen=True)
class JsonObject:
    """Typed, strict access to a JSON object. A null counts as absent; failures raise `error` with source and key."""

    values: Mapping[str, Any]
    source: str
    error: type[UserError]
    prefix: str = ""

    @classmethod
    def read_optional(cls, path: Path, error: type[UserError]) -> "JsonObject":
        """The object in `path`; an empty one where there is no such file."""
        return cls(read_json_object(path, error) if path.exists() else {}, str(path), error)

    def fail(self, key: str, problem: str) -> NoReturn:
        raise self.error(f"{self.source}: {self.prefix}{key} {problem}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str) -> Any:
        if not self.has(key):
            self.fail(key, "is missing; it has no default")
        return self.values[key]

    def size(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(key, f"is {value!r}; a whole number of at least 1 is needed")
        return value

    def positive(self, key: str) -> float:
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            self.fail(key, f"is {value!r}; a number above 0 is needed")
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            self.fail(key, f"is {value!r}; true or false is needed")
        return value

    def token_id(self, key: str) -> int | None:
        """The token id under `key`, or None where the key is absent."""
        value = self.values.get(key)
        if value is not None and not is_token_id(value):
            self.fail(key, f"is {value!r}; a token id is needed")
        return value

    def token_ids(self, key: str) -> list[int]:
        """The id or the list of ids under `key`; none where the key is absent."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(map(is_token_id, ids)):
            self.fail(key, f"is {value!r}; a token id or a list of them is needed")
        return ids

    def object(self, key: str) -> "JsonObject":
        value = self.get(key)
        if not isinstance(value, dict):
            self.fail(key, f"is {value!r}; an object is needed")
        return JsonObject(value, self.source, self.error, f"{self.prefix}{key}.")


def is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
