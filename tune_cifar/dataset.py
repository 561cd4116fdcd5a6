"""What is known of a data set before an image of it is read, and CIFAR-10's own description."""

from __future__ import annotations

from pydantic import Field

from tune_cifar.schema import Frozen, TrainConfig


class DataDescription(Frozen):
    """What is known of a data set before an image of it is read. All images are RGB squares.

    Attributes:
        side: height and width of an image, in pixels.
        num_train: training images without those of validation.
        num_val: images set aside for validation.
        mean, std: of each channel over all training images, scaled to [0, 1].
    """

    name: str
    class_names: tuple[str, ...]
    side: int = Field(ge=1)
    num_train: int = Field(ge=1)
    num_val: int = Field(ge=1)
    num_test: int = Field(ge=1)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / self.num_classes

    @property
    def num_all(self) -> int:
        """Training and validation images."""
        return self.num_train + self.num_val

    @property
    def all_images(self) -> dict[str, int]:
        """The sizes of a training on all images, without validation."""
        return {"train_size": self.num_all, "val_size": 0}

    def find_problem(self, config: TrainConfig) -> str | None:
        """Return what of a recipe does not fit these images, as a sentence; None if it fits."""
        side = self.side
        if config.crop_pad >= side:
            return f"crop_pad < {side} must hold, got {config.crop_pad}."
        if config.cutout_size > side:
            return f"cutout_size <= {side} must hold, got {config.cutout_size}."
        return self.find_size_problem(config)

    def find_size_problem(self, config: TrainConfig) -> str | None:
        """Return what is wrong with a recipe's numbers of images, as a sentence."""
        train_size, val_size = config.train_size, config.val_size
        if train_size < self.num_classes:
            return f"train_size >= {self.num_classes} must hold, got {train_size}."
        if val_size > self.num_val:
            return f"val_size <= {self.num_val} must hold, got {val_size}."
        is_full = train_size == self.num_all
        if is_full != (val_size == 0):
            rule = f"val_size = 0 exactly when train_size = {self.num_all} must hold"
            return f"{rule}, got val_size {val_size} and train_size {train_size}."
        if not is_full and train_size > self.num_train:
            rule = f"train_size <= {self.num_train} or train_size = {self.num_all} must hold"
            return f"{rule}, got {train_size}."
        return None


# Of 50,000 training images 5,000 (500 a class) are set aside for validation. The std is that of the
# 51.2 M values of a channel, not the mean of the images' stds (the often-seen 0.2023, 0.1994).
CIFAR10 = DataDescription(
    name="cifar10",
    class_names=(
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
    side=32,
    num_train=45_000,
    num_val=5_000,
    num_test=10_000,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
