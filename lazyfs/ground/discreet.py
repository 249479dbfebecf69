"""Values of which a part is not to be printed: secrets, and what is too long to be of use."""

from typing import Any, ClassVar

import msgspec


class Discreet(msgspec.Struct, frozen=True):
    """A struct that can be printed, in a log or a traceback, without what `unprinted` names."""

    unprinted: ClassVar[tuple[str, ...]] = ()

    def __repr__(self) -> str:
        told = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"{type(self).__name__}({told})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [
            (name, getattr(self, name))
            for name in self.__struct_fields__
            if name not in self.unprinted
        ]
