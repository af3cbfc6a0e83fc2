"""What the explorers have in common in Jupyter: those of one result stay in step, and the kernel answers for places."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet

import anywidget
import traitlets

from lmc.errors import LmcError

_OPEN: WeakKeyDictionary[Any, WeakSet["Explorer"]] = WeakKeyDictionary()  # result -> its explorers


class Explorer(anywidget.AnyWidget):
    """A widget that shows results, and as a page of its own where no kernel runs.

    Args:
        results: what it shows. Explorers of one kind that show the same result have the same `shared` traits.
        state: the first values of its traits.
    """

    shared: ClassVar[tuple[str, ...]] = ()
    data = traitlets.Dict().tag(sync=True)

    def __init__(self, results: Sequence[Any], state: Mapping[str, Any]) -> None:
        self._results, self._kind = list(results), type(self)  # anywidget will make a class of its own of it
        super().__init__(**state)
        others = self._peers()
        if others:
            for name in self.shared:
                self._follow(name, getattr(others[0], name))
        for result in self._results:
            _OPEN.setdefault(result, WeakSet()).add(self)
        self.observe(self._lead, list(self.shared))
        self.on_msg(self._asked)

    def answer(self, place: Any) -> dict[str, Any]:
        """What is to be told of a place that was not evaluated before."""
        raise NotImplementedError

    def page(self, state: Mapping[str, Any]) -> str:
        """The explorer in this state, as HTML that needs no kernel."""
        raise NotImplementedError

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
        """The live view, and the same figure as a page of its own for where no kernel runs."""
        bundle = super()._repr_mimebundle_(**kwargs)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        if data is not None:
            data["text/html"] = self.page({name: getattr(self, name) for name in ("data", *self.shared)})
        return bundle
