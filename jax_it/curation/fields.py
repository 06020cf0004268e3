"""Every text in a record, whether a template renders it or not."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any


def texts_of(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the name and the text of every field that is text, those within lists and objects too."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from texts_of(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from texts_of(item, f"{path}.{number}" if path else str(number))


def map_texts(value: Any, function: Callable[[str], str]) -> Any:
    """Return a record with the function applied to every text in it, those within lists and objects too."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {name: map_texts(item, function) for name, item in value.items()}
    return [map_texts(item, function) for item in value] if isinstance(value, list | tuple) else value
