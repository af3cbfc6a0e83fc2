"""Attention as what it is: a contraction, a softmax over the keys, and a contraction."""

from typing import Any

from lmc.symmetry.discovery.rules import core
from lmc.symmetry.discovery.rules.linear import BATCH
from lmc.symmetry.discovery.rules.moves import reshape
from lmc.symmetry.discovery.rules.normalisation import normalise
from lmc.symmetry.discovery.rules.registry import Op, named, rule, unknown
from lmc.symmetry.discovery.tags import Tag


@rule(*named("scaled_dot_product_attention _scaled_dot_product_attention_math"))
def attention(op: Op, q: Tag, k: Tag, v: Tag, mask: Tag | None = None, *args: Any, **kwargs: Any) -> Any:
    """q (..., h, m, d), k (..., h, n, d), v (..., h, n, e) -> (..., h, m, e). Grouped queries repeat each key head."""
    units = op.units
    if (args and args[0]) or kwargs.get("dropout_p"):  # a random mask
        return unknown(op, [t for t in (q, k, v, mask) if t is not None])
    if not len(q.shape) == len(k.shape) == len(v.shape):
        q, k, v = (
            reshape(t, (1,) * (max(map(len, (q.shape, k.shape, v.shape))) - len(t.shape)) + t.shape) for t in (q, k, v)
        )
    causal = (len(args) > 1 and args[1]) or kwargs.get("is_causal", False)
    if q.shape[-3:-2] != k.shape[-3:-2]:
        k, v = (repeat_heads(t, q.shape[-3]) for t in (k, v))
    lead = BATCH[: len(q.shape) - 2]
    scores = core.contract(units, [(q, [*lead, "m", "d"]), (k, [*lead, "n", "d"])], [*lead, "m", "n"])
    operands = [scores] if mask is None else [scores, mask]
    if causal:
        operands.append(core.still(units, scores.shape[-2:], "causal mask"))
    weights = normalise(op, core.pointwise(units, scores.shape, operands), (len(scores.shape) - 1,))
    return core.contract(units, [(weights, [*lead, "m", "n"]), (v, [*lead, "n", "e"])], [*lead, "m", "e"])


def repeat_heads(x: Tag, heads: int) -> Tag:
    """Each key head serves `heads / key heads` consecutive query heads."""
    *lead, h, n, d = x.shape
    if h == 1:
        return Tag((*lead, heads, n, d), x.coords)
    wide = Tag((*lead, h, heads // h, n, d), tuple(c.reshape((*c.shape[:-2], 1, *c.shape[-2:])) for c in x.coords))
    return reshape(wide, (*lead, heads, n, d))
