"""The data of the bench: digits and toy sentences without any download, MNIST, Fashion-MNIST and CIFAR-10 in their
original files, and the stored checkpoints that the notebooks open."""

from lmc.data.checkpoints import CheckpointSet, checkpoint
from lmc.data.cifar import cifar10
from lmc.data.images import Dataset, digits, fashion_mnist, mnist
from lmc.data.sentences import Text, toy_text

__all__ = ["CheckpointSet", "Dataset", "Text", "checkpoint", "cifar10", "digits", "fashion_mnist", "mnist", "toy_text"]


def __dir__() -> list[str]:
    return __all__
