"""MkDocs calls this for every page, so that the tables of docs/tables.py stand where a page names them."""

from typing import Any

import tables
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Put tables in the place of lines such as ``{{ strategies }}``; an unknown name ends the build."""
    try:
        return tables.fill(markdown)
    except ValueError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error
