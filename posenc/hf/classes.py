"""Classes that are made while a program runs: a subclass of a class of transformers, one each.

An object of one is pickled, and copied, by what its class was made of.
"""

from collections.abc import Callable
from typing import Any


class Made:
    """Mixed into every such class.

    Attributes:
        made_by: the function that returns the class, at the top of a file.
        made_of: the class that it was made of.
    """

    made_by: Callable[[Any], type]
    made_of: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind: Any = type(self)
        return blank, (kind.made_by, kind.made_of), self.__getstate__()


def blank(made_by: Callable[[Any], type], made_of: type) -> Any:
    """An object whose state is still to be set."""
    kind: Any = made_by(made_of)
    return kind.__new__(kind)


def make(bases: tuple[type, ...], made_by: Callable[[Any], type], body: dict[str, Any]) -> Any:
    """A class of the last base's name and file: transformers looks both up.

    A loss of labels is shifted for classes of known names, and the sources of a class are read.
    """
    own = bases[-1]
    named = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    made = {"made_by": staticmethod(made_by), "made_of": own}
    return type(own.__name__, bases, {**body, **named, **made})
