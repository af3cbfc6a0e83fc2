"""`align=`: networks that were trained independently can be merged once their units are in one order.

Every method that takes several models takes `align=`:

- a `PermutationSpec`: all models are brought into the order of the first by their weights (`lmc.match_many`);
- or a function of the list of weights that gives, for each, a `Permutation` or its moved weights:

      average([a, b], align=lambda w: [w[0], lmc.activation_matching(spec, model, *w, inputs).apply(w[1])])
      average(models, align=lambda w: lmc.match_many(spec, w, method="merge_many"))

A base is brought into that order as well, as the last of the list. Moves by permutations change no model's function.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar, Union

from lmc.core.context import own_context
from lmc.errors import InputError
from lmc.weights import ModelOrWeights, Weights, agreeing, as_weights

if TYPE_CHECKING:
    from lmc.symmetry.spec import Permutation, PermutationSpec, UnboundSpec

# With names in quotes: a specification, and all that finds one, is imported when there is something to align.
Moves: TypeAlias = Sequence[Union["Permutation", ModelOrWeights]]
Align: TypeAlias = Union["PermutationSpec", "UnboundSpec", Callable[[list[Weights]], Moves]]
P = ParamSpec("P")
R = TypeVar("R")

PARAMETER = inspect.Parameter("align", inspect.Parameter.KEYWORD_ONLY, default=None)


@own_context
def aligned(
    models: Sequence[ModelOrWeights], align: Align, *, base: ModelOrWeights | None = None
) -> tuple[list[Weights], Weights | None]:
    """The weights of the models, and of the base, in one order of units; none of what is given is changed.

    Raises:
        InputError: `align` that is neither a spec nor a function, or that does not give one move for each model.
        MismatchError: models of different architectures.
    """
    from lmc.align.many import match_many
    from lmc.symmetry.spec import Permutation, PermutationSpec, UnboundSpec

    names = [f"models[{i}]" for i in range(len(models))]
    given = agreeing(models, names) if base is None else agreeing([*models, base], [*names, "base"])
    if not given:
        raise InputError("models is empty: pass at least one module or state dict")
    if len(given) == 1:
        return given, None
    if isinstance(align, PermutationSpec | UnboundSpec):
        moves: Moves = match_many(align, given)
    elif callable(align):
        moves = align(list(given))
    else:
        raise InputError(f"align: expected a PermutationSpec or a function of weights, got {type(align).__name__}")
    if not isinstance(moves, Sequence) or len(moves) != len(given):
        count = len(moves) if isinstance(moves, Sequence) else type(moves).__name__
        raise InputError(f"align gave {count}; expected a permutation or weights for each of {len(given)} models")
    moved: list[Weights] = [
        move.apply(state) if isinstance(move, Permutation) else as_weights(move)
        for move, state in zip(moves, given, strict=True)
    ]
    return (moved, None) if base is None else (moved[:-1], moved[-1])


def alignable(method: Callable[P, R]) -> Callable[..., R]:
    """Give a method with a parameter `models` (and perhaps `base`) the option `align=`."""
    signature = inspect.signature(method)
    own = list(signature.parameters.values())
    rest = [parameter for parameter in own if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    full = signature.replace(parameters=[*own[: len(own) - len(rest)], PARAMETER, *rest])

    @functools.wraps(method)
    def merge(*args: Any, align: Align | None = None, **options: Any) -> R:
        if align is None:
            return method(*args, **options)
        bound = signature.bind(*args, **options)
        models, base = aligned(bound.arguments["models"], align, base=bound.arguments.get("base"))
        bound.arguments["models"] = models
        if base is not None:
            bound.arguments["base"] = base
        return method(*bound.args, **bound.kwargs)

    merge.__signature__ = full  # type: ignore[attr-defined]
    return merge
