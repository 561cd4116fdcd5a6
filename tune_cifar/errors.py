"""Every error a user can meet. One sentence each: where: rule, got value. Hint.

TuneCifarError
├── ConfigError       a training configuration or a runtime option breaks a rule
├── SpaceError        a search-space file breaks a rule (file, line, rule, nearest name)
├── DataError         CIFAR-10 is missing, truncated, altered or cannot be downloaded
├── CheckpointError   a checkpoint is torn or belongs to another configuration
│   └── DiskFullError  there was no room for one, or for weights
├── RecordError       a search's record cannot be read, or a name is taken or unknown
├── TrackingError     MLflow cannot be reached or refuses
├── ExportError       an exported file does not compute what the network computes
└── Diverged          the loss stopped being a number: a result of a trial, not a fault of the program
"""

import re


def hide_credentials(text: str) -> str:
    """The text with `user:password@` (or `token@`) of every address in it replaced by `***@`."""
    return re.sub(r"(?<=://)[^/\s]+@", "***@", text)


class TuneCifarError(Exception):
    """Base of all errors that the command line shows as one sentence with exit status 1."""


class ConfigError(TuneCifarError):
    """A training configuration or a runtime option breaks a rule."""


class SpaceError(TuneCifarError):
    """A search-space file breaks a rule."""


class DataError(TuneCifarError):
    """The data set is missing, truncated, altered or cannot be downloaded."""


class CheckpointError(TuneCifarError):
    """A checkpoint is torn or belongs to another configuration."""


class DiskFullError(CheckpointError):
    """There was no room on the disk for a checkpoint or for weights: no fault of the training."""


class RecordError(TuneCifarError):
    """A search's record cannot be read, or a search's name is taken or unknown."""


class TrackingError(TuneCifarError):
    """The MLflow store cannot be reached or refuses."""


class ExportError(TuneCifarError):
    """An exported file does not compute what the network computes."""


class Diverged(TuneCifarError):  # noqa: N818  (a result, not a fault: it keeps the field's own word)
    """The training loss was not finite.

    Attributes:
        epoch: the epoch in which it happened, from 1.
        step: the optimizer step counted from the start of the training, from 1.
    """

    def __init__(self, epoch: int, step: int) -> None:
        super().__init__(
            f"training: the loss must be finite, got nan or inf at epoch {epoch}, step {step}. Lower max_lr."
        )
        self.epoch = epoch
        self.step = step

    def __reduce__(self) -> tuple[type["Diverged"], tuple[int, int]]:
        return (Diverged, (self.epoch, self.step))
