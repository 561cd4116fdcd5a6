"""A run's network as one file for use elsewhere, checked against the network before it is kept.

Both formats take raw images, float32 (N, 3, H, W), RGB, in [0, 1], and return logits (N, classes).

onnx: a graph with the input `images` and the output `logits`, N free, which normalizes the images.
safetensors: the weights under the names of the network's state_dict; see `load_network`.

Both have the same metadata, each value a string: run_id, model, fingerprint, config (JSON), epochs,
val_acc (missing without validation), data, split, classes, side, mean and std (JSON), input,
output, tune_cifar (its version).
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from tune_cifar.data.load import Split, TrainVal
from tune_cifar.dataset import CIFAR10, DataDescription
from tune_cifar.errors import CheckpointError, ConfigError, ExportError
from tune_cifar.models.custom import add_source
from tune_cifar.record.environment import find_version
from tune_cifar.record.files import write_atomically
from tune_cifar.record.state import SearchState, TrialState
from tune_cifar.schema import TrainConfig
from tune_cifar.train.checkpoint import load_metadata, load_weights, save_weights
from tune_cifar.train.numerics import resolve_numerics
from tune_cifar.train.recorded import load_trained
from tune_cifar.train.step import build_initial_model
from tune_cifar.train.trainer import EVAL_BATCH_SIZE

Format = Literal["onnx", "safetensors"]
CheckedPart = Literal["validation", "training"]

NUM_CHECKED_IMAGES = 1_000
# How far apart logits may be, as a fraction of the largest of ours. The same fp32 products summed
# in another order differ by at most 4e-7 of it (all five networks, both formats, 1,000 images,
# 2026-11-21). Not absolute: logits of a hardly trained network lie within 0.02, those of one that
# nearly diverged reach 10,000.
TOLERANCE = 1e-4
# The version of ONNX's operators that torch writes; a newer one would be converted from it.
ONNX_OPSET = 18
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True)
class Agreement:
    """An exported file's logits on some images compared with those of the network in fp32.

    Attributes:
        part: the images: the run's validation images, or training images where it has none.
        largest_difference: of two logits.
        tolerance: the largest allowed difference.
        num_same: images with the same predicted class.
        num_contrary: images with different predicted classes that are no tie: our logits of the two
            classes are further apart than the tolerance.
    """

    part: CheckedPart
    num_images: int
    largest_difference: float
    tolerance: float
    num_same: int
    num_contrary: int

    @property
    def holds(self) -> bool:
        return self.largest_difference <= self.tolerance and not self.num_contrary


class RawNet(nn.Module):
    """A network that normalizes its images: float32 (N, 3, H, W) in [0, 1] to logits.

    Args:
        mean, std: of each channel, as in the network's training.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: tuple[float, ...] = CIFAR10.mean,
        std: tuple[float, ...] = CIFAR10.std,
    ):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


def check_format(file_format: Format) -> None:
    """Refuse a format whose packages are not installed.

    Raises:
        ConfigError: with their names and the command that installs them.
    """
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if file_format == "onnx" and missing:
        raise ConfigError(
            f"`file_format='onnx'` needs {' and '.join(missing)}, not installed here. Run "
            f"`python -m pip install {' '.join(ONNX_PACKAGES)}`, or take safetensors."
        )


def export_run(
    state: SearchState, trial: TrialState, data: TrainVal, file_format: Format, path: Path
) -> Agreement:
    """Write a run's network with its kept weights as one file, if it passes the check.

    An existing file at `path` is replaced only then.

    Args:
        data: the run's, from load_recorded_data.
        path: of the file; its folder must exist.

    Raises:
        ExportError: when the file does not compute what the network computes.
        RecordError: when the weights were not kept.
        ConfigError: when the format's packages are missing or the file cannot be written.
    """
    check_format(file_format)
    hint = "Export the best one (`best=True`), or let a search keep more of them (`keep_weights`)."
    trainer = load_trained(state, trial, data, resolve_numerics("cpu", "fp32"), hint)
    split = data.val or data.train  # the labels do not matter
    part: CheckedPart = "validation" if data.val else "training"
    some = Split(split.images_NCHW[:NUM_CHECKED_IMAGES], split.labels_N[:NUM_CHECKED_IMAGES])
    logits_NK = trainer.predict(some)
    metadata = describe_run(state, trial, data.about)
    try:
        # A temporary folder, so that nothing is left behind in any case.
        with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
            written = Path(folder) / path.name
            write = write_onnx if file_format == "onnx" else write_safetensors
            write(written, trainer.model, metadata, data.about)
            theirs_NK = answer_images(written, file_format, some.images_NCHW)
            agreement = compare_logits(logits_NK, theirs_NK, part)
            check_agreement(agreement, trial.run_id, file_format)
            written.replace(path)
    except OSError as exc:
        raise ConfigError(f"{path}: the file cannot be written: {exc.strerror}.") from exc
    return agreement


def describe_run(
    state: SearchState, trial: TrialState, data: DataDescription = CIFAR10
) -> dict[str, str]:
    """Return the metadata of an exported file, except what depends on its format."""
    info = state.header.data
    facts = {
        "tune_cifar": find_version("tune_cifar"),
        "run_id": trial.run_id,
        "model": trial.config.model,
        "fingerprint": trial.fingerprint,
        "epochs": str(trial.config.epochs),
        "data": info.label or info.name,
        "split": info.split_hash,
        "classes": json.dumps(data.class_names),
        "side": str(data.side),
        "mean": json.dumps(data.mean),
        "std": json.dumps(data.std),
        "output": f"logits: float32 (N, {data.num_classes}), in the order of the classes",
        "config": trial.config.model_dump_json(),
    }
    if state.header.model_source:
        facts["model_source"] = state.header.model_source
    return facts if trial.val_acc is None else {**facts, "val_acc": repr(trial.val_acc)}


