"""Names and sizes of a model's functions in the languages of apps."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping


def camel(name: str, *, upper: bool = False) -> str:
    """``input_ids`` as ``inputIds``, or ``InputIds``."""
    words = [word for word in name.split("_") if word]
    first = words[0] if words else "value"
    joined = first + "".join(word[0].upper() + word[1:] for word in words[1:])
    joined = f"value{joined}" if joined[0].isdigit() else joined
    return joined[0].upper() + joined[1:] if upper else joined[0].lower() + joined[1:]


class Names:
    """Gives names that occur once and are no keyword."""

    def __init__(self, keywords: Collection[str], taken: Collection[str] = ()):
        self._keywords = keywords
        self._taken = set(taken)

    def new(self, name: str) -> str:
        """The name, or one like it, which is taken from now on."""
        plain = f"{name}_" if name in self._keywords else name
        found, number = plain, 2
        while found in self._taken:
            found, number = f"{plain}{number}", number + 1
        self._taken.add(found)
        return found


def count(shape: list[int | str], names: Mapping[str, str], literal: Callable[[int], str] = str) -> str:
    """The number of elements of a shape as an expression: dimensions by their ``names``, numbers as ``literal``s."""
    return " * ".join(size(dim, names, literal) for dim in shape) or literal(1)


def size(dim: int | str, names: Mapping[str, str], literal: Callable[[int], str] = str) -> str:
    """One dimension as an expression; it is an integer, or made of names, integers, + - * and powers."""
    if isinstance(dim, int):
        return literal(dim)
    product = re.sub(r"(\w+)\*\*(\d+)", lambda m: "*".join([m[1]] * int(m[2])), dim)
    text = re.sub(r"\b\w+", lambda m: literal(int(m[0])) if m[0].isdigit() else names[m[0]], product)
    return text if re.fullmatch(r"\w+", text) else f"({text})"


def described(tensor: Mapping) -> str:
    """``float32 [batch, length, 32]``"""
    return f"{tensor['dtype']} [{', '.join(map(str, tensor['shape']))}]"


def listed(head: str, items: Iterable[str], tail: str) -> str:
    """``head(items)tail`` in lines of at most 110 characters, as far as the items allow; ``head`` may be indented."""
    text = f"{head}({', '.join(item.replace(' ', SPACE) for item in items)}){tail.replace(' ', SPACE)}"
    indent = " " * (len(head) - len(head.lstrip()))
    lines = textwrap.wrap(text.lstrip(), 110, initial_indent=indent, subsequent_indent=f"{indent}    ",
                          break_long_words=False, break_on_hyphens=False)  # fmt: skip
    return "\n".join(lines).replace(SPACE, " ")


SPACE = "\0"
"""A space that lines are not broken at."""
