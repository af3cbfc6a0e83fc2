"""The architectures of the bench: small, plain modules whose parameter names read well in axis patterns.

Every one can be captured by `torch.export` (non-strict), re-initialises itself through `reset_parameters`,
and names its hidden layers by what they are and its classifier `head`.
"""

from lmc.models.convnets import CNN, VGG, ResNet20, cnn, resnet20, vgg
from lmc.models.mlp import MLP, mlp
from lmc.models.transformers import GPT, ViT, gpt, vit

__all__ = ["CNN", "GPT", "MLP", "VGG", "ResNet20", "ViT", "cnn", "gpt", "mlp", "resnet20", "vgg", "vit"]


def __dir__() -> list[str]:
    return __all__