def _describe_input(data: DataDescription) -> str:
    return f"images: float32 (N, 3, {data.side}, {data.side}), RGB in [0, 1]"


def write_safetensors(
    path: Path, model: nn.Module, metadata: dict[str, str], data: DataDescription = CIFAR10
) -> None:
    """Write a network's weights under the names of its state_dict, with metadata."""
    how = f"{_describe_input(data)}; subtract mean and divide by std, channel by channel"
    save_weights(path, model.state_dict(), {**metadata, "input": how})


def write_onnx(
    path: Path, model: nn.Module, metadata: dict[str, str], data: DataDescription = CIFAR10
) -> None:
    """Write a network that normalizes its images as an ONNX graph with its weights and metadata.

    torch folds batch norms into the convolutions before them.
    """
    network = RawNet(model, data.mean, data.std).eval()
    with torch.no_grad():
        program = torch.onnx.export(
            network,
            (torch.zeros(2, 3, data.side, data.side),),
            input_names=["images"],
            output_names=["logits"],
            opset_version=ONNX_OPSET,
            dynamic_shapes=({0: "N"},),
            verbose=False,
        )
    assert program is not None
    graph = program.model.graph
    # The exporter writes each node's place in the source, with this machine's paths, as metadata.
    outputs = [value for node in graph for value in node.outputs]
    for part in (graph, *graph, *graph.inputs, *graph.initializers.values(), *outputs):
        part.metadata_props.clear()
    how = f"{_describe_input(data)}; the network normalizes them itself"
    program.model.metadata_props.update({**metadata, "input": how})
    write_atomically(path, program.model_proto.SerializeToString())


def load_network(path: Path, run_source: bool = False) -> RawNet:
    """Load the network of an exported safetensors file, from that file alone, for raw images.

    Args:
        run_source: run the source of a network of somebody's own that the file carries. Only for
            files that you trust: it may do anything.

    Raises:
        ConfigError: the file carries a source that this process does not know, without
            `run_source`.
        CheckpointError: when the file is not safetensors, or was not exported by `export_run`.
    """
    weights, metadata = load_weights(path), load_metadata(path)
    try:
        config = TrainConfig(**json.loads(metadata["config"]))
        if config.is_own and run_source:
            add_source(metadata["model_source"])
        mean, std = json.loads(metadata["mean"]), json.loads(metadata["std"])
        classes, side = json.loads(metadata["classes"]), int(metadata.get("side", CIFAR10.side))
        data = CIFAR10.model_copy(update={"class_names": tuple(classes), "side": side})
        model = build_initial_model(config, data)
        model.load_state_dict(weights)
    except (KeyError, ValueError, RuntimeError) as exc:
        reason = f"no {exc}" if isinstance(exc, KeyError) else str(exc).splitlines()[0]
        raise CheckpointError(f"{path}: the file is not an exported network: {reason}") from exc
    return RawNet(model, mean, std).eval()


def answer_images(path: Path, file_format: Format, images_NCHW: Tensor) -> Tensor:
    """Return the logits (N, classes) of an exported file on uint8 images, from that file alone.

    ONNX is run by onnxruntime.
    """
    batches = torch.split(images_NCHW.float() / 255, EVAL_BATCH_SIZE)
    if file_format == "safetensors":
        network = load_network(path)
        with torch.inference_mode():
            return torch.cat([network(images) for images in batches])
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits = [session.run(["logits"], {"images": images.numpy()})[0] for images in batches]
    return torch.cat([torch.from_numpy(found) for found in logits])


def compare_logits(ours_NK: Tensor, theirs_NK: Tensor, part: CheckedPart) -> Agreement:
    """Compare logits of one network, computed in two ways. NaN and infinity agree with nothing."""
    tolerance = TOLERANCE * ours_NK.abs().max().item()
    choice_N, theirs_N = ours_NK.argmax(1), theirs_NK.argmax(1)
    # By how much our prediction leads theirs; not `lead_N > tolerance`, since NaN must count.
    lead_N = ours_NK.amax(1) - ours_NK.gather(1, theirs_N[:, None])[:, 0]
    return Agreement(
        part=part,
        num_images=len(ours_NK),
        largest_difference=(ours_NK - theirs_NK).abs().max().item(),
        tolerance=tolerance,
        num_same=int((choice_N == theirs_N).sum()),
        num_contrary=int((~(lead_N <= tolerance)).sum()),
    )


def check_agreement(agreement: Agreement, run_id: str, file_format: Format) -> None:
    """Refuse a file whose logits are not those of the network.

    Raises:
        ExportError: with the largest difference and the number of other predictions.
    """
    if agreement.holds:
        return
    rule = f"the {file_format} file's logits must be the network's to within"
    images = f"{agreement.num_images:,} {agreement.part} images"
    found = f"a difference of {agreement.largest_difference:.1e}"
    others = f"{agreement.num_contrary:,} other predictions"
    raise ExportError(
        f"{run_id}: {rule} {agreement.tolerance:.1e} on {images}, got {found} and {others}. "
        "Nothing was written."
    )
