"""An extension of griffe: the roles in docstrings, such as :class:`Name`, become links to what they name."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|data|func|meth|mod):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites docstrings when they are read; what is on no page becomes code without a link."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(lambda match: self._link(obj, match[1]), obj.docstring.value)

    @staticmethod
    def _link(obj: griffe.Object, target: str) -> str:
        name = target.rpartition(".")[2]
        try:
            path = target if target.startswith(f"{obj.package.name}.") else obj.resolve(target)
        except griffe.NameResolutionError:
            path = f"{obj.path}.{target}"  # a member of the class whose docstring this is
        return f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'
