"""Class names, as the writers print them."""

import re
from collections.abc import Sequence

from lightning.pytorch import Trainer


def class_names_of(trainer: Trainer) -> list[str] | None:
    """Class names from the module (its checkpoint's), else from the datamodule, else None."""
    for owner in (trainer.lightning_module, getattr(trainer, "datamodule", None)):
        names = getattr(owner, "class_names", None)
        if names is not None:
            return [str(name) for name in names]
    return None


def in_words(class_names: Sequence[str]) -> list[str]:
    """ImageNet's wnids (n01440764) in words (tench, Tinca tinca), and other names as they are."""
    if not any(re.fullmatch(r"n\d{8}", name) for name in class_names):
        return list(class_names)
    from timm.data import ImageNetInfo  # reads its tables from files

    words = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)
    return [words.get(name, name) for name in class_names]


def short_name(*, number: int, class_names: Sequence[str] | None, letters: int) -> str:
    """The class's name on one line of at most `letters` letters: the first of several names, cut where it must be."""
    if class_names is None or not 0 <= number < len(class_names):
        return str(number)
    name = " ".join(class_names[number].split(",")[0].split()) or str(number)
    return name if len(name) <= letters else f"{name[: letters - 1].rstrip()}…"
