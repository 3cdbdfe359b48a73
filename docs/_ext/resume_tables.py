"""``.. resume-table::``: what may change of a run's configuration, from the constants of ``adaptax.resume``."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable

from config_tables import list_table
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from adaptax import config, resume


def list_leaves() -> list[str]:
    """Every key that has a value, as a dotted path."""
    hints = typing.get_type_hints(config.Config)
    return [key for key in config.key_paths() if not dataclasses.is_dataclass(hints.get(key))]


def sort_keys() -> list[tuple[str, list[str]]]:
    """What becomes of a changed key -> these keys, each of them once."""
    kinds: dict[str, Iterable[str]] = {
        "may change": resume.FREE_KEYS,
        "may change as long as the global batch is the same": resume.LAYOUT_KEYS,
        "may change where what they name is the same, by content": resume.NAMED_KEYS,
        "may change where another folder begins from a checkpoint": resume.FORK_KEYS,
    }
    left = [key for key in list_leaves() if key.partition(".")[0] not in resume.FREE_GROUPS]
    kinds["may not change"] = [key for key in left if not any(key in keys for keys in kinds.values())]
    return [(words, list(keys)) for words, keys in kinds.items()]


class ResumeTable(SphinxDirective):
    """Every key, by whether it may change between two starts of a run."""

    def run(self) -> list[nodes.Node]:
        """The table."""
        rows = []
        for words, keys in sort_keys():
            cells = [f"``{key}``" for key in keys]
            if keys == list(resume.FREE_KEYS):
                cells += [f"all of ``{group}``" for group in resume.FREE_GROUPS]
            rows.append((words, ", ".join(cells)))
        for module in (config, resume):
            self.env.note_dependency(str(module.__file__))
        return self.parse_text_to_nodes(list_table(("", "Keys"), rows, "28 72"))


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directive."""
    app.add_directive("resume-table", ResumeTable)
    return {"parallel_read_safe": True}
