"""The plane explorer in Jupyter."""

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import traitlets

from lmc.landscape.planes.plane_result import Plane
from lmc.views.widgets.explorer import Explorer
from lmc.views.widgets.pictures import answer
from lmc.views.widgets.plane_page import MODULE, STYLE, inline_html, state


class PlaneExplorer(Explorer):
    """A plane in weight space as a map and as a surface, with a point to be dragged. Drawn in the browser from the
    points of the grid; where the point is let go of, the kernel evaluates the network itself and shows what it
    predicts. Explorers of one plane stay in step.

    Attributes:
        point: (x, y), where the point stands; follows it, and moves it.
        split, measure: what is drawn.
    """

    _esm = MODULE
    _css = STYLE
    shared = ("point", "split", "measure")
    point = traitlets.List(traitlets.Float(), minlen=2, maxlen=2).tag(sync=True)
    split = traitlets.Unicode().tag(sync=True)
    measure = traitlets.Unicode().tag(sync=True)

    def __init__(self, plane: Plane, paths: Mapping[str, npt.ArrayLike]) -> None:
        self.plane = plane
        super().__init__([plane], state(plane, paths))

    @traitlets.validate("split", "measure")
    def _known(self, proposal: Any) -> str:
        name, value = proposal["trait"].name, proposal["value"]
        known = self.plane.values if name == "split" else self.plane.values[self.plane.split]
        if value not in known:
            raise traitlets.TraitError(f"{name}={value!r}; expected one of {', '.join(known)}")
        return value

    def answer(self, place: Any) -> dict[str, Any]:
        split, x, y = place
        return answer(self.plane.exact, [float(x), float(y)], split)

    def page(self, state: Mapping[str, Any]) -> str:
        return inline_html(state)

    def __repr__(self) -> str:
        return f"PlaneExplorer({len(self.plane.x)} x {len(self.plane.y)} points; {', '.join(self.plane.places)})"
