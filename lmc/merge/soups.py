"""Soups: averages of models fine-tuned from one base with one head initialisation."""

from lmc.merge.method import linear


@linear
def wise_ft(count: int, *, alpha: float = 0.5) -> list[float]:
    """WiSE-FT (Wortsman, Ilharco, Kim et al. 2022, 2109.01903): `(1 - alpha) base + alpha model`, head included.

    `base` is the zero-shot model, `models` the fine-tuned one; of several, their mean. `alpha` weights the fine-tuned
    side; the paper's choice without target validation data is 0.5. `alpha=0` and `1` are the endpoints, bit for bit.
    """
    return [alpha / count] * count
