"""Explorers in general: those of one result stay in step, the kernel answers for places, and a page needs no kernel.

The file of each explorer holds its state (what it draws, as plain data), its class, and the views that make it a method of
its result.
"""

import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet

import anywidget
import traitlets

from lmc.core.files import write_text
from lmc.errors import LmcError
from lmc.views.widgets.page import inline, page

_OPEN: WeakKeyDictionary[Any, WeakSet["Explorer"]] = WeakKeyDictionary()  # result -> its explorers


class Explorer(anywidget.AnyWidget):
    """A widget that shows results, and as a page of its own where no kernel runs.

    Args:
        results: what it shows. Explorers of one kind that show the same result have the same `shared` traits.
        state: the first values of its traits.
    """

    _esm: ClassVar[str]
    _css: ClassVar[str]
    title: ClassVar[str]
    shared: ClassVar[tuple[str, ...]] = ()
    data = traitlets.Dict().tag(sync=True)
    key = traitlets.Unicode().tag(sync=True)  # by which pages in the notebook find this model

    def __init__(self, results: Sequence[Any], state: Mapping[str, Any]) -> None:
        self._results, self._kind = list(results), type(self)  # anywidget will make a class of its own of it
        self._summary = "\n\n".join(str(result) for result in results)
        super().__init__(key=secrets.token_hex(8), **state)
        others = self._peers()
        if others:
            for name in self.shared:
                self._follow(name, getattr(others[0], name))
        for result in self._results:
            _OPEN.setdefault(result, WeakSet()).add(self)
        self.observe(self._lead, list(self.shared))
        self.on_msg(self._asked)

    def answer(self, place: Any) -> dict[str, Any]:
        """The values at a place that was not evaluated before."""
        raise NotImplementedError

    @classmethod
    def write(
        cls,
        file: str | Path,
        state: Mapping[str, Any],
        title: str | None,
        text: Sequence[str],
        rows: Sequence[Mapping[str, str]],
    ) -> Path:
        """Write the explorer as a page of its own, and return where it is."""
        write_text(file, page(cls._esm, cls._css, state, title=title or cls.title, text=text, rows=rows))
        return Path(file)

    def _peers(self) -> list["Explorer"]:
        found = {id(each): each for result in self._results for each in _OPEN.get(result, ())}
        return [each for each in found.values() if each is not self and each._kind is self._kind]

    def _lead(self, change: Any) -> None:
        for peer in self._peers():
            peer._follow(change["name"], change["new"])

    def _follow(self, name: str, value: Any) -> None:
        try:
            setattr(self, name, value)
        except traitlets.TraitError:
            pass  # something that this one does not show

    def _asked(self, _widget: Any, content: Any, _buffers: Any) -> None:
        if "place" not in content:
            return
        try:
            told = self.answer(content["place"])
        except LmcError as error:  # the reader sees it where the value would stand
            told = {"error": str(error)}
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {error}"}
        self.send({**told, "ticket": content["ticket"], "place": content["place"]})

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The figure as HTML that finds the kernel's model, if there is one; a widget view only where that is needed."""
        bundle = super()._repr_mimebundle_(**kwargs)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        if data is not None:
            state = {name: getattr(self, name) for name in ("data", *self.shared)}
            data["text/html"] = inline(self._kind._esm, self._kind._css, state, key=self.key, summary=self._summary)
            if not _views_wanted():
                data.pop("application/vnd.jupyter.widget-view+json", None)
        return bundle


def _views_wanted() -> bool:
    """Whether the front end keeps a notebook's outputs apart, so that a page does not find the model of the kernel.

    Elsewhere a bundle without a widget view is better: what is saved stays alive when the notebook is opened again.
    """
    return "google.colab" in sys.modules or "VSCODE_PID" in os.environ
