"""Common ground of paths, planes and mixtures: values of measures on splits, one for each of their points."""

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]


class Measured:
    """A result that holds `values`: split -> measure -> one value per point, in the shape of its points.

    Attributes:
        unit: of the loss; empty where it is not known.
        higher: the measures of which higher values are better.
    """

    values: dict[str, dict[str, Values]]
    unit: str
    higher: tuple[str, ...]

    @property
    def split(self) -> str:
        """The split that counts unless another is named: "test" where there is one."""
        return "test" if "test" in self.values else next(iter(self.values))

    @property
    def losses(self) -> dict[str, Values]:
        """split -> mean loss at each point."""
        return {split: measures["loss"] for split, measures in self.values.items()}

    @property
    def accuracies(self) -> dict[str, Values]:
        """split -> fraction classified correctly at each point; empty where targets are no classes."""
        return {split: measures["accuracy"] for split, measures in self.values.items() if "accuracy" in measures}
