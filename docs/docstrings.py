"""An extension of griffe that reads the package's docstrings as the site needs them."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|data|func|meth|mod):`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    """Roles such as :class:`Name` become links, or code if no page has the name; examples become blocks of code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = ROLE.sub(lambda match: self._link(obj, match[1]), obj.docstring.value)
            obj.docstring.value = re.sub("^Example:$", "Examples:", text, flags=re.MULTILINE)

    @staticmethod
    def _link(obj: griffe.Object, target: str) -> str:
        name = target.rpartition(".")[2]
        try:
            path = target if target.startswith(f"{obj.package.name}.") else obj.resolve(target)
        except griffe.NameResolutionError:
            path = f"{obj.path}.{target}"  # a member of the class whose docstring this is
        return f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'
